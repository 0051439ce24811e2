"""Tables of ranked samples on stdout. Numbers and ids are always whole; texts are cut to the room there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from ghoststore.cli.terminal import SHORT, Line, stdout_console
from ghoststore.shown import visible

Kind = Literal["number", "id", "text"]
Column = tuple[str, Kind]
"""A heading, and what stands below it: numbers are right-aligned, and only texts are cut."""
GAP = 2
"""Columns of the terminal between two cells."""
LEAST = 24
"""Columns below which the last text gets a line of its own."""


def print_ranking(
    title: str,
    about: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    below: Callable[[int, int | None, bool], Sequence[str]] = lambda place, columns, ascii_only: (),
) -> None:
    """Print ``rows``, each a sample, below ``title`` and the line ``about``; the last column is the text.

    ``below`` gives further lines for the sample at a place: of at most so many columns (None: any), in ASCII or not.

    A sample is one line if the terminal is wide enough. Else its text, then its id, move to a line below it. Columns
    without any text are left out. If stdout is no terminal, each sample is one line, and nothing is cut.
    """
    console = stdout_console()
    shown = [place for place, (_, kind) in enumerate(columns) if kind == "number" or any(row[place] for row in rows)]
    kinds = [columns[place][1] for place in shown]
    cells = [[visible(row[place]) for place in shown] for row in [[heading for heading, _ in columns], *rows]]
    for text, style in ((title, "bold"), (about, "dim")):
        if text:
            console.print(Text(visible(text), style), soft_wrap=not console.is_terminal)
    samples = list(_lines(kinds, cells, console.width if console.is_terminal else None))
    longest = max(cell_len(line) for lines in samples for line in lines)
    _print_lines(console, samples[0], "bold")
    _print_lines(console, [("-" if console.options.ascii_only else "─") * longest])
    indent = " " * (2 * GAP)
    room = console.width - len(indent) if console.is_terminal else None
    for place, lines in enumerate(samples[1:]):
        further = [indent + line for line in below(place, room, console.options.ascii_only)]
        _print_lines(console, [*lines, *further])
    console.print()


def _print_lines(console: Console, lines: Sequence[str], style: str = "") -> None:
    for line in lines:
        console.print(Text(line, style), soft_wrap=True)


def _lines(kinds: Sequence[Kind], rows: Sequence[Sequence[str]], total: int | None) -> Iterator[list[str]]:
    """The lines of each row, none wider than ``total`` unless its numbers are; None for a single line each."""
    whole = [max(cell_len(row[place]) for row in rows) for place in range(len(kinds))]
    last = len(kinds) - 1
    least = [
        size if kind != "text" else min(size, LEAST if place == last else SHORT)
        for place, (kind, size) in enumerate(zip(kinds, whole, strict=True))
    ]
    line, below = _layout(kinds, least, total)
    room = None if total is None else total - GAP * (len(line) - 1)
    widths = _shared([whole[place] for place in line], [least[place] for place in line], room)
    indent = " " * (whole[0] + GAP)
    for row in rows:
        cells = [_cell(row[place], kinds[place], width) for place, width in zip(line, widths, strict=True)]
        lines = [(" " * GAP).join(cells).rstrip()]
        for places in below:
            text = (" " * GAP).join(row[place] for place in places if row[place])
            rest = None if total is None else total - len(indent)
            pieces = _folded(text, rest) if kinds[places[0]] == "id" else [text if rest is None else _cut(text, rest)]
            lines += [indent + piece for piece in pieces if piece]
        yield lines


def _layout(kinds: Sequence[Kind], least: Sequence[int], total: int | None) -> tuple[list[int], list[list[int]]]:
    """(the columns on the line of a sample, the columns on each line below it): the first layout that fits."""
    every = list(range(len(kinds)))
    texts = [place for place in every if kinds[place] == "text"]
    ids = [place for place in every if kinds[place] == "id"]
    layouts: list[list[list[int]]] = [[], [texts[-1:]], [texts], [ids], [ids, texts]]
    for layout in layouts:
        below = [places for places in layout if places]
        line = [place for place in every if not any(place in places for places in below)]
        if total is None or sum(least[place] for place in line) + GAP * (len(line) - 1) <= total:
            break
    return line, below


def _shared(whole: Sequence[int], least: Sequence[int], room: int | None) -> list[int]:
    """The widths of columns that together take ``room`` at most, as far as each can have its ``least``: the widest
    gives way first.
    """
    widths = list(whole)
    while room is not None and sum(widths) > room:
        wider = [(width, place) for place, width in enumerate(widths) if width > least[place]]
        if not wider:
            break
        widths[max(wider)[1]] -= 1
    return widths


def _cell(text: str, kind: Kind, width: int) -> str:
    text = text if kind != "text" else _cut(text, width)
    padding = " " * (width - cell_len(text))
    return padding + text if kind == "number" else text + padding


def _cut(text: str, width: int) -> str:
    return Line(text).within(max(width, 1))


def _folded(text: str, width: int | None) -> list[str]:
    """``text`` in lines of ``width`` columns at most; whole if even a few columns are not there."""
    if width is None or width < SHORT:
        return [text]
    lines = [""]
    for character in text:
        if cell_len(lines[-1] + character) > width:
            lines.append("")
        lines[-1] += character
    return lines
