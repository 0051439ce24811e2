"""Rendering parameters as flags of the command line: `` `top_k=5` `` in a message becomes ``--top-k 5``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import Field
from typing import Any, NamedTuple

from ghoststore.settings.option import Option, members_of, options_of

NAMED = re.compile(r"`([A-Za-z_][\w.]*)(?:=([^`]*))?`")
NAMES = re.compile(r"\['[^']*'(?:, '[^']*')*\]")
"""A list of names as Python writes it; the command line takes them with commas."""


class Entry(NamedTuple):
    """A field that is an option of the command line."""

    path: tuple[str, ...]
    """The name of the field, after the name of the field that holds its object."""
    spec: Field[Any]
    option: Option

    @property
    def flag(self) -> str:
        """The flag of the option (of a switch: the flag for True)."""
        return self._words()[0].split()[0]

    @property
    def off(self) -> str | None:
        """The flag for False; None if False means to leave the flag out."""
        words = self._words()
        return words[1] if len(words) > 1 else None

    @property
    def is_bool(self) -> bool:
        """Whether the values are True and False (and None, if the option is not given)."""
        return members_of(self.spec.type) == (bool,)

    @property
    def declarations(self) -> str:
        """All flags of the option, in the form that click expects."""
        return "/".join(self._words())

    def _words(self) -> list[str]:
        name = self.spec.name.replace("_", "-")
        if self.option.flag is None:
            both = self.spec.default is True or (self.is_bool and self.spec.default is None)
            return [f"--{name}", f"--no-{name}"] if both else [f"--{name}"]
        return self.option.flag.split("/")

    def render(self, value: str | None) -> str | None:
        """The flag, with ``value`` if that is not None. None if no flag can express the value."""
        if value is None:
            return self.flag
        if self.is_bool:
            return {"True": self.flag, "False": self.off}.get(value, self.flag)
        if value == "None":
            return None if self.option.none is None else f"{self.flag} {self.option.none}"
        if NAMES.fullmatch(value):
            value = value[2:-2].replace("', '", ",")
        return f"{self.flag} {value.strip(chr(34) + chr(39))}"


def entries_of(kind: type) -> Iterator[Entry]:
    """The command-line options of a dataclass, with those of the objects that it holds."""
    for spec, option in options_of(kind):
        if option.python_only:
            continue
        if option.group is None:
            yield Entry((spec.name,), spec, option)
            continue
        for inner in entries_of(option.group):
            if inner.spec.name not in option.leave_out:
                yield Entry((spec.name, *inner.path), inner.spec, inner.option)


def flag_words(entry: Entry, value: Any) -> list[str]:
    """The words of a command line that give ``value``."""
    if isinstance(value, bool):
        return [entry.flag] if value else [entry.off] if entry.off else []
    if isinstance(value, slice):
        value = ":".join("" if end is None else str(end) for end in (value.start, value.stop))
    if not isinstance(value, list | tuple):
        return [entry.flag, str(value)]
    if entry.option.repeated:
        return [word for one in value for word in (entry.flag, str(one))]
    return [entry.flag, ",".join(map(str, value))]


class Flags:
    """The flags of a command, by the names of its parameters.

    A field of an object is known by its own name and as ``object.name``; only as the latter if a parameter of the
    command has the same name.
    """

    def __init__(self, entries: list[Entry]) -> None:
        self._by_name = {entry.spec.name: entry for entry in entries if len(entry.path) > 1}
        self._by_name |= {".".join(entry.path): entry for entry in entries}

    def render(self, text: str) -> str:
        """``text`` with every parameter of this command that is in backticks replaced by its flag."""
        return NAMED.sub(self._rendered, text)

    def _rendered(self, match: re.Match[str]) -> str:
        name, value = match.groups()
        rendered = self._by_name[name].render(value) if name in self._by_name else None
        return match[0] if rendered is None else rendered
