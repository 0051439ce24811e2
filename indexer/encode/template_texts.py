"""How much a chat template makes: each text is measured before it is there, by what it is made of.

A template makes much of little in few steps: what it adds to itself doubles, a filter fills up to a width, a list that
holds a list twice is printed. So whatever makes a text or a list, an operator, a filter or a method, is estimated from
above where it may be larger than what goes in, and what came out is counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sized
from functools import wraps
from typing import Any

import jinja2

MOST_TEXT = 1 << 28
"""Characters that a template makes for one conversation, in all: of texts in between too, entries of lists as 8."""
LONGEST_REPEAT = 1 << 20
"""Of what `*` makes of a text or a list; of a width or an indentation."""
FILLING = frozenset(
    (
        "batch",
        "center",
        "expandtabs",
        "generate_lorem_ipsum",
        "indent",
        "ljust",
        "rjust",
        "slice",
        "tojson",
        "translate",
        "urlize",
        "wordwrap",
        "xmlattr",
        "zfill",
    )
)
"""Filters and methods whose result may be as large as the product of what goes in."""
_ENTRY = 8
_FORMAT = re.compile(r"%(?:\([^)]*\))?([-+ #0]*[\d.]*)|\{[^{}:]*:([^{}]*)")
"""Places of both kinds, with what may be a width."""
_GIVEN_WIDTH = re.compile(r"%(?:\([^)]*\))?[-+ #0\d.]*\*|\{[^{}]*:[^{}]*\{")
"""A place whose width is one of the values."""


class Room:
    """What a template may still make. To look at what a list holds takes a ``step`` for each entry."""

    def __init__(self, step: Callable[[int], None]) -> None:
        self._left, self._step = MOST_TEXT, step

    def refuse(self, size: int) -> None:
        """jinja2.TemplateError if there is no room for ``size`` characters more."""
        if size > self._left:
            raise jinja2.TemplateRuntimeError(f"it makes more than {MOST_TEXT:,} characters")

    def charged(self, value: Any) -> Any:
        """``value``, which was made."""
        if isinstance(value, Sized):
            size = len(value) * (1 if isinstance(value, str) else _ENTRY)
            self.refuse(size)
            self._left -= size
        return value

    def text(self, value: Any) -> str:
        """In place of ``str``."""
        return value if type(value) is str else str(self._printable(value))

    def joined(self, join: Callable[[Any], str], pieces: Iterable[Any]) -> Any:
        """In place of the functions that join what stands in a row."""
        pieces = list(pieces)
        self._printable(pieces)
        return self.charged(join(pieces))

    def _printable(self, value: Any) -> Any:
        self.refuse(self.size(value))
        return value

    def size(self, value: Any) -> int:
        """Characters of ``value`` as text, about; of what is more than there is room for, more than that."""
        total, pending = 0, [value]
        while pending and total <= self._left:
            one = pending.pop()
            if isinstance(one, str):
                total += len(one)
            elif isinstance(one, Mapping | list | tuple | set | frozenset):
                self._step(len(one))
                total += len(one)
                pending += [*one.keys(), *one.values()] if isinstance(one, Mapping) else one
            else:
                total += 1
        return total

    def added(self, left: Any, right: Any) -> Any:
        """``left`` + ``right``."""
        for one, other in ((left, right), (right, left)):
            if isinstance(one, Sized) and isinstance(other, Sized):
                self.refuse(len(one) + len(other))
        return self.charged(left + right)

    def formatted(self, left: Any, right: Any) -> Any:
        """``left`` % ``right``."""
        if isinstance(left, str):
            self._refuse_format(left, right)
        return self.charged(left % right)

    def _refuse_format(self, form: str, values: Any) -> None:
        widths = [int(digits[:18]) for place in _FORMAT.findall(form) for digits in re.findall(r"\d+", "-".join(place))]
        numbers = values if isinstance(values, list | tuple) else [values]
        given = max(_numbers(numbers), default=0) if _GIVEN_WIDTH.search(form) else 0
        if any(width > LONGEST_REPEAT for width in [*widths, given]):
            raise jinja2.TemplateRuntimeError(f"it fills up to more than {LONGEST_REPEAT:,} characters")
        places = form.count("%") + form.count("{")
        self.refuse(len(form) + sum(widths) + places * (self.size(values) + given))

    def called(self, function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """jinja2.TemplateError if a method of a text, or a global function, would make too much."""
        method = getattr(function, "__wrapped__", function)  # jinja2 wraps those that format
        text = getattr(method, "__self__", None)
        if isinstance(text, str) or getattr(method, "__name__", "") in FILLING:
            subject = text if isinstance(text, str) else ""
            self.refuse_made(getattr(method, "__name__", ""), (subject, *arguments), named)

    def refuse_made(self, name: str, values: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """jinja2.TemplateError if the filter or method ``name`` would make too much of ``values``; the first is what it
        is called on.
        """
        others = (*values[1:], *named.values())
        if name == "replace" and len(values) > 2 and all(isinstance(value, str) for value in values[:3]):
            self.refuse(len(values[0]) + values[0].count(values[1]) * len(values[2]))
        elif name == "join" and len(values) > 1:
            # A filter is called on what it joins, a method on what stands in between.
            count = max(len(value) if isinstance(value, Sized) else 0 for value in values[:2])
            between = max((len(value) for value in values[:2] if isinstance(value, str)), default=0)
            self.refuse(self.size(values) + count * between)
        elif name in ("format", "format_map") and values:
            inner = [value for other in others if isinstance(other, dict) for value in other.values()]
            self._refuse_format(str(values[0]), [*others, *inner])
        elif name == "sum" and any(isinstance(value, Sized) for value in others[-1:]):
            raise jinja2.TemplateRuntimeError("it sums what are no numbers")
        elif name in FILLING:
            if any(number > LONGEST_REPEAT for number in _numbers(others)):
                raise jinja2.TemplateRuntimeError(f"it fills up to more than {LONGEST_REPEAT:,} characters")
            product = max(self.size(values[0]), 1)
            for value in others:
                product *= max(abs(value) if isinstance(value, int) else self.size(value), 1)
            self.refuse(product)
        elif name in ("string", "pprint", "list", "escape", "e", "forceescape", "urlencode"):
            self._printable(values)


def _numbers(values: Iterable[Any]) -> list[int]:
    return [abs(value) for value in values if isinstance(value, int)]


def guarded(name: str, filter_of: Callable[..., Any], room: Callable[[], Room]) -> Callable[..., Any]:
    """The filter ``name``, estimated before and counted after each call in the ``room`` of that time."""
    skipped = 1 if hasattr(filter_of, "jinja_pass_arg") else 0  # the context, say

    @wraps(filter_of)
    def guard(*values: Any, **named: Any) -> Any:
        if name == "join" and len(values) > skipped and not isinstance(values[skipped], str | Mapping):
            values = (*values[:skipped], list(values[skipped]), *values[skipped + 1 :])
        room().refuse_made(name, values[skipped:], named)
        return room().charged(filter_of(*values, **named))

    return guard
