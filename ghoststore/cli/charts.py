"""Small charts of characters: a line chart in braille dots, a sparkline, a histogram."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
Values = Sequence[float | None]


def sparkline(values: Values, width: int) -> str:
    """``values`` in ``width`` characters, scaled from the lowest to the highest. A blank stands for None."""
    means = _squeezed(values, width)
    known = [value for value in means if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else BLOCKS[round((value - low) * scale)] for value in means)


def histogram(counts: Sequence[int], height: int) -> list[str]:
    """One bar a column in ``height`` lines; the largest count fills them."""
    top = max(counts, default=0) or 1
    eighths = [math.ceil(count / top * height * 8) for count in counts]
    return [
        "".join(" " if level <= line * 8 else BLOCKS[min(level - line * 8, 8) - 1] for level in eighths)
        for line in range(height - 1, -1, -1)
    ]


def line_chart(series: Sequence[tuple[Values, str]], width: int, height: int) -> list[Text]:
    """Draw ``series`` of (values at equal steps, style) in ``height`` lines of ``width`` characters, on one scale.

    Where two share a character, the later colour wins. The first and the last line show the scale at the left.
    """
    known = [value for values, _ in series for value in values if value is not None]
    if not known:
        return [Text("no loss yet", style="dim")]
    low, high = min(known), max(known)
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    margin = max(map(len, labels))
    columns, rows = 2 * (width - margin - 1), 4 * height
    cells: dict[tuple[int, int], tuple[int, str]] = {}
    for values, style in series:
        previous: tuple[int, int] | None = None
        for index, value in enumerate(values):
            if value is None:
                continue
            x = round(index / max(1, len(values) - 1) * (columns - 1))
            y = round((high - value) / ((high - low) or 1.0) * (rows - 1))
            for dot in _line(previous or (x, y), (x, y)):
                cell = (dot[1] // 4, dot[0] // 2)
                bits = cells.get(cell, (0, ""))[0] | _DOTS[dot[1] % 4][dot[0] % 2]
                cells[cell] = (bits, style)
            previous = (x, y)
    lines = []
    for line in range(height):
        text = Text(f"{labels[line]:>{margin}} ", style="dim")
        for column in range(columns // 2):
            bits, style = cells.get((line, column), (0, ""))
            text.append(chr(0x2800 + bits) if bits else " ", style=style)
        lines.append(text)
    return lines


def _squeezed(values: Values, width: int) -> list[float | None]:
    """The means of ``width`` equal pieces of ``values``; ``values`` itself if there are no more."""
    if len(values) <= width:
        return list(values)
    means: list[float | None] = []
    for index in range(width):
        piece = values[index * len(values) // width : (index + 1) * len(values) // width]
        known = [value for value in piece if value is not None]
        means.append(sum(known) / len(known) if known else None)
    return means


def _line(start: tuple[int, int], stop: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots from ``start`` to ``stop``, both included."""
    steps = max(abs(stop[0] - start[0]), abs(stop[1] - start[1]), 1)
    return [
        (start[0] + round((stop[0] - start[0]) * i / steps), start[1] + round((stop[1] - start[1]) * i / steps))
        for i in range(steps + 1)
    ]
