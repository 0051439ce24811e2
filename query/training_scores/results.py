"""The results of ``ghoststore.scores``: their fields, and the files they are written to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from query.common.notebook import SHOWN_ROWS, html_table
from query.common.output import arrow_table, columns_of, write_result


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreHit:
    """One sample (or window) of a ranking. ``rank`` counts from 1."""

    rank: int
    value: float
    id: str
    source_row: int
    domain: str | None
    times: int
    """Number of scores that the value is computed from."""
    mean_score: float
    negative_share: float
    last_step: int
    """Step of the newest score."""
    text: str | None
    """The sample's whole text; None where the corpus is gone or has changed."""
    window_start: int
    """First token of the window in its sample; 0 if samples are ranked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainScores:
    """The scores of one domain. The ``domain`` None stands for samples without one."""

    domain: str | None
    rows: int
    """Samples (or windows) of the domain in the run."""
    scored_rows: int
    """Samples (or windows) with a score that counts."""
    times: int
    """Number of scores that count."""
    value_per_row: float | None
    """Mean value of a scored row."""
    value_per_time: float | None
    """Sum of the values ÷ times."""
    value_sum: float
    negative_share: float | None
    mean_score: float | None
    standard_error: float | None
    """Standard error of ``mean_score``; None for fewer than two scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One time that a sample was trained on. ``source_row`` distinguishes samples with the same id."""

    step: int
    rank: int
    source_row: int
    window_start: int
    loss: float | None
    learning_rate: float | None
    score: float | None
    """None if the sample was not scored then, or if the score is not finite: it adds nothing to the sum."""
    weighted: float | None
    """weight·score, of the weight that the settings name."""
    cumulative: float
    """Sum of ``weighted`` for this sample (this ``source_row``) up to this step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSummary:
    """The steps that were read, and all their scores together."""

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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ScoresResult:
    """What ``ghoststore.scores`` returns: a ranking, a table by domain, or the history of one sample.

    It is the sequence of its entries: of the history, of the table, or of the ranking's best.
    """

    store: str
    settings: dict[str, Any]
    summary: ScoreSummary
    hits: list[ScoreHit]
    bottom: list[ScoreHit]
    """The lowest values, lowest first; empty without ``bottom_k``."""
    domains: list[DomainScores] | None = None
    """The table of ``by="domain"``, highest value per time first; else None."""
    history: list[HistoryEntry] | None = None
    """The history of ``sample`` (of all samples with that id), in the order of steps; else None."""
    same_id: int | None = None
    """Number of samples of the run with the id ``sample``, whether or not they were trained on in these steps."""

    @property
    def entries(self) -> Sequence[ScoreHit] | Sequence[DomainScores] | Sequence[HistoryEntry]:
        """Those of the history, of the table by domain, or the ranking's best."""
        return self.history if self.history is not None else self.domains if self.domains is not None else self.hits

    def __len__(self) -> int:
        return len(self.entries)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[ScoreHit | DomainScores | HistoryEntry]:
        return iter(self.entries)

    def __getitem__(self, place: Any) -> Any:
        return self.entries[place]

    def __repr__(self) -> str:
        what = "steps of a sample" if self.history is not None else "domains" if self.domains is not None else "hits"
        return f"<scores of run {self.settings.get('run')!r}: {len(self)} {what} of {self.summary.steps} steps>"

    def _repr_html_(self) -> str:
        rows = list(self.rows())
        return html_table(repr(self).strip("<>"), rows[:SHOWN_ROWS], len(rows))

    def to_arrow(self) -> Any:
        """A `pyarrow.Table` with the columns of :meth:`rows`."""
        return arrow_table(self._columns, self.rows())

    def to_pandas(self) -> Any:
        """A pandas DataFrame with the columns of :meth:`rows`."""
        return self.to_arrow().to_pandas()

    def to_json(self) -> dict[str, Any]:
        """The document that ``ghoststore scores --json`` prints: ``history`` or ``domains`` if there are any, else
        ``hits`` and, with ``bottom_k``, ``bottom``.
        """
        document: dict[str, Any] = {"store": self.store, "settings": self.settings, "summary": asdict(self.summary)}
        if self.history is not None:
            return document | {"history": [asdict(entry) for entry in self.history]}
        if self.domains is not None:
            return document | {"domains": [asdict(domain) for domain in self.domains]}
        document["hits"] = [asdict(hit) for hit in self.hits]
        return document | ({"bottom": [asdict(hit) for hit in self.bottom]} if self.settings["bottom_k"] else {})

    def rows(self) -> Iterator[dict[str, Any]]:
        """Flat rows: the entries of the history or of the table; or the hits, with ``list`` (``top`` or ``bottom``)."""
        plain = self.history if self.history is not None else self.domains
        if plain is not None:
            yield from (asdict(entry) for entry in plain)
            return
        for name, hits in (("top", self.hits), ("bottom", self.bottom)):
            for hit in hits:
                yield {"list": name, **asdict(hit)}

    def write(self, path: str | Path) -> None:
        """Write a new file: the document as ``.json``, or flat rows as ``.jsonl``, ``.csv`` or ``.parquet``.

        UsageError for another suffix, or if the file exists.
        """
        write_result(path, self.to_json, self._columns, self.rows())

    @property
    def _columns(self) -> dict[str, type]:
        """Of flat rows."""
        if self.history is not None:
            return columns_of(HistoryEntry)
        return columns_of(DomainScores) if self.domains is not None else {"list": str, **columns_of(ScoreHit)}
