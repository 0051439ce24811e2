"""``ghoststore watch``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
NARROW = 60
"""Columns below which panels stand one below the other."""
WIDE = 140
"""Columns from which there is room for a chart of the loss beside the scores, and for best beside worst."""
SCORES_WIDTH = 38
"""Of the panel of scores: a bar takes a column."""
LEAST_LINES, SAMPLES = 4, 5
"""Lines of the panels in the middle, and samples of each of the others, on 24 lines."""
DOMAINS = 12
CHART_HEIGHT = 9
DOMAIN_WIDTH = 11
HISTOGRAM_LINES = 8
"""Most lines of bars; a terminal with more is for domains and samples."""


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
    height = console.height if console.is_terminal else None
    if once:
        console.print(render(next(frames), console.width, height))
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for frame in frames:
            height = console.height if console.is_terminal else None
            live.update(render(frame, console.width, height), refresh=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How many lines there are for each thing, between the lines at the top and the notes."""

    middle: int
    """Lines within the panels of scores and domains; 0 for none."""
    samples: int
    """Best, and worst, samples."""
    chart: bool
    """Whether there is a chart of the loss, too."""

    @classmethod
    def of(cls, frame: Any, width: int, lines: int | None) -> Room:
        """Of ``lines`` lines (None: as many as it takes). Scores first; then samples, the chart, some more domains, and
        as many more samples as there are.
        """
        most = max(HISTOGRAM_LINES, min(len(frame.domains), DOMAINS)) + 1
        if lines is None:
            return cls(middle=most, samples=SAMPLES, chart=True)
        stacked = 2 if width < NARROW else 1
        middle = min(LEAST_LINES, lines // stacked - 2)
        if middle < 2:
            return cls(middle=0, samples=0, chart=False)
        beside = 1 if width >= WIDE else 2
        left = lines - stacked * (middle + 2)
        samples = min(SAMPLES, max(0, left // beside - 2))
        left -= beside * (samples + 2) if samples else 0
        chart = width >= WIDE
        if not chart and left >= CHART_HEIGHT + 2:
            chart, left = True, left - CHART_HEIGHT - 2
        more = max(0, min(left // stacked, most - middle))
        left -= stacked * more
        available = max(len(frame.best), len(frame.worst))
        if samples == SAMPLES:
            samples = max(samples, min(available, samples + left // beside))
        return cls(middle=middle + more, samples=samples, chart=chart)


def render(frame: Any, width: int, height: int | None = None) -> Any:
    """A frame as something that rich prints, ``width`` columns wide and at most ``height`` lines high, the cursor's
    among them (None: as high as it takes).
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ghoststore.cli.terminal import Line
    from ghoststore.corpus.repeated import repeated_words

    if frame.waiting is not None:
        stopped = f"; {_stopped(frame)}" if frame.state == "stopped" else ""
        return Text(visible(f"{frame.store}: {frame.waiting}{stopped}"), style="yellow")
    words = repeated_words(frame.repeated_ids)
    others = [f"the newest of {frame.runs} runs; --run NAME shows another"] if frame.runs > 1 else []
    notes = [visible(f"note: {note}", lines=True) for note in (*others, *frame.notes, *([words] if words else []))]
    fixed = [*_head(frame, width), *_losses(frame, width), *_now(frame, width)]
    below: list[Any] = [Text(note, style="yellow") for note in notes]
    lines = None
    if height is not None:
        lines = max(0, height - 1 - len(fixed))
        below = [Line(" ".join(note.split()), "yellow") for note in notes[: lines // 4]]
        lines -= len(below)
    room = Room.of(frame, width, lines)
    body: list[Any] = []
    if room.middle:
        body.append(_middle(frame, width, room))
    if room.chart and width < WIDE:
        body.append(_chart(frame, width, CHART_HEIGHT))
    if room.samples:
        half = (width - 1) // 2 if width >= WIDE else width
        best = _extremes("best so far, by Σ η·score", frame.best[: room.samples], "green", half)
        worst = _extremes("worst so far", frame.worst[: room.samples], "red", half)
        if width >= WIDE:
            grid = Table.grid()
            grid.add_row(best, " " * (width - 2 * half), worst)
            body.append(grid)
        else:
            body += [best, worst]
    return Group(*fixed, *body, *below)


def _middle(frame: Any, width: int, room: Room) -> Any:
    """Scores, domains, and on a wide terminal the chart of the loss."""
    from rich.console import Group
    from rich.table import Table

    if width < NARROW:
        return Group(_scores(frame, width, room.middle), _domains(frame, width, room.middle))
    left = width - SCORES_WIDTH - 1
    if width < WIDE:
        panels = [_scores(frame, SCORES_WIDTH, room.middle), _domains(frame, left, room.middle)]
    else:
        chart = (left - 1) // 2
        panels = [
            _scores(frame, SCORES_WIDTH, room.middle),
            _domains(frame, left - 1 - chart, room.middle),
            _chart(frame, chart, room.middle),
        ]
    grid = Table.grid()
    grid.add_row(*[cell for panel in panels for cell in (panel, " ")][:-1])
    return grid


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


def _head(frame: Any, width: int) -> list[Any]:
    """Which run, how far it is, and how it stands: a line, or two where one is too short."""
    from rich.text import Text

    from ghoststore.cli.terminal import duration

    share = frame.steps / frame.planned
    steps = f"  {frame.steps:,} of {frame.planned:,} steps ({share:.0%})"
    state = Text()
    if frame.finished:
        state.append("finished", style="bold green")
    elif frame.state == "stopped":
        state.append(_stopped(frame), style="bold yellow")
    else:
        state.append(f"last commit {duration(frame.commit_age)} ago")
        if frame.seconds_left is not None:
            state.append(f"  about {duration(frame.seconds_left)} left")
    if frame.unread:
        state.append(f"  {frame.unread:,} steps to be read", style="yellow")
    if frame.gaps:
        missing = sum(stop - start for start, stop in frame.gaps)
        state.append(f"  {missing:,} steps missing", style="yellow")
    bar = max(0, min(24, width - len(visible(frame.run)) - len(steps) - 4 - state.cell_len))
    text = Text(f"{visible(frame.run)}  ", style="bold", no_wrap=True, overflow="ellipsis")
    text.append("━" * round(share * bar), style="green")
    text.append("━" * (bar - round(share * bar)), style="dim")
    text.append(steps, style="not bold")
    state.no_wrap, state.overflow = True, "ellipsis"
    if text.cell_len + 2 + state.cell_len > width:
        return [text, state]
    return [Text.assemble(text, "  ", state, no_wrap=True)]


def _stopped(frame: Any) -> str:
    from ghoststore.cli.terminal import duration

    return "stopped: no writer" + ("" if frame.silent is None else f" since {duration(frame.silent)}")


def _losses(frame: Any, width: int) -> list[Any]:
    """Losses and learning rate, each the newest and its way, in one line."""
    from rich.text import Text

    from ghoststore.cli.charts import sparkline

    curve, parts = frame.curve, []
    named = (
        ("loss", TRAIN, _number(frame.train_loss, ".4f"), curve.train_loss),
        ("val", VAL, _number(frame.val_loss, ".4f"), curve.val_loss),
        ("η", "", _number(frame.learning_rate), curve.learning_rate),
    )
    taken = sum(len(name) + len(value) + 2 for name, _, value, _ in named) + 4
    chart = max(0, (width - taken) // 3)
    for name, style, value, values in named:
        known = [number for number in values if number is not None]  # a val loss is there once in many steps
        part = Text(f"{name} ", style="dim").append(f"{value} ", style=f"not dim {style}")
        parts.append(part.append(sparkline(known, chart) if chart >= 4 else "", style=f"not dim {style}"))
    line = Text("  ", no_wrap=True, overflow="ellipsis").join(parts)
    line.no_wrap, line.overflow = True, "ellipsis"
    return [line]


def _now(frame: Any, width: int) -> list[Any]:
    """Speed, and what the scores are: a line, or more where one is too short."""
    from rich.text import Text

    from ghoststore.cli.terminal import pace

    facts = []
    if frame.tokens_per_second is not None:
        facts.append(("", f"{frame.tokens_per_second:,.0f} tokens/s"))
    if frame.seconds_per_step is not None:
        facts.append(("", pace(frame.seconds_per_step, "steps")))
    if frame.score_share is not None:
        facts.append(("scoring ", f"{frame.score_share:.0%}"))
    if frame.kept_share is not None:
        facts.append(("kept ", f"{frame.kept_share:.0%} (now {frame.recent_kept_share:.0%})"))
    if frame.negative_share is not None:
        facts.append(("negative ", f"{frame.negative_share:.0%} (now {frame.recent_negative_share:.0%})"))
    lines: list[Any] = []
    for name, value in facts:
        if lines and lines[-1].cell_len + 2 + len(name) + len(value) <= width:
            lines[-1].append("  ")
        else:
            lines.append(Text(no_wrap=True, overflow="ellipsis"))
        lines[-1].append(name, style="dim").append(value)
    return lines


def _chart(frame: Any, width: int, height: int) -> Any:
    from rich.text import Text

    from ghoststore.cli.charts import line_chart

    curve = frame.curve
    lines = line_chart([(curve.train_loss, TRAIN), (curve.val_loss, VAL)], width - 4, height)
    return _panel(f"loss: [{TRAIN}]train[/] [{VAL}]val[/], nats a token", Text("\n").join(lines), width, height)


def _scores(frame: Any, width: int, height: int) -> Any:
    from rich.text import Text

    from ghoststore.cli.charts import histogram

    if not frame.histogram:
        return _panel("scores", Text("no scores yet", style="dim"), width, height)
    edges = frame.histogram_edges
    negative = sum(edge < -1e-9 * (edges[-1] - edges[0]) for edge in edges[:-1])
    lines = []
    for bars in histogram(frame.histogram, min(height - 1, HISTOGRAM_LINES)):
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
    if height > HISTOGRAM_LINES + 1:
        out = f", {frame.left_out:,} left out" if frame.left_out else ""
        lines.append(Text(f"of {frame.scored:,}{out}", style="dim", no_wrap=True))
    return _panel(f"the last {frame.recent_scores:,} scores", Text("\n").join(lines), width, height)


def _domains(frame: Any, width: int, height: int) -> Any:
    """The best domains, as many as there is room for."""
    from rich.table import Table
    from rich.text import Text

    from ghoststore.cli.charts import sparkline
    from ghoststore.cli.terminal import Line

    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("domain", no_wrap=True)
    headings = ["η·score", *(["kept"] if frame.kept is not None else []), "negative", "times", "trend"]
    room = width - 4 - DOMAIN_WIDTH
    shown = [heading for place, heading in enumerate(headings) if 11 * (place + 1) <= room]
    for heading in shown:
        table.add_column(heading, justify="left" if heading == "trend" else "right", no_wrap=True)
    fitting = frame.domains[: height - 1]
    for one in fitting:
        style = "dim" if one.value_per_time is None else "green" if one.value_per_time > 0 else "red"
        cells: dict[str, Text | str] = {
            "η·score": Text(_number(one.value_per_time), style=style),
            "kept": _share(one.kept_share),
            "negative": _share(one.negative_share),
            "times": f"{one.times:,}",
            "trend": Text(sparkline(one.trend, max(6, room - 11 * (len(shown) - 1) - 2)), style=style),
        }
        table.add_row(Line(one.domain or "(none)"), *(cells[heading] for heading in shown))
    more = len(frame.domains) - len(fitting)
    return _panel("mean η·score by domain" + (f", {more} more" if more > 0 else ""), table, width, height)


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


def _number(value: float | None, form: str = ".3g") -> str:
    return "–" if value is None else format(value, form)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
