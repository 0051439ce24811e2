"""What ``ghoststore.scores`` found, and the forms it is written in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from query.common.output import columns_of, write_result


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreHit:
    """One sample (or window) of a ranking. ``rank`` counts from 1."""

    rank: int
    value: float
    id: str
    source_row: int
    domain: str | None
    times: int
    """Scores that the value is made of."""
    mean_score: float
    negative_share: float
    last_step: int
    """The step of its newest score."""
    text: str | None
    """The sample's whole text; None where the corpus is gone or has changed."""
    window_start: int
    """First token of the window; 0 where samples are ranked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainScores:
    """One domain; None are the samples without one."""

    domain: str | None
    rows: int
    """Samples (or windows) of the row table."""
    scored_rows: int
    """Of these, with a score that counts."""
    times: int
    """Scores that count."""
    value_per_row: float | None
    """Mean value of a scored row."""
    value_per_time: float | None
    """Sum of the values ÷ times."""
    value_sum: float
    negative_share: float | None
    mean_score: float | None
    standard_error: float | None
    """Of ``mean_score``; None for fewer than two scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One time that a sample was trained on. Samples of one id are told apart by ``source_row``."""

    step: int
    rank: int
    source_row: int
    window_start: int
    loss: float | None
    learning_rate: float | None
    score: float | None
    """None where it was not scored or is not finite: it adds nothing."""
    weighted: float | None
    """weight·score; by default the weight is η."""
    cumulative: float
    """Sum of the weighted scores of this sample (its ``source_row``) up to here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSummary:
    """The steps that were looked at, all domains together."""

    steps: int
    """Committed steps in the window."""
    first: int
    last: int
    """First and last committed step in the window."""
    planned: int
    """Steps of the whole run."""
    gaps: list[tuple[int, int]]
    """Ranges of steps in the window that are not committed, half-open."""
    rows: int
    """Samples (or windows) of the row table."""
    seen: int
    """Of these, trained on in the window."""
    times: int
    """How often, together."""
    scored: int
    """Scores that count. The others are left out of everything:"""
    unscored: int
    not_finite: int
    without_learning_rate: int
    not_chosen: int
    """Candidates that their step did not train on; none of them are counted above."""
    negative_share: float | None
    """Among the scores that count; None without any."""
    repeated_ids: dict[str, int] | None
    """``ids`` that occur more than once, and the ``samples`` that have them; None where every id is unique."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoresResult:
    """What ``ghoststore.scores`` returns: a ranking, or a table by domain, or the history of one sample."""

    store: str
    settings: dict[str, Any]
    summary: ScoreSummary
    hits: list[ScoreHit]
    bottom: list[ScoreHit]
    """Lowest values, lowest first; empty unless asked for."""
    domains: list[DomainScores] | None = None
    """By falling value per time; only where ``by`` was asked for."""
    history: list[HistoryEntry] | None = None
    """In the order of steps; only of a ``sample``, or of all samples of that id."""
    same_id: int | None = None
    """Samples of the run that have the id of ``sample``, whether or not they were trained on in these steps."""

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore scores --json`` prints: of ``hits``, ``bottom``, ``domains`` and ``history`` what
        was asked for.
        """
        document: dict[str, Any] = {"store": self.store, "settings": self.settings, "summary": asdict(self.summary)}
        if self.history is not None:
            return document | {"history": [asdict(entry) for entry in self.history]}
        if self.domains is not None:
            return document | {"domains": [asdict(domain) for domain in self.domains]}
        document["hits"] = [asdict(hit) for hit in self.hits]
        return document | ({"bottom": [asdict(hit) for hit in self.bottom]} if self.settings["bottom_k"] else {})

    def rows(self) -> Iterator[dict[str, Any]]:
        """Flat rows: of the history or the table; of a ranking with ``list`` (top or bottom)."""
        plain = self.history if self.history is not None else self.domains
        if plain is not None:
            yield from (asdict(one) for one in plain)
            return
        for name, hits in (("top", self.hits), ("bottom", self.bottom)):
            for hit in hits:
                yield {"list": name, **asdict(hit)}

    def write(self, path: str | Path) -> None:
        """Write to a new file: ``.json``, or flat rows as ``.jsonl``, ``.csv`` or ``.parquet``."""
        if self.history is not None:
            columns = columns_of(HistoryEntry)
        elif self.domains is not None:
            columns = columns_of(DomainScores)
        else:
            columns = {"list": str, **columns_of(ScoreHit)}
        write_result(path, self.to_json, columns, self.rows())
