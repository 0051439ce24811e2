"""Makes text from corpora, stores, paths and arguments safe to show.

Stored text stays exact. Text for a terminal, a spreadsheet or a picture goes through here first.
"""

from __future__ import annotations

import json
import re
from typing import Any

# Control characters (C0, DEL, C1), bidirectional controls, which reorder the text around them, line ends, invisible
# characters, and halves of characters (surrogates). The joiners U+200C and U+200D stay: some scripts need them.
_HIDDEN = (
    r"\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U000e0000-\U000e007f"
)
_UNSAFE = re.compile(rf"[\x00-\x1f{_HIDDEN}]")
_UNSAFE_IN_LINES = re.compile(rf"[\x00-\x08\x0b-\x1f{_HIDDEN}]")
_HIDDEN_IN_JSON = re.compile(rf"[{_HIDDEN}]")
_NAMED = {"\t": r"\t", "\n": r"\n", "\r": r"\r"}
_ESCAPE = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[tnr])")
_LONGEST_ESCAPE = len(r"\U0010ffff")
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")


def visible(text: str, *, lines: bool = False) -> str:
    r"""``text`` with an escape such as ``\x1b`` for every character that controls a terminal or is invisible.

    With ``lines`` line ends and tabs stay.
    """
    return (_UNSAFE_IN_LINES if lines else _UNSAFE).sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    form = f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return _NAMED.get(match[0], form)


def clipped(escaped: str, length: int) -> str:
    r"""The first ``length`` characters of a result of :func:`visible`, without a part of an escape at the end.

    A cut escape such as ``\x1`` would pass for another text.
    """
    begin = max(0, length - _LONGEST_ESCAPE)
    for escape in _ESCAPE.finditer(escaped, begin, length + _LONGEST_ESCAPE):
        if escape.start() < length < escape.end():
            return escaped[: escape.start()]
    return escaped[:length]


def json_text(value: Any, *, indent: int | None = None, encoding: str = "utf-8") -> str:
    r"""``value`` as JSON that ``encoding`` can hold and that is safe to show on a terminal.

    The data are exact: characters that are not safe to show are written as JSON escapes such as ``\u202e``.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    text = _HIDDEN_IN_JSON.sub(lambda match: json.dumps(match[0])[1:-1], text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def spreadsheet_cell(value: Any) -> Any:
    """``value`` as a safe cell of a spreadsheet.

    A text that the spreadsheet would take for a formula gets a leading apostrophe (OWASP, CSV injection). Control
    characters become escapes, except line ends and tabs, which a quoted cell may hold.
    """
    if not isinstance(value, str):
        return value
    return ("'" if value.startswith(_FORMULAS) else "") + visible(value, lines=True)


def picture_label(text: str) -> str:
    """``text`` as a label of matplotlib: without mathematics, and never left out of a legend."""
    label = visible(text).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label
