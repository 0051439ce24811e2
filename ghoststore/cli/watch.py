"""``ghoststore watch``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ghoststore.cli import options
from ghoststore.errors import UsageError
from ghoststore.lazy import load
from ghoststore.settings.shared import STEP_WEIGHT_SYMBOLS, AsJson
from ghoststore.settings.store import WatchOptions
from ghoststore.shown import visible

WIDTH = 120
"""Columns if stdout is no terminal."""
TRAIN, VAL = "cyan", "bold yellow"
NARROW = 60
"""Below this many columns the panels are stacked."""
WIDE = 140
"""From this many columns on the chart of the loss is beside the scores, and the best samples beside the worst."""
SCORES_WIDTH = 38
"""Columns of the panel of scores: a bar takes one."""
LEAST_LINES, SAMPLES = 4, 5
"""On 24 lines: lines of the middle panels, and samples in each of the panels below."""
DOMAINS = 12
GAP = 2
"""Columns between the cells of a sample."""
CHART_HEIGHT = 9
DOMAIN_WIDTH = 11
HISTOGRAM_LINES = 8
"""Most lines of bars; more lines of a terminal go to domains and samples."""


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
    frames = _logged(load("watch")(**keywords))
    if printing.as_json:
        print_json(next(frames).to_json())
    else:
        _show(frames, keywords["once"])


def _logged(frames: Iterator[Any]) -> Iterator[Any]:
    """``frames``, each also written as an event with ``--log-json``."""
    for frame in frames:
        options.log_result(frame, "frame")
        yield frame


def _show(frames: Any, once: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from ghoststore.cli.terminal import notify

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
        if not once:
            notify("note: stdout is no terminal: the last frame is printed at the end")
    height = console.height if console.is_terminal else None
    if once:
        console.print(render(next(frames), console.width, height))
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for frame in frames:
            height = console.height if console.is_terminal else None
            live.update(render(frame, console.width, height), refresh=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The lines of each panel, between the lines at the top and the notes."""

    middle: int
    """Lines within the panels of scores and domains; 0 if they are left out."""
    samples: int
    """Number of the best, and of the worst, samples."""
    chart: bool
    """Whether the chart of the loss is shown."""

    @classmethod
    def of(cls, frame: Any, width: int, lines: int | None) -> Layout:
        """Divide ``lines`` lines; None gives each panel as many as it wants.

        The order is: scores, samples, the chart, more domains, more samples.
        """
        most = max(HISTOGRAM_LINES, min(len(frame.domains), DOMAINS)) + 1
        if lines is None:
            return cls(middle=most, samples=SAMPLES, chart=True)
        stacked = 2 if width < NARROW else 1
        middle = min(LEAST_LINES, lines // stacked - 2)
        if middle < 2:
            return cls(middle=0, samples=0, chart=False)
        panels = 1 if width >= WIDE else 2  # of samples, one below the other
        left = lines - stacked * (middle + 2)
        samples = min(SAMPLES, max(0, left // panels - 2))
        left -= panels * (samples + 2) if samples else 0
        chart = width >= WIDE
        if not chart and left >= CHART_HEIGHT + 2:
            chart, left = True, left - CHART_HEIGHT - 2
        more = max(0, min(left // stacked, most - middle))
        left -= stacked * more
        available = max(len(frame.best), len(frame.worst))
        if samples == SAMPLES:
            samples = max(samples, min(available, samples + left // panels))
        return cls(middle=middle + more, samples=samples, chart=chart)


def render(frame: Any, width: int, height: int | None = None) -> Any:
    """Render a frame for rich, ``width`` columns wide and at most ``height`` lines high, the cursor's line included.

    None for ``height`` leaves it open.
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
    other_runs = [f"the newest of {frame.runs} runs; --run NAME shows another"] if frame.runs > 1 else []
    notes = [visible(f"note: {note}", lines=True) for note in (*other_runs, *frame.notes, *([words] if words else []))]
    fixed = [*_head(frame, width), *_losses(frame, width), *_now(frame, width)]
    below: list[Any] = [Text(note, style="yellow") for note in notes]
    lines = None
    if height is not None:
        lines = max(0, height - 1 - len(fixed))
        below = [Line(" ".join(note.split()), "yellow") for note in notes[: lines // 4]]
        lines -= len(below)
    layout = Layout.of(frame, width, lines)
    body: list[Any] = []
    if layout.middle:
        body.append(_middle(frame, width, layout))
    if layout.chart and width < WIDE:
        body.append(_chart(frame, width, CHART_HEIGHT))
    if layout.samples:
        half = (width - 1) // 2 if width >= WIDE else width
        symbol = STEP_WEIGHT_SYMBOLS[frame.weight]
        best = _extremes(f"best so far, by Σ {symbol}·score", frame.best[: layout.samples], "green", half)
        worst = _extremes("worst so far", frame.worst[: layout.samples], "red", half)
        if width >= WIDE:
            grid = Table.grid()
            grid.add_row(best, " " * (width - 2 * half), worst)
            body.append(grid)
        else:
            body += [best, worst]
    return Group(*fixed, *body, *below)


def _middle(frame: Any, width: int, layout: Layout) -> Any:
    """The panels of scores and domains; on a wide terminal also the chart of the loss."""
    from rich.console import Group
    from rich.table import Table

    if width < NARROW:
        return Group(_scores(frame, width, layout.middle), _domains(frame, width, layout.middle))
    left = width - SCORES_WIDTH - 1
    if width < WIDE:
        panels = [_scores(frame, SCORES_WIDTH, layout.middle), _domains(frame, left, layout.middle)]
    else:
        chart = (left - 1) // 2
        panels = [
            _scores(frame, SCORES_WIDTH, layout.middle),
            _domains(frame, left - 1 - chart, layout.middle),
            _chart(frame, chart, layout.middle),
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
    """The run, its progress and its state: one line, or two if one is too short."""
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
    """Losses and learning rate in one line, each with its newest value and its curve."""
    from rich.text import Text

    from ghoststore.cli.charts import sparkline

    curve, parts = frame.curve, []
    named = (
        ("loss", TRAIN, _number(frame.train_loss, ".4f"), curve.train_loss),
        ("val", VAL, _number(frame.val_loss, ".4f"), curve.val_loss),
        ("η", "", _number(frame.learning_rate), curve.learning_rate),
    )
    text_width = sum(len(name) + len(value) + 2 for name, _, value, _ in named) + 4
    chart = max(0, (width - text_width) // 3)
    for name, style, value, values in named:
        known = [number for number in values if number is not None]  # most steps have no val loss
        part = Text(f"{name} ", style="dim").append(f"{value} ", style=f"not dim {style}")
        parts.append(part.append(sparkline(known, chart) if chart >= 4 else "", style=f"not dim {style}"))
    line = Text("  ", no_wrap=True, overflow="ellipsis").join(parts)
    line.no_wrap, line.overflow = True, "ellipsis"
    return [line]


def _now(frame: Any, width: int) -> list[Any]:
    """Speed, and shares of the scores: one line, or more if one is too short."""
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
    """The panel of domains, best first, as many as there is room for."""
    from rich.table import Table
    from rich.text import Text

    from ghoststore.cli.charts import sparkline
    from ghoststore.cli.terminal import Line

    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("domain", no_wrap=True)
    headings = ["value", *(["kept"] if frame.kept is not None else []), "negative", "times", "trend"]
    room = width - 4 - DOMAIN_WIDTH
    fitting = [heading for index, heading in enumerate(headings) if 11 * (index + 1) <= room]
    for heading in fitting:
        table.add_column(heading, justify="left" if heading == "trend" else "right", no_wrap=True)
    domains = frame.domains[: height - 1]
    for domain in domains:
        style = "dim" if domain.value_per_time is None else "green" if domain.value_per_time > 0 else "red"
        cells: dict[str, Text | str] = {
            "value": Text(_number(domain.value_per_time), style=style),
            "kept": _share(domain.kept_share),
            "negative": _share(domain.negative_share),
            "times": f"{domain.times:,}",
            "trend": Text(sparkline(domain.trend, max(6, room - 11 * (len(fitting) - 1) - 2)), style=style),
        }
        table.add_row(Line(domain.domain or "(none)"), *(cells[heading] for heading in fitting))
    more = len(frame.domains) - len(domains)
    title = f"mean {STEP_WEIGHT_SYMBOLS[frame.weight]}·score by domain"
    return _panel(title + (f", {more} more" if more > 0 else ""), table, width, height)


def _extremes(title: str, extremes: Any, style: str, width: int) -> Any:
    """The panel of the best or the worst samples, one line each.

    The value and, beside an id that is not unique, the row of the sample are whole, and the id if there is room for it:
    the text is cut, and the domain left out.
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    from ghoststore.cli.terminal import SHORT, Line, preview

    def longest(cells: list[str], most: int) -> int:
        return min(most, max(map(cell_len, cells), default=0))

    values = [_number(sample.value) for sample in extremes]
    rows = [f"row {sample.source_row}" if sample.id_repeats else "" for sample in extremes]
    value, row = longest(values, width), longest(rows, width)
    left = width - 4 - value - (GAP + row if row else 0) - GAP  # within the panel
    name = longest([visible(sample.id) for sample in extremes], sys.maxsize)
    if name > left:  # it is cut in any case, and the text may say more
        name = max(min(width // 3, left), 1)
    left -= name
    domain = longest([visible(sample.domain or "") for sample in extremes], DOMAIN_WIDTH)
    domain = domain if GAP + domain + GAP + SHORT <= left else 0
    text = max(0, left - (GAP + domain if domain else 0) - GAP)
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True, width=value)
    for size in (name, row, domain, text):
        if size:
            table.add_column(no_wrap=True, width=size)
    for sample, number, sample_row in zip(extremes, values, rows, strict=True):
        cells: list[tuple[int, Any]] = [
            (value, Text(number, style=style)),
            (name, Line(sample.id)),
            (row, Text(sample_row)),
            (domain, Line(sample.domain or "", "dim")),
            (text, Line(preview(sample.text), "dim")),
        ]
        table.add_row(*(cell for size, cell in cells if size))
    return _panel(title, table, width)


def _number(value: float | None, form: str = ".3g") -> str:
    return "–" if value is None else format(value, form)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
