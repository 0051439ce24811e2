"""An option is a field of a dataclass, with a help text, a section, and its form on the command line.

Help texts name other options by their parameter, in backticks; the command line shows these as its flags.
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from math import inf
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, dataclass_transform, get_args, get_origin

from ghoststore.errors import UsageError

T = TypeVar("T")
Section = Literal["Input", "Model", "Projection", "Scoring", "Choosing", "Output", "Advanced"]
KEY = "option"


class Option(NamedTuple):
    """What a field has as an option, beside its name, type and default."""

    help: str
    section: Section
    flag: str | None = None
    """The flag, if it is not made of the field's name: ``--seed``, or ``--each/--mean`` for True and False."""
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    """The allowed words, if the type is not a Literal."""
    parse: Callable[[str], Any] | None = None
    """Function from a word of the command line to the value; ValueError for a wrong word."""
    shown: Callable[[Any], str] | None = None
    """Function from the default to the word that the help shows, which ``parse`` reads."""
    repeated: bool = False
    """Whether each value has a flag of its own; otherwise several values are one list with commas."""
    none: str | None = None
    """The word for None on the command line."""
    required: bool = False
    """Whether the command line requires it. A field without a default is always required."""
    python_only: bool = False
    """Whether the command line lacks this option."""
    group: type | None = None
    """If the field is an object: the dataclass whose options become options of the command …"""
    leave_out: tuple[str, ...] = ()
    """… and the names of those that do not."""
    shortcut: tuple[str, str] | None = None
    """(flag, value): one more flag, which stands for one of the values."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def options(kind: type[T]) -> type[T]:
    """Class decorator: a dataclass of options, frozen, with keyword parameters only.

    `dataclass` would generate code for the methods of each class. That is left out, because ``--help`` loads a dozen of
    these classes and should be fast.
    """
    options_class = dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)(kind)
    options_class.__init__ = _init  # type: ignore[method-assign]
    return options_class


def _init(self: Any, **values: Any) -> None:
    vars(self).update(values)  # values not given are the defaults, which are attributes of the class
    if hasattr(self, "__post_init__"):
        self.__post_init__()


def about(help: str, section: Section, **words: Any) -> Mapping[str, Option]:
    """The metadata of an option without a default, for `dataclasses.field`. ``words`` are fields of :class:`Option`."""
    return {KEY: Option(help, section, **words)}


def option(default: T, help: str, section: Section, **words: Any) -> T:
    """A field that is an option with a default. ``words`` are fields of :class:`Option`."""
    spec: T = field(default=default, metadata=about(help, section, **words))
    return spec


def options_of(kind: type) -> Iterator[tuple[Field[Any], Option]]:
    """(field, its :class:`Option`) for every field of a dataclass that is an option."""
    for spec in fields(kind):
        if KEY in spec.metadata:
            yield spec, spec.metadata[KEY]


def members_of(kind: Any) -> tuple[Any, ...]:
    """The types in a union, without None; or ``kind`` itself if it is not a union."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(member for member in kinds if member is not type(None))


def words_of(kind: Any) -> tuple[str, ...]:
    """The words of the Literals in a type, which may allow other values, too."""
    literals = (member for member in members_of(kind) if get_origin(member) is Literal)
    return tuple(word for literal in literals for word in get_args(literal))


def choices_of(spec: Field[Any]) -> tuple[str, ...]:
    """The words of an option that accepts nothing but these words (and None); () for any other option."""
    option: Option = spec.metadata[KEY]
    return option.choices or (words_of(spec.type) if len(members_of(spec.type)) == 1 else ())


def check_choices(options: Any) -> None:
    """UsageError for a value that is not one of the choices of its option."""
    for spec, _ in options_of(type(options)):
        choices, value = choices_of(spec), getattr(options, spec.name)
        if choices and isinstance(value, str) and value not in choices:
            raise UsageError(f"`{spec.name}` {value!r} is unknown; known: {', '.join(choices)}")


_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((Integral,), "a whole number"),
    float: ((Real,), "a number"),
    str: ((str,), "a word"),
    Path: ((PathLike,), "a path"),
    slice: ((slice,), "a slice"),
}
"""By type of an option, the classes of its values (numpy's numbers are among them), and its name in a message."""
_WORDS = (Sequence[str], tuple[str, ...])


def _fits(value: Any, member: Any) -> bool:
    if member in _WORDS:
        return isinstance(value, Collection) and not isinstance(value, str) and all(isinstance(x, str) for x in value)
    if get_origin(member) is Literal:
        return isinstance(value, str)  # check_choices tells which
    is_bool = type(value).__name__ in ("bool", "bool_")  # numpy's, too
    return is_bool if member is bool else isinstance(value, _KINDS[member][0]) and not is_bool


def _called(member: Any) -> str:
    if member in _WORDS:
        return "a list of words"
    return "a word" if get_origin(member) is Literal else _KINDS[member][1]


def check_types(kind: type, values: Mapping[str, Any], within: str = "") -> None:
    """UsageError for a value of another type than that of its field in ``kind``. Fields of other types than words,
    numbers, paths and lists of words are not looked at. ``within`` begins their names in messages.
    """
    for spec in fields(kind):
        members, value = members_of(spec.type), values.get(spec.name)
        known = all(member in _KINDS or member in _WORDS or get_origin(member) is Literal for member in members)
        if spec.name not in values or not known or value is spec.default or any(_fits(value, m) for m in members):
            continue
        if value is None and type(None) in get_args(spec.type):
            continue
        if spec.name == "checkpoint" and hasattr(value, "save_pretrained"):
            continue  # a loaded model: where only a folder is taken, the function says why
        named = " or ".join(dict.fromkeys(map(_called, members)))
        advice = "; leave it out for the default" if value is None and spec.default is not MISSING else ""
        raise UsageError(f"`{within}{spec.name}` is {named}, not {value!r:.80}{advice}")


def check_own_types(options: Any, within: str = "") -> None:
    """UsageError for a value of ``options`` of another type than that of its field; see :func:`check_types`."""
    check_types(type(options), {spec.name: getattr(options, spec.name) for spec in fields(options)}, within)


_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""The beginning of an address. There is only one slash, because a Path drops the second."""


_OBJECTS = re.compile(r"(s3|gs|az):/")
STORES = ("store", "to_store")
"""The options whose value is a store."""
READ = ("data", "val_set", "minus", "checkpoint", "base", "tokenizer")
"""The options whose value is read from, and may be in object storage, too."""
FORMS_OF_ADDRESS = "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"


def in_objects(value: object) -> bool:
    """Whether ``value`` is an address in object storage."""
    return isinstance(value, str | Path) and _OBJECTS.match(str(value)) is not None


def refuse_remote(name: str, value: Any) -> None:
    """UsageError for an address (s3://, gs://, https://, …), which would be taken for a local folder.

    A store may be in object storage, and so may what is read.
    """
    if not isinstance(value, str | Path) or not _REMOTE.match(str(value)):
        return
    if name in (*STORES, *READ) and in_objects(value):
        return
    if set("@?") & set(str(value)):  # which may be of credentials
        value = f"{str(value).partition(':')[0]}://…"
    if name in STORES:
        raise UsageError(f"`{name}={value}` is no place for a store: a store is a local folder, or {FORMS_OF_ADDRESS}")
    if name in READ:
        raise UsageError(
            f"`{name}={value}` cannot be read: give a local path, a name of the hub, or {FORMS_OF_ADDRESS}"
        )
    raise UsageError(
        f"`{name}={value}` is no local path: results are written to local folders and files; only stores, corpora, "
        "val sets, checkpoints and tokenizers may be in object storage. Give a local path"
    )


def check_local(options: Any) -> None:
    """UsageError for an address where a path is expected."""
    for spec, option in options_of(type(options)):
        value = getattr(options, spec.name)
        if option.group is not None and isinstance(value, option.group):
            check_local(value)
        elif Path in members_of(spec.type):
            refuse_remote(spec.name, value)


def given(options: Any, names: Iterable[str]) -> Iterator[str]:
    """Those of ``names`` whose value in ``options`` is not the default, as messages name them: `` `tokens` ``, or with
    the word where there is a choice, `` `index=ann` ``.
    """
    specs = {spec.name: spec for spec in fields(options)}
    for name in names:
        spec, value = specs[name], getattr(options, name)
        option: Option | None = spec.metadata.get(KEY)
        group = None if option is None else option.group
        if value is None or (spec.default is not None and value == spec.default) or (group and value == group()):
            continue
        yield f"`{name}={value}`" if option is not None and choices_of(spec) else f"`{name}`"


def check_at_least(least: float, **values: float | None) -> None:
    """UsageError for a value that is below ``least``, infinite or NaN. None is allowed: it means not given."""
    for name, value in values.items():
        if value is not None and not least <= value < inf:
            raise UsageError(f"`{name}` must be at least {least}, not {value}")


def parameters_of(kind: type) -> list[inspect.Parameter]:
    """The parameters of a function that takes the fields of ``kind`` as keywords: required ones first, ``progress``
    last.
    """
    parameters = []
    for spec in fields(kind):
        default = inspect.Parameter.empty if spec.default is MISSING else spec.default
        way = inspect.Parameter.KEYWORD_ONLY if spec.kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(inspect.Parameter(spec.name, way, default=default, annotation=spec.type))
    return sorted(
        parameters,
        key=lambda parameter: (parameter.kind, parameter.default is not parameter.empty, parameter.name == "progress"),
    )
