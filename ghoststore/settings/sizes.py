"""Numbers of bytes as people write them: ``64MiB``."""

import re

_UNITS = {"": 1, "b": 1, **{f"{letter}ib": 1 << 10 * power for power, letter in enumerate("kmgt", 1)}}
_SIZE = re.compile(r"(\d+) ?([a-z]*)", re.IGNORECASE)


def parse_bytes(word: str) -> int:
    """A number of bytes: ``67108864``, ``64MiB`` or ``64 MiB``. ValueError for another word."""
    matched = _SIZE.fullmatch(word.strip())
    if matched is None or matched[2].lower() not in _UNITS:
        raise ValueError(f"{word!r} is no number of bytes, such as 67108864 or 64MiB (KiB, MiB, GiB, TiB)")
    return int(matched[1]) * _UNITS[matched[2].lower()]


def shown_bytes(count: int) -> str:
    """``count`` in the largest unit that it is a whole number of: what :func:`parse_bytes` reads."""
    fitting = (name for name, size in reversed(_UNITS.items()) if count % size == 0 and count >= size > 1)
    unit = next(fitting, "")
    return f"{count // _UNITS[unit]}{unit[:1].upper()}{unit[1:2]}{unit[2:].upper()}"
