"""What an option is: a field of a dataclass, with its help, its section and its words on the command line.

Help names other options by their parameter, in backticks; the command line shows these as its flags.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from math import inf
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, dataclass_transform, get_args, get_origin

from ghoststore.errors import UsageError

T = TypeVar("T")
Section = Literal["Input", "Model", "Projection", "Scoring", "Choosing", "Output", "Advanced"]
KEY = "option"


class Option(NamedTuple):
    """What is said of a field beside its name, type and default."""

    help: str
    section: Section
    flag: str | None = None
    """Where it is not the field's name: ``--seed``, or ``--each/--mean`` for True and False."""
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    """Where the type is not a Literal."""
    parse: Callable[[str], Any] | None = None
    """The value of a word; ValueError if it has none."""
    repeated: bool = False
    """Whether each value has a flag of its own; else several are a list with commas."""
    none: str | None = None
    """The word for None."""
    required: bool = False
    """On the command line; a field without a default is required anyway."""
    python_only: bool = False
    """No option of the command line."""
    group: type | None = None
    """The field is an object: its options are those of this dataclass …"""
    leave_out: tuple[str, ...] = ()
    """… but for these."""
    shortcut: tuple[str, str] | None = None
    """A flag of its own for one of the values."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def options(kind: type[T]) -> type[T]:
    """A dataclass of options: frozen, keywords only.

    Its methods are not generated one by one, as `dataclass` does it: ``--help`` waits for a dozen of these classes.
    """
    made = dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)(kind)
    made.__init__ = _init  # type: ignore[method-assign]
    return made


def _init(self: Any, **values: Any) -> None:
    vars(self).update(values)  # defaults are attributes of the class
    if hasattr(self, "__post_init__"):
        self.__post_init__()


def about(help: str, section: Section, **words: Any) -> Mapping[str, Option]:
    """The metadata of a field without a default."""
    return {KEY: Option(help, section, **words)}


def option(default: T, help: str, section: Section, **words: Any) -> T:
    """A field with a default. ``words`` are those of an :class:`Option`."""
    made: T = field(default=default, metadata=about(help, section, **words))
    return made


def options_of(kind: type) -> Iterator[tuple[Field[Any], Option]]:
    """Every field of a dataclass that is an option, with what is said of it."""
    for spec in fields(kind):
        if KEY in spec.metadata:
            yield spec, spec.metadata[KEY]


def members_of(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the one that it is, None aside."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(one for one in kinds if one is not type(None))


def words_of(kind: Any) -> tuple[str, ...]:
    """The words that a type allows, alone or beside other types."""
    return tuple(word for one in members_of(kind) if get_origin(one) is Literal for word in get_args(one))


def choices_of(spec: Field[Any]) -> tuple[str, ...]:
    """The words that are all that an option takes (None aside); () for any other option."""
    said: Option = spec.metadata[KEY]
    return said.choices or (words_of(spec.type) if len(members_of(spec.type)) == 1 else ())


def check_choices(options: Any) -> None:
    """UsageError for a value that is none of its option's choices."""
    for spec, _ in options_of(type(options)):
        known, value = choices_of(spec), getattr(options, spec.name)
        if known and isinstance(value, str) and value not in known:
            raise UsageError(f"`{spec.name}` {value!r} is unknown; known: {', '.join(known)}")


_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""How an address begins; a Path has lost the second slash."""


def refuse_remote(name: str, value: Any) -> None:
    """UsageError for a ``value`` that is an address (s3://, gs://, https://, …): it would become a local folder."""
    if isinstance(value, str | Path) and _REMOTE.match(str(value)):
        raise UsageError(
            f"`{name}={value}` is no local path: stores, corpora, checkpoints and results live in local folders and "
            "files so far. Give a path, of a mounted bucket for instance"
        )


def check_local(options: Any) -> None:
    """UsageError for an address where a path is expected."""
    for spec, said in options_of(type(options)):
        value = getattr(options, spec.name)
        if said.group is not None and isinstance(value, said.group):
            check_local(value)
        elif Path in members_of(spec.type):
            refuse_remote(spec.name, value)


def check_at_least(least: float, **values: float | None) -> None:
    """UsageError for a value below ``least``, infinite or NaN; None is not given."""
    for name, value in values.items():
        if value is not None and not least <= value < inf:
            raise UsageError(f"`{name}` must be at least {least}, not {value}")


def parameters_of(kind: type) -> list[inspect.Parameter]:
    """The parameters of a function that takes the fields of ``kind``: required ones first, ``progress`` last."""
    parameters = []
    for spec in fields(kind):
        default = inspect.Parameter.empty if spec.default is MISSING else spec.default
        way = inspect.Parameter.KEYWORD_ONLY if spec.kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(inspect.Parameter(spec.name, way, default=default, annotation=spec.type))
    return sorted(parameters, key=lambda one: (one.kind, one.default is not one.empty, one.name == "progress"))
