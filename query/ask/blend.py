"""Similarity blended with the training-time value of samples: ``ghoststore query --with-scores``.

score = (1 − W)·z(similarity) + W·z(value), with z(x) = (x − mean) ÷ standard deviation over the rows that have both.
The value is Σ weight·score of the row's sample in a training run, see `query.training_scores.weights`.

Legend: Q queries, N rows of a part, M rows of a run's row table, U units (samples, or windows) of a run.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ghoststore.corpus import Corpus, ResolvedFields
from ghoststore.errors import MismatchError, UsageError
from ghoststore.progress import Progress
from ghoststore.settings.shared import Data
from ghoststore.store import Part, Run
from ghoststore.store.base.own import source_path
from ghoststore.store.run.ranges import inside
from ghoststore.tokens.shards import TokenShards
from query.search.top_k import Ranking
from query.training_scores.steps import choose_column, stream_steps, window_of
from query.training_scores.sums import ScoreSums, Units, best
from query.training_scores.weights import StepWeight, StepWeights

DEFAULT_WEIGHT = 0.5
BLEND = "(1-W)·z(similarity) + W·z(value)"

JoinedBy = Literal["sample", "window"]


def checked_weight(weight: float | None) -> float:
    """``weight``, by default 0.5; UsageError unless it lies between 0 and 1."""
    if weight is None:
        return DEFAULT_WEIGHT
    if not 0 <= weight <= 1:
        raise UsageError(f"`score_weight` must be between 0 (similarity alone) and 1 (scores alone), not {weight}")
    return weight


@dataclass(frozen=True, slots=True)
class RowValues:
    """The training-time value of every row of a part in one run."""

    value: NDArray[np.float64]
    """(N,): Σ weight·score; NaN for a row without a score."""
    weight: StepWeight
    joined_by: JoinedBy
    steps: int
    """Committed steps of the run."""


@dataclass(frozen=True, slots=True)
class Blend:
    """Similarities, values and their blend, for every row of the part."""

    similarity: NDArray[np.float64]
    """(Q, N)."""
    values: RowValues
    scores: NDArray[np.float64]
    """(Q, N): NaN where a row does not take part."""
    rows: int
    """Usable rows that have a value."""
    weight: float

    @classmethod
    def of(cls, similarity_QN: NDArray[np.float64], values: RowValues, score_weight: float | None) -> Blend:
        """Blend them. UsageError if no row has both, and for a weight outside 0 to 1."""
        weight = checked_weight(score_weight)
        scores, rows = blended(similarity_QN, values.value, weight)
        return cls(similarity_QN, values, scores, rows, weight)

    @property
    def without_score(self) -> int:
        """Usable rows without a value."""
        return int(np.isfinite(self.similarity[0]).sum()) - self.rows

    def settings(self, run: str | None) -> dict[str, Any]:
        """What the settings of a result say about the blend."""
        return {
            "with_scores": run,
            "score_weight": self.weight,
            "blend": BLEND,
            "value": "cumulative",
            "weight": self.values.weight,
            "joined_by": self.values.joined_by,
            "run_steps": self.values.steps,
            "rows_blended": self.rows,
            "rows_without_score": self.without_score,
        }

    def note_left_out(self, run: str | None, progress: Progress) -> None:
        """Say how many usable rows have no score in ``run``."""
        if self.without_score:
            fate = "left out" if self.weight > 0 else "ranked by similarity, as all are"
            progress.note(
                f"{self.without_score:,} of {self.without_score + self.rows:,} usable rows have no score in run "
                f"{run!r}: they are {fate}"
            )


@dataclass(frozen=True, slots=True)
class _Rows:
    """Which sample, and which window of it, each row is: three arrays with one entry a row."""

    source_row: NDArray[np.int64]
    window_start: NDArray[np.int64]
    digest: NDArray[np.uint64]


def values_of_rows(
    part: Part,
    run: Run,
    weight: StepWeight,
    progress: Progress,
    group: str | None = None,
    data: Data | None = None,
) -> RowValues:
    """The value of each committed row of ``part`` in ``run``: for the whole val set, or for one val ``group``.
    ``weight`` is what a step counts with.

    Rows of part and run are joined by the sample's place in the corpus. Where both cut long samples into the same
    windows they are joined by window; otherwise each row has the value of its whole sample.

    MismatchError if part and run are not of the same samples, UsageError for a run without steps.
    """
    window = window_of(run, None)
    rows = _rows_of_part(part, progress, run, data)
    table = _Rows(*(run.rows.read(name, 0, len(run.rows)) for name in ("source_row", "window_start", "source_digest")))
    _refuse_other_samples(part, run, rows, table)
    joined_by: JoinedBy = "window" if windowed_alike(part, run) else "sample"
    units = Units(run, joined_by)
    sums = ScoreSums(len(units))
    with closing(progress.task("reading scores", run.steps, unit="steps")) as task:
        weights = StepWeights(run, weight, window)
        for piece in stream_steps(run, choose_column(run, group), inside(run.ranges, window), weights=weights):
            sums.add(piece.places, units.of(piece.places.row))
            task.advance(piece.stop - piece.start)
    part.refuse_hollow()
    value = np.full(part.layout.rows, np.nan)
    value[part.row_numbers] = join(*_keys(rows, _rows_at(table, units.first_row), joined_by), sums.values("cumulative"))
    return RowValues(value, weight, joined_by, run.steps)


def windowed_alike(part: Part, run: Run) -> bool:
    """Whether part and run cut long samples into the same windows."""
    tokens, training = part.manifest["tokens"], run.manifest["training"]
    same = bool(
        part.manifest["tokenizer"]["fingerprint"] == run.manifest["tokenizer"]["fingerprint"]
        and tokens["max_length"] == training.get("max_length")
        and tokens["overlong"] == training.get("overlong")
    )
    return same and tokens["overlong"] == "window"


def join(wanted: NDArray[Any], keys: NDArray[Any], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The value of each of the ``wanted`` keys; NaN for a key that is not among ``keys``. No two ``keys`` are equal."""
    if not len(keys):
        return np.full(len(wanted), np.nan)
    order = np.argsort(keys, kind="stable")
    place = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    return np.where(keys[place] == wanted, values[place], np.nan)


def blended(
    similarity_QN: NDArray[np.float64], value_N: NDArray[np.float64], weight: float
) -> tuple[NDArray[np.float64], int]:
    """(Q, N) blended scores, and the number of rows with both similarity and value.

    A row without a value has the score NaN, unless ``weight`` is 0. UsageError if no row has both.
    """
    scores = np.full_like(similarity_QN, np.nan)
    both_QN = np.isfinite(similarity_QN) & np.isfinite(value_N)
    if not both_QN.any(1).all():
        raise UsageError("no usable row of the part has a score in the run: nothing can be blended")
    for score_N, similarity_N, both_N in zip(scores, similarity_QN, both_QN, strict=True):
        score_N[:] = 0.0
        if weight < 1:
            score_N += (1 - weight) * _standardized(similarity_N, both_N)
        if weight > 0:
            score_N += weight * _standardized(value_N, both_N)
        score_N[~(both_N if weight > 0 else np.isfinite(similarity_N))] = np.nan
    return scores, int(both_QN[0].sum())


def rankings_of(scores_QN: NDArray[np.float64], k: int, sign: float = 1.0) -> Ranking:
    """The ``k`` rows with the highest ``sign`` × ``scores_QN`` for each query; NaN never ranks, and rows end in -1."""
    rows = np.full((len(scores_QN), k), -1, dtype=np.int64)
    scores = np.full((len(scores_QN), k), np.nan)
    for query, scores_N in enumerate(scores_QN):
        places = best(sign * scores_N, k)
        rows[query, : len(places)], scores[query, : len(places)] = places, scores_N[places]
    return Ranking(rows, scores)


def ranked_among(rows_QM: NDArray[np.int64], scores_QM: NDArray[np.float64], top_k: int, sign: float = 1.0) -> Ranking:
    """The ``top_k`` of ``rows_QM`` (ascending; -1 for none) with the highest ``sign`` × ``scores_QM``."""
    best = rankings_of(scores_QM, top_k, sign)
    rows = np.where(best.rows >= 0, np.take_along_axis(rows_QM, np.maximum(best.rows, 0), axis=1), -1)
    return Ranking(rows, best.scores)


def standard(numbers: NDArray[np.float64]) -> tuple[float, float]:
    """(mean, standard deviation); the latter 0 for numbers that are all equal."""
    if not len(numbers) or numbers.max() == numbers.min():
        return (float(numbers[0]) if len(numbers) else 0.0), 0.0
    return float(numbers.mean()), float(numbers.std())


def _standardized(numbers: NDArray[np.float64], over: NDArray[np.bool_]) -> NDArray[np.float64]:
    """``numbers`` standardised by the mean and standard deviation of those in ``over``; 0 if those are all equal."""
    mean, deviation = standard(numbers[over])
    if deviation == 0:
        return np.zeros_like(numbers)
    return np.asarray((numbers - mean) / deviation, dtype=np.float64)


def _rows_of_part(part: Part, progress: Progress, run: Run, data: Data | None) -> _Rows:
    """The committed rows of ``part``, with places in the corpus of ``run``."""
    rows = _Rows(*(part.column(name) for name in ("source_row", "window_start", "source_digest")))
    kinds = [(source.manifest["corpus"].get("fields") or {}).get("kind") for source in (part, run)]
    return _behind_shards(part, run, rows, progress, data) if kinds[0] == "tokens" != kinds[1] else rows


def _behind_shards(part: Part, run: Run, rows: _Rows, progress: Progress, data: Data | None) -> _Rows:
    """The rows of a part that was built from token shards, with places in the corpus that was tokenized.

    The digest of every sample of the shards is compared with the part's. MismatchError if the shards are gone or
    differ.
    """
    try:
        folder = source_path(part.manifest, "data", f"part {part.name!r}", "data", data) or "-"
        shards = TokenShards.open(folder, verify_on_read=True)
        fields = ResolvedFields.from_json(part.manifest["corpus"]["fields"])
        samples = int(rows.source_row.max()) + 1
        digest = np.zeros(samples, dtype=np.uint64)
        with closing(progress.task("checking token shards", samples, unit="samples")) as task:
            for sample in Corpus.open(folder, fields).samples():
                if sample.source_row >= samples:
                    break
                digest[sample.source_row] = sample.digest()
                task.advance(1)
    except UsageError as error:
        raise MismatchError(
            f"part {part.name!r} was built from token shards, and without them nothing tells which rows of run "
            f"{run.name!r} they are: {error}. {_fingerprints(part, run)}"
        ) from error
    if samples > shards.samples or not np.array_equal(digest[rows.source_row], rows.digest):
        raise MismatchError(
            f"{folder} does not hold the tokens that part {part.name!r} was built from. {_fingerprints(part, run)}"
        )
    return _Rows(shards.source_row[rows.source_row], rows.window_start, shards.source_digest[rows.source_row])


def _refuse_other_samples(part: Part, run: Run, rows: _Rows, table: _Rows) -> None:
    """MismatchError unless the samples that part and run both have are equal, place by place, by their digests.

    Fingerprints of whole corpora would not do: a run on a few domains, or on the first samples, fits a part of the
    whole corpus; and samples in another order do not fit, although each of them is there.
    """
    source, first = np.unique(table.source_row, return_index=True)
    place = np.minimum(np.searchsorted(source, rows.source_row), len(source) - 1)
    common = source[place] == rows.source_row
    differ = common & (table.digest[first[place]] != rows.digest)
    if common.any() and not differ.any():
        return
    problem = (
        f"{len(np.unique(rows.source_row[differ])):,} of {len(np.unique(rows.source_row[common])):,} samples that both "
        f"have are not the same, the first at place {int(rows.source_row[differ].min())} of the corpus"
        if common.any()
        else "they have no sample in common"
    )
    raise MismatchError(
        f"part {part.name!r} and run {run.name!r} are of different corpora: {problem}. {_fingerprints(part, run)}"
    )


def _fingerprints(part: Part, run: Run) -> str:
    of_part, of_run = (source.manifest["corpus"].get("fingerprint") for source in (part, run))
    return f"Corpus of the part: {of_part}, of the run: {of_run}"


def _rows_at(rows: _Rows, places: NDArray[np.int64]) -> _Rows:
    return _Rows(rows.source_row[places], rows.window_start[places], rows.digest[places])


def _keys(rows: _Rows, others: _Rows, joined_by: JoinedBy) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The keys that two tables are joined by: the sample's place, or its rank and the window's first token
    (< 2**31).
    """
    if joined_by == "sample":
        return rows.source_row, others.source_row
    rank = np.unique(np.concatenate([rows.source_row, others.source_row]))
    keys, other_keys = (
        (np.searchsorted(rank, table.source_row) << 31) + table.window_start.astype(np.int64)
        for table in (rows, others)
    )
    return keys, other_keys
