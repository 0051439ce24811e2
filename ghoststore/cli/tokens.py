"""The lines below a hit of ``ghoststore query --tokens``: its text, and that of the val sample, with marked tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len

from ghoststore.cli.terminal import Line
from ghoststore.shown import visible

if TYPE_CHECKING:
    from query.answer.results import Hit
    from query.answer.tokens import Token

MARKED = 6
"""Most tokens that are marked in a text."""
SPACES = re.compile(r"\s+")


class _Piece(NamedTuple):
    text: str
    score: float
    """0 where it is not marked."""


def token_lines(hits: Sequence[Hit], place: int, columns: int | None, ascii_only: bool) -> list[str]:
    """Of the hit at ``place``, in at most ``columns`` (None: any): its text around the tokens that add most to its
    score, then the val sample's, if that was looked at. None without ``tokens`` of the question.
    """
    hit = hits[place]
    texts: list[tuple[str, str | None, Sequence[Token], float]] = []
    if hit.tokens is not None and hit.recomputed is not None:
        texts.append(("has", hit.text, hit.tokens, hit.recomputed))
    if (val := hit.val_sample) is not None:
        texts.append((f"asked by {Line(val.id).within(24)}", val.text, val.tokens, val.score))
    lines = []
    for label, text, tokens, score in texts:
        room = None if columns is None else columns - cell_len(label) - 2
        lines.append(f"{label}: {marked(text, tokens, score, room, ascii_only)}")
    return lines


def marked(text: str | None, tokens: Sequence[Token], score: float, columns: int | None, ascii_only: bool) -> str:
    """``text`` in one line with marks around the tokens that add most to ``score``; of a text that is wider than
    ``columns`` the stretch whose marked tokens add most.
    """
    from query.answer.tokens import pieces, strongest

    found = pieces(text or "", tokens)
    sign, chosen = (-1.0 if score < 0 else 1.0), strongest([added or 0.0 for _, added in found], score, MARKED)
    joined: list[_Piece] = []
    for place, (characters, added) in enumerate(found):
        value = sign * (added or 0.0) if place in chosen else 0.0
        flat = visible(SPACES.sub(" ", characters))
        if joined and value and joined[-1].score:  # neighbours share their marks
            joined[-1] = _Piece(joined[-1].text + flat, joined[-1].score + value)
        else:
            joined.append(_Piece(flat, value))
    left, right = ("[", "]") if ascii_only else ("«", "»")
    shown = [f"{left}{piece.text}{right}" if piece.score else piece.text for piece in joined]
    if columns is None or sum(map(cell_len, shown)) <= columns:
        return "".join(shown).strip()
    start, stop = _stretch([piece.score for piece in joined], [cell_len(piece) for piece in shown], columns - 2)
    dots = "..." if ascii_only else "…"
    cut = (dots if start else "") + "".join(shown[start:stop]) + (dots if stop < len(shown) else "")
    return Line(cut).within(max(columns, 1))


def _stretch(scores: Sequence[float], widths: Sequence[int], columns: int) -> tuple[int, int]:
    """(first, one past the last) of the pieces that fit into ``columns`` and whose scores sum to most, then widened on
    both sides as far as there is room.
    """
    best, start, width, total = (0.0, 0, 1), 0, 0, 0.0
    for stop, (score, of_piece) in enumerate(zip(scores, widths, strict=True), 1):
        width, total = width + of_piece, total + score
        while width > columns and start < stop - 1:
            width, total, start = width - widths[start], total - scores[start], start + 1
        if total > best[0]:
            best = (total, start, stop)
    _, start, stop = best
    while start < stop - 1 and not scores[start]:
        start += 1
    left = columns - sum(widths[start:stop])
    while True:
        before, after = start > 0 and widths[start - 1] <= left, stop < len(widths) and widths[stop] <= left
        if before:
            start, left = start - 1, left - widths[start - 1]
            after = stop < len(widths) and widths[stop] <= left
        if after:
            stop, left = stop + 1, left - widths[stop]
        if not before and not after:
            return start, stop
