"""Results as tables of a notebook: HTML without scripts or styles of its own, every text escaped and cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

SHOWN_ROWS, SHOWN_TABLES = 20, 5
SHOWN_CHARACTERS = 280
TEXT = "text-align:left;white-space:pre-wrap;overflow-wrap:anywhere;min-width:18em"
NARROW = "text-align:left;white-space:nowrap"
NUMBER = "text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums"


def cut(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """``text``, with at most ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def html_table(caption: str, rows: Sequence[Mapping[str, Any]], total: int | None = None) -> str:
    """A table with a column for each key of the first of ``rows``, which are some of ``total``.

    Columns that are empty in every row are left out. Numbers never wrap; the column ``text`` takes what is left.
    """
    names = [name for name in (rows[0] if rows else {}) if any(row[name] is not None for row in rows)]
    head = "".join(f'<th style="{_style(name, rows)}">{escape(name)}</th>' for name in names)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_style(name, rows)}">{_cell(row[name])}</td>' for name in names) + "</tr>"
        for row in rows[:SHOWN_ROWS]
    )
    more = (len(rows) if total is None else total) - min(len(rows), SHOWN_ROWS)
    left = f"<div>… and {more:,} more</div>" if more > 0 else ""
    return (
        '<div style="max-width:100%;overflow-x:auto">'
        f'<table><caption style="text-align:left">{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>{left}</div>"
    )


def html_tables(tables: Iterable[str], total: int, what: str) -> str:
    """The first of ``total`` tables, one below another, and how many more there are."""
    shown = [table for table, _ in zip(tables, range(SHOWN_TABLES), strict=False)]
    left = f"<div>… and {total - len(shown):,} more {escape(what)}</div>" if total > len(shown) else ""
    return "".join(shown) + left


def _style(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if name == "text":
        return TEXT
    return NUMBER if all(isinstance(row[name], int | float) or row[name] is None for row in rows) else NARROW


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return escape(f"{value:.4g}" if isinstance(value, float) else cut(str(value)))
