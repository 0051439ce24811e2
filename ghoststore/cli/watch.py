"""``ghoststore watch``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ghoststore.cli import options
from ghoststore.errors import UsageError
from ghoststore.lazy import load
from ghoststore.settings.shared import AsJson
from ghoststore.settings.store import WatchOptions
from ghoststore.shown import visible

WIDTH = 120
"""Columns where stdout is no terminal."""
TRAIN, VAL = "cyan", "bold yellow"
NARROW = 84
"""Columns below which panels stand one below the other."""
DOMAINS = 12
CHART_HEIGHT = 9
LINES_OF_HISTOGRAM = 5


@options.command(WatchOptions, AsJson)
def command(keywords: options.Keywords, printing: AsJson) -> None:
    """A training run, live, from another terminal: losses, speed, scores, the best and worst samples, domains.

    It reads what `ghoststore train` commits, and changes nothing. It ends with the run; Ctrl-C ends it before.

    \b
      ghoststore watch --store ./store
      ghoststore watch --store ./store --once --json
    """
    from ghoststore.cli.terminal import print_json

    if printing.as_json and not keywords["once"]:
        raise UsageError("`as_json` is one document: it needs `once`")
    frames = _reported(load("watch")(**keywords))
    if printing.as_json:
        print_json(next(frames).to_json())
    else:
        _show(frames, keywords["once"])


def _reported(frames: Iterator[Any]) -> Iterator[Any]:
    """``frames``, each an event, too, where events are asked for."""
    for frame in frames:
        options.report(frame, "frame")
        yield frame


def _show(frames: Any, once: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from ghoststore.cli.terminal import tell

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
        if not once:
            tell("note: stdout is no terminal: the last frame is printed at the end")
    if once:
        console.print(render(next(frames), console.width))
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for frame in frames:
            live.update(render(frame, console.width), refresh=True)


def render(frame: Any, width: int) -> Any:
    """A frame as something that rich prints, ``width`` columns wide."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ghoststore.corpus.repeated import repeated_words

    if frame.waiting is not None:
        stopped = f"; {_stopped(frame)}" if frame.state == "stopped" else ""
        return Text(visible(f"{frame.store}: {frame.waiting}{stopped}"), style="yellow")
    half = (width - 1) // 2 if width >= NARROW else width
    panels = (
        _losses(frame, half),
        _now(frame, half),
        _scores(frame, half),
        _domains(frame, half),
        _extremes("best so far, by Σ η·score", frame.best, "green", half),
        _extremes("worst so far", frame.worst, "red", half),
    )
    grid = Table.grid()
    for place in range(0, len(panels), 2):
        if width >= NARROW:
            grid.add_row(panels[place], " " * (width - 2 * half), panels[place + 1])
        else:
            grid.add_row(panels[place])
            grid.add_row(panels[place + 1])
    words = repeated_words(frame.repeated_ids)
    notes = [*frame.notes, *([words] if words else [])]
    lines = [Text(visible(f"note: {note}", lines=True), style="yellow") for note in notes]
    return Group(_head(frame, width), grid, *lines)


def _panel(title: str, content: Any, width: int, height: int | None = None) -> Any:
    from rich.box import ROUNDED
    from rich.panel import Panel

    return Panel(
        content,
        title=title,
        title_align="left",
        box=ROUNDED,
        border_style="dim",
        width=width,
        height=None if height is None else height + 2,
        padding=(0, 1),
    )


def _head(frame: Any, width: int) -> Any:
    from rich.text import Text

    share = frame.steps / frame.planned
    bar = 24
    text = Text(f"{visible(frame.run)}  ", style="bold")
    text.append("━" * round(share * bar), style="green")
    text.append("━" * (bar - round(share * bar)), style="dim")
    text.append(f"  {frame.steps:,} of {frame.planned:,} steps ({share:.0%})", style="not bold")
    if frame.finished:
        text.append("  finished", style="bold green")
    elif frame.state == "stopped":
        text.append(f"  {_stopped(frame)}", style="bold yellow")
    else:
        text.append(f"  last commit {duration(frame.commit_age)} ago", style="not bold")
        if frame.seconds_left is not None:
            text.append(f"  about {duration(frame.seconds_left)} left", style="not bold")
    if frame.unread:
        text.append(f"  {frame.unread:,} steps to be read", style="yellow")
    if frame.gaps:
        missing = sum(stop - start for start, stop in frame.gaps)
        text.append(f"  {missing:,} steps missing", style="yellow")
    return text


def _stopped(frame: Any) -> str:
    return "stopped: no writer" + ("" if frame.silent is None else f" since {duration(frame.silent)}")


def _losses(frame: Any, width: int) -> Any:
    from rich.text import Text

    from ghoststore.cli.charts import line_chart

    curve = frame.curve
    lines = line_chart([(curve.train_loss, TRAIN), (curve.val_loss, VAL)], width - 4, CHART_HEIGHT)
    title = f"loss: [{TRAIN}]train[/] [{VAL}]val[/], nats a token"
    return _panel(title, Text("\n").join(lines), width, CHART_HEIGHT)


def _now(frame: Any, width: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    from ghoststore.cli.charts import sparkline

    table = Table.grid(padding=(0, 2, 0, 0))
    rate = f"{_number(frame.learning_rate)}  {sparkline(frame.curve.learning_rate, max(8, width - 32))}"
    for name, value in (
        ("train loss", _number(frame.train_loss, ".4f")),
        ("val loss", _number(frame.val_loss, ".4f")),
        ("learning rate", rate),
        ("speed", "–" if frame.tokens_per_second is None else f"{frame.tokens_per_second:,.0f} tokens/s"),
        ("scoring", "–" if frame.score_share is None else f"{frame.score_share:.1%} of the recent time"),
        ("scores", f"{frame.scored:,}" + (f", {frame.left_out:,} left out" if frame.left_out else "")),
        ("negative", f"{_share(frame.negative_share)}, recently {_share(frame.recent_negative_share)}"),
    ):
        table.add_row(Text(name, style="dim", no_wrap=True), Text(value, no_wrap=True))
    return _panel("now", table, width, CHART_HEIGHT)


def _middle(frame: Any) -> int:
    """Lines of the panels in the middle."""
    return max(LINES_OF_HISTOGRAM, min(len(frame.domains), DOMAINS)) + 1


def _scores(frame: Any, width: int) -> Any:
    from rich.text import Text

    from ghoststore.cli.charts import histogram

    if not frame.histogram:
        return _panel("scores", Text("no scores yet", style="dim"), width, _middle(frame))
    edges = frame.histogram_edges
    negative = sum(edge < -1e-9 * (edges[-1] - edges[0]) for edge in edges[:-1])
    lines = []
    for bars in histogram(frame.histogram, _middle(frame) - 1):
        line = Text(no_wrap=True)
        line.append(bars[:negative], style="red")
        line.append(bars[negative:], style="green")
        lines.append(line)
    scale = [" "] * len(frame.histogram)
    left, right = f"{edges[0]:.3g}", f"{edges[-1]:.3g}"
    axis = left + " " * max(1, len(scale) - len(left) - len(right)) + right
    if len(left) < negative < len(scale) - len(right):
        axis = axis[:negative] + "0" + axis[negative + 1 :]
    lines.append(Text(axis, style="dim", no_wrap=True))
    return _panel(f"the last {frame.recent_scores:,} scores", Text("\n").join(lines), width, _middle(frame))


def _domains(frame: Any, width: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    from ghoststore.cli.charts import sparkline
    from ghoststore.cli.terminal import Line

    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("domain", no_wrap=True)
    columns = 1 + (width >= 40) + (width >= 46) + (width >= 55)
    for heading in ("η·score", "times", "negative")[:columns]:
        table.add_column(heading, justify="right", no_wrap=True)
    if columns > 3:
        table.add_column("trend", no_wrap=True)
    for one in frame.domains[:DOMAINS]:
        style = "green" if one.value_per_time > 0 else "red"
        cells: list[Text | str] = [
            Text(f"{one.value_per_time:.3g}", style=style),
            f"{one.times:,}",
            _share(one.negative_share),
            Text(sparkline(one.trend, max(6, width - 50)), style=style),
        ]
        table.add_row(Line(one.domain or "(none)"), *cells[:columns])
    more = len(frame.domains) - DOMAINS
    return _panel("mean η·score by domain" + (f", {more} more" if more > 0 else ""), table, width, _middle(frame))


def _extremes(title: str, extremes: Any, style: str, width: int) -> Any:
    """Where an id does not tell samples apart its row stands beside it, whole: the id and the domain give way."""
    from rich.table import Table
    from rich.text import Text

    from ghoststore.cli.terminal import Line, preview

    def longest(cells: list[str], most: int) -> int:
        return min(most, max(map(len, cells), default=0))

    rows = [f"row {one.source_row}" if one.id_repeats else "" for one in extremes]
    value = longest([f"{one.value:.3g}" for one in extremes], 12)
    row = longest(rows, width)
    name = longest([visible(one.id) for one in extremes], width // 3)
    domain = longest([visible(one.domain or "") for one in extremes], 11)
    if row:
        left = width - 4 - (value + 2) - (row + 2) - 2
        name = min(name, max(left, 1))
        domain = domain if name + domain + 4 <= left else 0
    table = Table(box=None, padding=(0, 1), show_header=False, expand=True)
    table.add_column(justify="right", no_wrap=True, width=value)
    table.add_column(no_wrap=True, width=name)
    if row:
        table.add_column(no_wrap=True, width=row)
    if domain or not row:
        table.add_column(no_wrap=True, width=domain)
    table.add_column(no_wrap=True, ratio=1)
    for one, its_row in zip(extremes, rows, strict=True):
        cells: list[Any] = [Text(f"{one.value:.3g}", style=style), Line(one.id)]
        cells += [Text(its_row)] if row else []
        cells += [Line(one.domain or "", "dim")] if domain or not row else []
        table.add_row(*cells, Line(preview(one.text), "dim"))
    return _panel(title, table, width)


def duration(seconds: float | None) -> str:
    """``seconds`` in the largest fitting unit."""
    if seconds is None:
        return "–"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if size > 60 else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _number(value: float | None, form: str = ".3g") -> str:
    return "–" if value is None else format(value, form)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
