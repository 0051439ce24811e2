"""Makes commands from the dataclasses of their options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from ghoststore.cli.early import refuse_early
from ghoststore.cli.events import current
from ghoststore.errors import GhostStoreError
from ghoststore.lazy import load
from ghoststore.settings.flags import Entry, Flags, entries_of
from ghoststore.settings.option import Section, choices_of, members_of, options_of, words_of
from ghoststore.settings.shared import Printing, ResultFile

Keywords = dict[str, Any]
"""The keyword arguments of a public function."""
MOST_USED = "Most used"
NOT_GIVEN = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
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
        """The dataclasses of its options, that of the public function first."""
        self.sections = sections
        """The section of each parameter, by name."""
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
            parameters = [
                parameter
                for parameter in self.get_params(ctx)
                if self.sections.get(parameter.name or "", "Output") == section
            ]
            records = [record for parameter in parameters if (record := parameter.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)


def command(*kinds: type, first: str = "", only_given: bool = False) -> Callable[[Callable[..., None]], OptionsCommand]:
    """Make a command of a function.

    The function takes the keywords of a public function, from the first of ``kinds``, and an object of each other kind:
    the options that only the command line has. ``first`` names the parameters that the help shows before all others;
    a field of an object is named ``object.name``. With ``only_given`` the keywords are those that the user gave: the
    defaults of the others, which the public function has, too, may then depend on these.
    """

    def decorate(function: Callable[..., None]) -> OptionsCommand:
        entries = [entry for kind in kinds for entry in entries_of(kind)]
        flags = Flags(entries)
        most_used = first.split()
        entries.sort(key=lambda entry: _position(entry, most_used))
        sections = {
            name: MOST_USED if ".".join(entry.path) in most_used else entry.option.section
            for entry in entries
            for name in (_key(entry), f"{_key(entry)}__shortcut")
        }
        parameters = [parameter for entry in entries for parameter in _parameters(entry, flags)]

        def call(**values: Any) -> None:
            if only_given:
                source_of = click.get_current_context().get_parameter_source
                values = {name: value for name, value in values.items() if source_of(name) not in NOT_GIVEN}
            keywords, *rest = (_keywords_of(kind, values) for kind in kinds)
            function(keywords, *(kind(**fields) for kind, fields in zip(kinds[1:], rest, strict=True)))

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
    """Call the public function ``name`` and write its result to ``file``, or print it as JSON or by ``show``.

    ``also`` is the keyword of another file, which the function itself writes. Both files appear, or neither.
    """
    from ghoststore.cli.terminal import listener, print_json, wrote

    out, other = None if file is None else file.out, keywords.get(also or "")
    progress = listener(printing.quiet)
    asked = click.get_current_context().command
    assert isinstance(asked, OptionsCommand)
    refuse_early(name, asked.kinds[0], keywords, progress)
    function = partial(load(name), progress=progress)
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
    log_result(result)
    if printing.as_json:
        print_json(result.to_json())
    elif out is None:
        show(result)
    return result


def log_result(result: Any, event: str = "result") -> None:
    """Write the result of a command as an event, with ``--log-json``."""
    log = current()
    if log is not None:
        log.result(result.to_json(), event)


def renderer() -> Callable[[str], str]:
    """A function that replaces the parameters in a text by flags of the running command, if there is one."""
    context = click.get_current_context(silent=True)
    running = None if context is None else context.command
    return running.flags.render if isinstance(running, OptionsCommand) else str


def _key(entry: Entry) -> str:
    return "__".join(entry.path)


def _position(entry: Entry, first: Sequence[str]) -> int:
    name = ".".join(entry.path)
    return first.index(name) if name in first else len(first)


def _keywords_of(kind: type, values: dict[str, Any]) -> Keywords:
    """The fields of ``kind`` that have a value in ``values``, with the objects that they belong to."""
    keywords: Keywords = {}
    objects: dict[str, Keywords] = {}
    for entry in entries_of(kind):
        key = _key(entry)
        shortcut = entry.option.shortcut if values.get(f"{key}__shortcut") else None
        if key not in values and shortcut is None:
            continue
        value = values[key] if shortcut is None else shortcut[1]
        if entry.option.repeated and len(value) == 1 and str in members_of(entry.spec.type):
            value = value[0]
        elif entry.option.repeated and Path in members_of(entry.spec.type):
            value = tuple(map(Path, value))  # several strings would be texts
        has_value = value != () if entry.option.repeated else value is not None or entry.option.none is not None
        if has_value:
            *holder, name = entry.path
            (objects.setdefault(holder[0], {}) if holder else keywords)[name] = value
    for spec, option in options_of(kind):
        if spec.name in objects:
            assert option.group is not None
            keywords[spec.name] = option.group(**objects[spec.name])
    return keywords


def _parameters(entry: Entry, flags: Flags) -> Iterator[click.Option]:
    default = None if entry.spec.default in (MISSING, "") or entry.option.repeated else entry.spec.default
    if isinstance(default, tuple):
        default = ",".join(default) or None
    elif default is not None and entry.option.shown is not None:
        default = entry.option.shown(default)
    switch = entry.is_bool and entry.off is None
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
    """The arguments of click.Option by which it reads a value of the field's type."""
    kinds, option = members_of(entry.spec.type), entry.option
    words = (*words_of(entry.spec.type), *([option.none] if option.none else []))
    if entry.is_bool:
        return {"is_flag": True, "default": entry.spec.default}
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
    if entry.spec.name == "part":  # other commands take several, and click would take the last
        return {"type": str, "multiple": True, "callback": _only, "metavar": "NAME"}
    if str in kinds or Any in kinds:
        return {"type": str, "metavar": "PATH" if Path in kinds else "NAME"}
    return {"type": str, "callback": _parsed(_patterns), "metavar": "PATTERNS"}


Callback = Callable[[click.Context, click.Parameter, Any], Any]


def _parsed(parse: Callable[[str], Any]) -> Callback:
    """Parse a word, with click's error for one that ``parse`` refuses."""

    def callback(ctx: click.Context, parameter: click.Parameter, word: str | None) -> Any:
        try:
            return None if word is None else parse(word)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, parameter) from None

    return callback


def _several(parse: Callable[[str], Any] | None) -> Callback:
    read = _parsed(parse or str)
    return lambda ctx, parameter, words: tuple(read(ctx, parameter, word) for word in words)


def _only(ctx: click.Context, parameter: click.Parameter, words: Sequence[str]) -> str | None:
    """The value of an option that may be given once."""
    if len(words) > 1:
        raise click.BadParameter(f"{', '.join(words)}: this command takes one", ctx, parameter)
    return words[0] if words else None


def _number(word: str, words: Sequence[str], none: str | None) -> int | str | None:
    """Parse a whole number, or one of ``words``; the word ``none`` stands for None."""
    if word in words:
        return None if word == none else word
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"{word!r} is neither a number nor {' or '.join(words)}") from None


def _patterns(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list of patterns. An empty list is refused: it would stand for all layers."""
    patterns = tuple(piece.strip() for piece in text.split(",") if piece.strip())
    if not patterns:
        raise ValueError(f"{text!r} names no layer; leave the option out for all")
    return patterns
