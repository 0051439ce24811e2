"""Output for people: progress bars and notes on stderr, tables on stdout.

All text from a corpus, a store or an argument goes through `visible`, so that it cannot control the terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import click
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.table import Column, Table
from rich.text import Text

from ghoststore.cli.events import EventLog, current
from ghoststore.cli.options import renderer
from ghoststore.progress import BYTES, Silent, Task
from ghoststore.shown import clipped, json_text, visible

WIDE = 240
"""Columns of a line of progress if stderr is no terminal."""
UNFOLDED = 100_000
"""Columns if stdout is no terminal: what reads it has no width, and each row is one line."""
PREVIEW = 90
"""Characters of a text in a table."""
BAR = 24
"""Columns of a progress bar."""
SHORT = 10
"""Columns below which text that is cut has no meaning."""


class Line:
    """Text in one line, safe to show. It is cut with "…" to the columns there are, but never within an escape."""

    def __init__(self, text: str, style: str = "") -> None:
        self._text, self._style = visible(text), style

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(1, self.width), self.width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(self.within(options.max_width), self._style, no_wrap=True, overflow="crop")

    @property
    def width(self) -> int:
        """Columns of the whole text."""
        return cell_len(self._text)

    def within(self, width: int) -> str:
        """The text, cut to ``width`` columns."""
        if self.width <= width:
            return self._text
        return clipped(self._text, len(set_cell_size(self._text, max(width - 1, 0)).rstrip())) + "…"


class _OneLine(ProgressColumn):
    """A task in one line of the terminal. The count is always shown, the rest if there is room."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._count, self._bytes = MofNCompleteColumn(), DownloadColumn(binary_units=True)
        self._bar, self._remaining = BarColumn(bar_width=BAR), TimeRemainingColumn()

    def render(self, task: RichTask) -> Table:
        count = (self._bytes if task.fields["unit"] == BYTES else self._count).render(task)
        remaining, rates = self._remaining.render(task), _rates(task)
        words = Line(task.fields["words"])
        left = self._console.width - count.cell_len
        description = Line(task.description).within(max(left - 1, 0))
        left -= cell_len(description) + 1
        cells: dict[str, Any] = {"description": Text(description), "count": count}
        if remaining.cell_len < left:
            cells["remaining"] = remaining
            left -= remaining.cell_len + 1
        if 0 < min(words.width, SHORT) < left:
            cells["words"] = Text(words.within(left - 1))
            left -= cells["words"].cell_len + 1
        if rates and cell_len(rates) < left:
            cells["rates"] = Text(rates, style="progress.data.speed")
            left -= cell_len(rates) + 1
        if left > BAR:
            cells["bar"] = self._bar.render(task)
        order = [name for name in ("description", "bar", "count", "rates", "remaining", "words") if name in cells]
        grid = Table.grid(*(Column(no_wrap=True) for _ in order), padding=(0, 1))
        grid.add_row(*(cells[name] for name in order))
        return grid


def duration(seconds: float | None) -> str:
    """``seconds`` in the largest unit that fits."""
    if seconds is None:
        return "–"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if size > 60 else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def pace(seconds: float, unit: str) -> str:
    """``seconds`` a step as steps a second or, below one, as seconds a step. ``unit`` is the plural."""
    if seconds > 1:
        return f"{seconds:,.{0 if seconds >= 100 else 1}f} s/{unit.removesuffix('s')}"
    return f"{1 / seconds:,.{0 if seconds <= 0.1 else 1}f} {unit}/s"


def _rates(task: RichTask) -> str:
    """Rows and tokens a second since the task began."""
    elapsed = task.finished_time if task.finished_time is not None else task.elapsed
    if not elapsed or elapsed < 0.05:
        return ""
    rows = (task.completed - task.fields["started_at"]) / elapsed
    if not rows:
        return ""
    text = f"{human_bytes(round(rows))}/s" if task.fields["unit"] == BYTES else pace(1 / rows, task.fields["unit"])
    if task.fields["tokens"]:
        text += f", {task.fields['tokens'] / elapsed:,.0f} tokens/s"
    return text


class _BarTask:
    def __init__(self, progress: Progress, description: str, total: int | None, done: int, unit: str) -> None:
        self._progress = progress
        self._id = progress.add_task(
            description, total=total, completed=done, tokens=0, started_at=done, unit=unit, words=""
        )
        progress.start()

    def advance(self, rows: int, tokens: int = 0) -> None:
        fields = self._progress.tasks[self._progress.task_ids.index(self._id)].fields
        self._progress.update(self._id, advance=rows, tokens=fields["tokens"] + tokens)

    def expect(self, seconds: float, besides: str) -> None:
        description = self._progress.tasks[self._progress.task_ids.index(self._id)].description
        self._progress.console.print(
            f"{description}: about {duration(seconds)}, {besides} aside", markup=False, highlight=False, soft_wrap=True
        )

    def say(self, text: str) -> None:
        self._progress.update(self._id, words=text)

    def close(self) -> None:
        task = self._progress.tasks[self._progress.task_ids.index(self._id)]
        if task.total is None:
            self._progress.update(self._id, total=task.completed)
        self._progress.stop_task(self._id)
        self._progress.stop()


class Bars:
    """Progress bars on stderr. If that is no terminal, one line for each finished task."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self.console = console if console.is_terminal else Console(stderr=True, width=WIDE)
        self._render = renderer()
        self._said: set[str] = set()

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Task:
        return _BarTask(Progress(_OneLine(self.console), console=self.console), description, total, done, unit)

    def note(self, message: str) -> None:
        message = visible(self._render(message), lines=True)
        if message not in self._said:  # a command may open one val set several times
            self._said.add(message)
            text = folded(f"note: {message}", self.console)
            self.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


class Notes(Silent):
    """Shows notes, but no bars."""

    def __init__(self) -> None:
        self._render = renderer()
        self._said: set[str] = set()

    def note(self, message: str) -> None:
        message = self._render(message)
        if message not in self._said:
            self._said.add(message)
            notify(f"note: {message}")


def listener(quiet: bool) -> Bars | Notes | EventLog:
    """The listener of progress for a command."""
    return current() or (Notes() if quiet else Bars())


def say(text: str = "") -> None:
    """Write lines of data to stdout; on a terminal, those that are wider are folded between words."""
    # Not by click, which writes UTF-8 even if stdout is ASCII.
    sys.stdout.write(folded(visible(text, lines=True), Console()) + "\n")
    sys.stdout.flush()


def folded(text: str, console: Console) -> str:
    """``text``, its lines folded between words to the columns of ``console``, if that is a terminal. A longer word,
    such as a path, stays whole, so that it can be copied.
    """
    if not console.is_terminal:
        return text
    lines: list[str] = []
    for line in text.split("\n"):
        first, *words = line.split(" ")
        lines.append(first)
        for word in words:
            if cell_len(lines[-1]) + 1 + cell_len(word) <= console.width or not lines[-1].strip():
                lines[-1] += f" {word}"
            else:
                lines.append(word)
    return "\n".join(lines)


def notify(text: str) -> None:
    """Write a remark to stderr; with ``--log-json`` as an event."""
    log = current()
    if log is None:
        click.echo(visible(text, lines=True), err=True)
    else:
        log.say("note", message=text)


def wrote(path: Any) -> None:
    """Say which file was written."""
    log = current()
    if log is None:
        notify(f"wrote {path}")
    else:
        log.say("wrote", path=str(path))


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json_text(value, indent=1, encoding=sys.stdout.encoding or "utf-8") + "\n")
    sys.stdout.flush()


def print_table(title: str, columns: list[tuple[str, bool]], rows: list[list[str]]) -> None:
    """Print a table on stdout; ``columns`` are (heading, right-aligned).

    Long cells are folded, and headings between words, but no number: if there is no room for these, each row is a list
    of its cells below the title. If stdout is no terminal, nothing is folded.
    """
    console = stdout_console()
    columns = [(visible(heading), right) for heading, right in columns]
    rows = [[visible(cell) for cell in row] for row in rows]
    fitting = _widths(columns, rows, console.width)
    if fitting is None:
        console.print(Text(visible(title), style="bold"))
        for row in rows:
            print_facts("", [(heading, cell) for (heading, _), cell in zip(columns, row, strict=True)])
            console.print()
        return
    widths, tight = fitting
    table = Table(title=Text(visible(title), style="bold"), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    if tight:
        table.padding, table.show_edge = 0, False
    for (heading, right), width in zip(columns, widths, strict=True):
        align: Literal["right", "left"] = "right" if right else "left"
        table.add_column(Text(heading), justify=align, overflow="fold", width=width)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _widths(columns: list[tuple[str, bool]], rows: list[list[str]], total: int) -> tuple[list[int | None], bool] | None:
    """Widths of a table's columns on a terminal of ``total`` columns, and whether they only fit without padding; None
    if numbers would have to be folded: each line of a folded number would read as a number.

    A width of None stands for a column at its full width.
    """
    texts = [[heading, *(row[index] for row in rows)] for index, (heading, _) in enumerate(columns)]
    whole = [max(map(cell_len, column)) for column in texts]
    words = [max((cell_len(word) for text in column for word in text.split()), default=1) for column in texts]
    least = [size if right else min(size, SHORT) for size, (_, right) in zip(words, columns, strict=True)]
    rooms = ((total - 2 - 3 * len(columns), False), (total - len(columns), True))
    for wanted in (whole, least):  # without padding, rather than with folded cells
        for room, tight in rooms:
            if sum(wanted) <= room:
                return _narrowed(whole, least, room), tight
    return None


def _narrowed(whole: list[int], least: list[int], total: int) -> list[int | None]:
    """Narrow the ``whole`` widths to a sum of ``total``: the widest first, none below its ``least``.

    None stands for a column at its full width.
    """
    widths = list(whole)
    for _ in range(sum(whole) - total):
        width, index = max(
            ((widths[index], index) for index, size in enumerate(least) if widths[index] > size), default=(0, 0)
        )
        if not width:
            break
        widths[index] -= 1
    return [width if width < full else None for width, full in zip(widths, whole, strict=True)]


def print_facts(title: str, facts: list[tuple[str, str]]) -> None:
    """Print names and values on stdout, one pair a line."""
    table = Table(
        title=Text(visible(title), style="bold"),
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=False,
        pad_edge=False,
    )
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(visible(name)), Text(visible(value, lines=True)))
    stdout_console().print(table)


def print_next(commands: Sequence[str]) -> None:
    """Print what one may do next, a command a line. No line is folded: a command that is pasted is one line."""
    console = stdout_console()
    for line, style in (("next", "dim"), *((f"  {visible(command)}", "") for command in commands)):
        console.print(Text(line, style), soft_wrap=True)


def preview(text: str | None, length: int = PREVIEW) -> str:
    """``text`` in one line, cut to ``length`` characters, safe to show."""
    flat = visible(" ".join((text or "").split()))
    return flat if len(flat) <= length else f"{clipped(flat, length - 1)}…"


def stdout_console() -> Console:
    """The console of stdout; if that is no terminal, nothing is too wide for it."""
    console = Console()
    return console if console.is_terminal else Console(width=UNFOLDED)


def human_bytes(count: int) -> str:
    """``count`` in binary units, three digits."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if unit != "B" else f"{count} B"
        size /= 1024
    return f"{size:,.1f} TiB"
