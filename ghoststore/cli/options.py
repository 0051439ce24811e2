"""Options that several commands share, with the same names wherever they mean the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def patterns(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """A comma-separated list of patterns."""
    return tuple(piece.strip() for piece in (value or "").split(",") if piece.strip())


def number_or(*words: str) -> Callable[[click.Context, click.Parameter, str | None], int | str | None]:
    """A whole number, or one of ``words``."""

    def parse(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
        if value is None or value in words:
            return value
        try:
            return int(value)
        except ValueError:
            raise click.BadParameter(
                f"{value!r} is neither a number nor {' or '.join(words)}", ctx, parameter
            ) from None

    return parse


def fields(command: F) -> F:
    """``--text-field`` and its kin: how rows of a corpus are read."""
    for option, what in (
        ("domain", "Field with the domain (default: 'domain' where rows have it)."),
        ("id", "Field with the id (default: 'id' where rows have it, else the row number)."),
        ("messages", "Field with chat messages, which go through the tokenizer's chat template."),
        ("completion", "Field with the completion: the only targets of a row with a prompt."),
        ("prompt", "Field with the prompt, which is no target."),
        ("text", "Field with the text (default: 'text', else prompt and completion, else messages)."),
    ):
        command = click.option(f"--{option}-field", metavar="NAME", help=what)(command)
    return command


def take_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the field options in ``values`` by one ``fields`` entry."""
    from ghoststore.corpus import Fields

    names = ("text", "prompt", "completion", "messages", "id", "domain")
    values["fields"] = Fields(**{name: values.pop(f"{name}_field") for name in names})
    return values


def common(command: F) -> F:
    """``--json`` and ``--quiet``."""
    command = click.option("--quiet", "-q", is_flag=True, help="No progress bars; errors and notes only.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")(command)


store = click.option("--store", required=True, metavar="PATH", help="The store: a directory.")
device = click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N, or auto.")
