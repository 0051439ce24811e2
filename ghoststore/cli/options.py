"""Commands made from the dataclasses of their options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click

from ghoststore.cli.events import current
from ghoststore.errors import GhostStoreError
from ghoststore.lazy import load
from ghoststore.settings.flags import Entry, Flags, entries_of
from ghoststore.settings.option import Section, choices_of, members_of, options_of, words_of
from ghoststore.settings.shared import Printing, ResultFile

Keywords = dict[str, Any]
"""What a public function is called with."""
MOST_USED = "Most used"
SECTIONS: tuple[str, ...] = get_args(Section)


class Refused(click.ClickException):
    """An error of the library in the words of the command line."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]


class OptionsCommand(click.Command):
    """A command whose help is in sections, and whose errors name flags."""

    def __init__(self, kinds: Sequence[type], sections: dict[str, str], flags: Flags, **settings: Any) -> None:
        super().__init__(**settings)
        self.kinds = kinds
        """The dataclasses of its options; the first is that of the public function."""
        self.sections = sections
        """By the name of the parameter."""
        self.flags = flags

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GhostStoreError as error:
            raise Refused(self.flags.render(str(error)), error.exit_code) from error

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """Those of the group: click keeps the first answer, which may be that of a command asked without its group."""
        return ["-h", "--help"]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section in (MOST_USED, *SECTIONS):
            shown = [one for one in self.get_params(ctx) if self.sections.get(one.name or "", "Output") == section]
            records = [record for one in shown if (record := one.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)


def command(*kinds: type, first: str = "") -> Callable[[Callable[..., None]], OptionsCommand]:
    """Make a command of a function of the keywords for a public function (from the first of ``kinds``), and of an
    object of each other kind, for what the command line alone has.

    ``first`` names the parameters (fields of objects as ``object.name``) that its help shows before all others.
    """

    def decorate(function: Callable[..., None]) -> OptionsCommand:
        entries = [entry for kind in kinds for entry in entries_of(kind)]
        flags = Flags(entries)
        wanted = first.split()
        entries.sort(key=lambda entry: _place(entry, wanted))
        sections = {
            name: MOST_USED if ".".join(entry.path) in wanted else entry.option.section
            for entry in entries
            for name in (_key(entry), f"{_key(entry)}__shortcut")
        }
        parameters = [parameter for entry in entries for parameter in _parameters(entry, flags)]

        def call(**values: Any) -> None:
            keywords, *others = (_take(kind, values) for kind in kinds)
            function(keywords, *(kind(**taken) for kind, taken in zip(kinds[1:], others, strict=True)))

        return OptionsCommand(
            kinds,
            sections,
            flags,
            name=function.__module__.rpartition(".")[2].replace("_", "-"),
            params=parameters,
            callback=call,
            help=inspect.cleandoc(function.__doc__ or ""),
        )

    return decorate


def run(
    name: str,
    keywords: Keywords,
    printing: Printing,
    show: Callable[[Any], None],
    file: ResultFile | None = None,
    also: str | None = None,
) -> Any:
    """Call the public function ``name``; write what it returns to ``file``, or print it: as JSON, or by ``show``.

    ``also`` is the keyword of another file, which the function itself writes: both appear, or neither.
    """
    from ghoststore.cli.terminal import listener, print_json, wrote

    out, other = None if file is None else file.out, keywords.get(also or "")
    function = partial(load(name), progress=listener(printing.quiet))
    if out is None:
        result = function(**keywords)
    else:
        from ghoststore.store.base.new_files import check_new, new_files
        from query.common.output import check_output

        paths = [Path(path) for path in (other, out) if path is not None]
        check_output(out, "out", beside=paths)
        if other is None:
            result = function(**keywords)
            result.write(out)
        else:
            check_new(f"`{also}={other}`", *paths)
            with new_files(*paths) as staged:
                result = function(**{**keywords, str(also): staged[0]})
                result.write(staged[1])
    for path in (out, other):
        if path is not None:
            wrote(path)
    report(result)
    if printing.as_json:
        print_json(result.to_json())
    elif out is None:
        show(result)
    return result


def report(result: Any, event: str = "result") -> None:
    """What a command found, as an event where events are asked for."""
    log = current()
    if log is not None:
        log.result(result.to_json(), event)


def renderer() -> Callable[[str], str]:
    """What turns the parameters in a text into flags of the command that runs; where none runs, leaves it as it is."""
    context = click.get_current_context(silent=True)
    running = None if context is None else context.command
    return running.flags.render if isinstance(running, OptionsCommand) else str


def _key(entry: Entry) -> str:
    return "__".join(entry.path)


def _place(entry: Entry, first: Sequence[str]) -> int:
    name = ".".join(entry.path)
    return first.index(name) if name in first else len(first)


def _take(kind: type, values: dict[str, Any]) -> Keywords:
    """The values of the fields of ``kind`` that are given or have a default, with the objects that they belong to."""
    taken: Keywords = {}
    objects: dict[str, Keywords] = {}
    for entry in entries_of(kind):
        value = values[_key(entry)]
        if entry.option.shortcut and values[f"{_key(entry)}__shortcut"]:
            value = entry.option.shortcut[1]
        if entry.option.repeated and len(value) == 1 and str in members_of(entry.spec.type):
            value = value[0]
        given = value != () if entry.option.repeated else value is not None or entry.option.none is not None
        if given:
            *holder, name = entry.path
            (objects.setdefault(holder[0], {}) if holder else taken)[name] = value
    for spec, option in options_of(kind):
        if spec.name in objects:
            assert option.group is not None
            taken[spec.name] = option.group(**objects[spec.name])
    return taken


def _parameters(entry: Entry, flags: Flags) -> Iterator[click.Option]:
    default = None if entry.spec.default is MISSING or entry.option.repeated else entry.spec.default
    if isinstance(default, tuple):
        default = ",".join(default) or None
    switch = entry.spec.type is bool and entry.off is None
    settings = _reading(entry)
    if default is not None:
        settings["default"] = default
    if entry.option.metavar is not None:
        settings["metavar"] = entry.option.metavar
    yield click.Option(
        [*entry.declarations.split(), _key(entry)],
        help=flags.render(entry.option.help),
        show_default=default is not None and not switch,
        required=entry.spec.default is MISSING or entry.option.required,
        **settings,
    )
    if entry.option.shortcut:
        flag, value = entry.option.shortcut
        key = f"{_key(entry)}__shortcut"
        yield click.Option([flag, key], is_flag=True, help=f"The same as {entry.flag} {value}.")


def _reading(entry: Entry) -> dict[str, Any]:
    """How click reads the values of an option, by its type."""
    kinds, option = members_of(entry.spec.type), entry.option
    words = (*words_of(entry.spec.type), *([option.none] if option.none else []))
    if entry.spec.type is bool:
        return {"is_flag": True}
    if option.repeated:
        return {"type": str, "multiple": True, "callback": _several(option.parse), "metavar": "NAME"}
    if option.parse:
        return {"type": str, "callback": _parsed(option.parse)}
    if choices_of(entry.spec):
        return {"type": click.Choice(choices_of(entry.spec))}
    if int in kinds and words:
        return {"type": str, "callback": _parsed(lambda word: _number(word, words, option.none))}
    if int in kinds or float in kinds:
        return {"type": int if int in kinds else float}
    if str in kinds or Any in kinds:
        return {"type": str, "metavar": "PATH" if Path in kinds else "NAME"}
    return {"type": str, "callback": _parsed(_patterns), "metavar": "PATTERNS"}


Callback = Callable[[click.Context, click.Parameter, Any], Any]


def _parsed(parse: Callable[[str], Any]) -> Callback:
    """The value of a word, None of none; click's error for one that has none."""

    def callback(ctx: click.Context, parameter: click.Parameter, word: str | None) -> Any:
        try:
            return None if word is None else parse(word)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, parameter) from None

    return callback


def _several(parse: Callable[[str], Any] | None) -> Callback:
    read = _parsed(parse or str)
    return lambda ctx, parameter, words: tuple(read(ctx, parameter, word) for word in words)


def _number(word: str, words: Sequence[str], none: str | None) -> int | str | None:
    """A whole number, or one of ``words``; the word ``none`` is None."""
    if word in words:
        return None if word == none else word
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"{word!r} is neither a number nor {' or '.join(words)}") from None


def _patterns(text: str) -> tuple[str, ...]:
    """A comma-separated list of patterns; none is no list, which would stand for all layers."""
    patterns = tuple(piece.strip() for piece in text.split(",") if piece.strip())
    if not patterns:
        raise ValueError(f"{text!r} names no layer; leave the option out for all")
    return patterns
