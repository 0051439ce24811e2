"""Functions that take the fields of a dataclass of options as keywords."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import ParamSpec, TypeVar

from ghoststore.settings.option import check_choices, check_local, check_types, parameters_of

P = ParamSpec("P")
Options = TypeVar("Options")
R = TypeVar("R")


def takes(kind: Callable[P, Options]) -> Callable[[Callable[[Options], R]], Callable[P, R]]:
    """Decorator: a function of one options object takes their fields as keywords. ``f(seed=1)`` calls
    ``f(kind(seed=1))``.

    Type checkers see the keywords of ``kind``, and `help` shows their names, types and defaults. TypeError for an
    unknown keyword, with the most similar one, and for a missing one; UsageError for a value of another type, or that
    is not one of the choices. A string in the place of a list of strings is a list of one.
    """

    def decorate(function: Callable[[Options], R]) -> Callable[P, R]:
        assert isinstance(kind, type)
        signature = inspect.Signature(
            parameters_of(kind), return_annotation=inspect.signature(function).return_annotation
        )
        refuse: Callable[[Iterable[str]], None] = getattr(kind, "refuse_together", lambda names: None)

        @wraps(function)
        def call(*args: P.args, **keywords: P.kwargs) -> R:
            refuse_unknown(function.__name__, keywords, signature.parameters)
            try:
                values = signature.bind(*args, **keywords).arguments
            except TypeError as error:
                raise TypeError(f"{function.__name__}(): {error}") from None
            for name, value in values.items():
                if isinstance(value, str) and signature.parameters[name].annotation == Sequence[str]:
                    values[name] = (value,)
            check_types(kind, values)
            refuse(values)
            options: Options = kind(**values)
            check_choices(options)
            check_local(options)
            return function(options)

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.options = kind  # type: ignore[attr-defined]
        return call

    return decorate


def refuse_unknown(function: str, names: Iterable[str], known: Iterable[str]) -> None:
    """TypeError for a name that is not in ``known``, with the most similar one that is."""
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 1, 0.0)
            raise TypeError(f"{function}() has no keyword {name!r}; the nearest is {near[0]!r}")


def part_of(kind: type[R], options: object) -> R:
    """An object of class ``kind`` that takes its fields from those of ``options`` with the same names."""
    names = [parameter.name for parameter in parameters_of(kind) if hasattr(options, parameter.name)]
    return kind(**{name: getattr(options, name) for name in names})
