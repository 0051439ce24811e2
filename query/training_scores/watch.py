"""``ghoststore.watch``: a training run as it is written, frame by frame, each reading only what is new."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.progress import Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.store import WatchOptions
from ghoststore.store import Run, Store
from ghoststore.store.base.own import is_own
from ghoststore.store.base.writers import writers
from ghoststore.store.run.ranges import Steps, count, merged, without
from ghoststore.store.spans.commits import commit_path
from query.common.texts import texts_of
from query.training_scores.curves import STEP_ARRAYS, Curves
from query.training_scores.frame import Curve, DomainTrend, Extreme, Frame, RunState
from query.training_scores.steps import ScoreColumn, StepPiece, end_of, gaps_of, stream_steps
from query.training_scores.sums import ScoreSums, Units, best

STEPS_A_FRAME = 20_000
"""Steps that a frame reads at most: a long run appears at once, and fills."""
BINS, FEW_BINS, MANY_DOMAINS = 256, 64, 500
RECENT_SCORES = 2000
RECENT_STEPS = 50
HISTOGRAM_BINS = 32
EXTREMES = 5
WRITER = ("host", "pid", "command", "since", "touched", "alive")


@takes(WatchOptions)
def watch(options: WatchOptions) -> Iterator[Frame]:
    """Frames of a training run, one every ``interval`` seconds, until its last step is committed.

    With ``once`` a single one, of all that is committed. A store without the run is waited for, but not with ``once``.
    Every frame reads only the steps that are new; memory grows with the row table alone.

    Raises UsageError for a store that is none, for several runs without a name, and with ``once`` for a run that is not
    there; CorruptError for damaged steps.
    """
    if not options.interval > 0 or not math.isfinite(options.interval):
        raise UsageError(f"`interval` must be above 0, not {options.interval}")
    watcher = Watcher(options.store, options.run, text=options.text, data=options.data)
    while True:
        frame = watcher.look(None if options.once else STEPS_A_FRAME)
        if options.once and frame.waiting is not None and not watcher.opened:
            raise UsageError(frame.waiting)
        yield frame
        if options.once or (frame.finished and not frame.unread):
            return
        if not frame.unread:
            time.sleep(options.interval)


class _Heard(Silent):
    """Keeps what was noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class Watcher:
    """Running sums over a run; :meth:`look` takes in what was committed since."""

    def __init__(
        self, store: str | Path, run: str | None = None, *, text: bool = True, data: str | Path | None = None
    ) -> None:
        self._store = Store.open(store)
        self._name = run
        self._run: Run | None = None
        self._pending: list[Steps] = []
        """Ranges of committed steps that are not read yet."""
        self._texts_at_hand, self._data = text, data
        self._texts: dict[int, str | None] = {}
        self._ids: dict[int, tuple[str, int]] = {}
        """(id, source row) of units that were shown."""
        self._repeats: dict[str, bool] = {}
        """Of ids that were shown: whether several samples have them."""
        self._last: Frame | None = None
        self._heard = _Heard()

    @property
    def opened(self) -> bool:
        """Whether the run is there."""
        return self._run is not None

    def look(self, most_steps: int | None = None) -> Frame:
        """The run as it stands; at most ``most_steps`` steps are read (None: all)."""
        if self._run is None:
            waiting = self._open()
            if waiting is not None:
                return Frame(store=str(self._store.path), run=self._name, waiting=waiting)
        assert self._run is not None
        self._pending = merged([*self._pending, *self._run.reload()])
        chosen, self._pending = _first(self._pending, most_steps)
        if self._last is None or chosen:
            for piece in stream_steps(self._run, ScoreColumn("score"), chosen, also=STEP_ARRAYS):
                self._take(piece)
            self._last = self._frame(self._run)
        return replace(self._last, **_life(self._run, self._last))

    def _open(self) -> str | None:
        """Open the run; what is waited for if it is not there yet."""
        names = self._store.run_names()
        if self._name is None and not names:
            return (
                f"no training run in {self._store.path} yet; `ghoststore train --store {self._store.path} …` makes one"
            )
        if self._name is not None and self._name not in names:
            self._store.run_path(self._name)  # UsageError for what cannot be a name
            return f"no run {self._name!r} in {self._store.path} yet; it has: {', '.join(names) or 'none'}"
        run = self._store.run(self._name)
        self._run, self._pending = run, list(run.ranges)
        self._units = Units(run, "sample")
        self._sums = ScoreSums(len(self._units))
        self._curves = Curves(run, BINS if len(run.domains) <= MANY_DOMAINS else FEW_BINS)
        self._domain = self._units.domain
        self._recent_scores: deque[NDArray[np.float64]] = deque()
        self._recent_count = 0
        self._recent_steps: deque[tuple[float, float, float]] = deque(maxlen=RECENT_STEPS)
        self._latest: dict[str, float | None] = dict.fromkeys(("train_loss", "val_loss", "learning_rate"))
        return None

    def _take(self, piece: StepPiece) -> None:
        """Count some steps."""
        places = piece.places
        counts = self._sums.add(places, self._units.of(places.row))
        self._curves.add(piece, counts)
        if counts.any():
            newest = places.score[counts][-RECENT_SCORES:]
            self._recent_scores.append(newest)
            self._recent_count += len(newest)
        while self._recent_scores and self._recent_count - len(self._recent_scores[0]) >= RECENT_SCORES:
            self._recent_count -= len(self._recent_scores.popleft())
        for name in self._latest:
            finite = piece.data[name][np.isfinite(piece.data[name])]
            if len(finite):
                self._latest[name] = float(finite[-1])
        for step in zip(*(piece.data[name].tolist() for name in ("tokens", "seconds", "score_seconds")), strict=True):
            if math.isfinite(step[1]):
                self._recent_steps.append(step)

    def _frame(self, run: Run) -> Frame:
        end, sums, tally = end_of(run), self._sums, self._sums.tally
        unread = count(self._pending)
        shared: dict[str, Any] = {
            "store": str(self._store.path),
            "run": run.name,
            "planned": run.layout.steps,
            "steps": run.steps,
            "repeated_ids": run.repeated_ids,
        }
        if not run.ranges:
            return Frame(waiting=f"run {run.name!r} has no committed steps yet", **shared)
        tokens, seconds, scoring = (float(np.nansum([step[i] for step in self._recent_steps])) for i in range(3))
        recent = np.concatenate([*self._recent_scores, np.zeros(0)])
        histogram, edges = _histogram(recent)
        values = sums.values("cumulative")
        ranked = (best(values, EXTREMES), best(-values, EXTREMES))
        self._look_up([int(place) for places in ranked for place in places], run)
        left = run.layout.steps - end
        return Frame(
            **shared,
            unread=unread,
            finished=end == run.layout.steps,
            gaps=gaps_of(run, (0, end)),
            notes=list(self._heard.notes),
            seconds_left=left * seconds / len(self._recent_steps) if seconds and left else None,
            train_loss=self._latest["train_loss"],
            val_loss=self._latest["val_loss"],
            learning_rate=self._latest["learning_rate"],
            tokens_per_second=tokens / seconds if seconds else None,
            score_share=scoring / seconds if seconds else None,
            scored=tally.scored,
            left_out=tally.unscored + tally.not_finite + tally.without_learning_rate,
            negative_share=tally.negative_share,
            recent_scores=len(recent),
            recent_negative_share=float((recent < 0).mean()) if len(recent) else None,
            histogram=histogram,
            histogram_edges=edges,
            best=[self._extreme(int(place), values, run) for place in ranked[0]],
            worst=[self._extreme(int(place), values, run) for place in ranked[1]],
            domains=self._trends(),
            curve=self._curve(),
        )

    def _extreme(self, unit: int, values: NDArray[np.float64], run: Run) -> Extreme:
        domain = int(self._domain[unit])
        return Extreme(
            id=self._ids[unit][0],
            source_row=self._ids[unit][1],
            id_repeats=self._repeats[self._ids[unit][0]],
            domain=run.domains[domain] if domain >= 0 else None,
            value=float(values[unit]),
            times=int(self._sums.times[unit]),
            text=self._texts.get(unit),
        )

    def _look_up(self, units: Sequence[int], run: Run) -> None:
        """Ids of ``units``, and their texts where the corpus is a file that is read at a place."""
        new = [unit for unit in dict.fromkeys(units) if unit not in self._ids]
        if not new:
            return
        rows = self._units.first_row[new].tolist()
        ids, sources = (run.rows.read_rows(name, rows) for name in ("sample_id", "source_row"))
        self._ids |= zip(new, zip(map(str, ids), sources.tolist(), strict=True), strict=True)
        names = {str(name) for name in ids} - self._repeats.keys()
        repeated = _repeated_among(run, names)
        self._repeats |= {name: name in repeated for name in names}
        if self._texts_at_hand and self._is_quick(run):
            self._texts |= zip(new, texts_of(run, rows, self._heard, self._data), strict=True)
            self._texts_at_hand = not self._heard.notes

    def _is_quick(self, run: Run) -> bool:
        """Whether texts are read at their places. Where the corpus is gone there is nothing to say of them; a path that
        this user did not write is not looked for, and that is said.
        """
        source = run.manifest["source"]
        if str(source.get("form")).endswith((".gz", ".zst")):
            return False
        recorded = source.get("corpus")
        known = self._data or (recorded if is_own(run.manifest) else None)
        return recorded is not None if known is None else Path(known).exists()

    def _trends(self) -> list[DomainTrend]:
        times, weighted, negative = (self._curves.domain_sums(name) for name in ("times", "weighted", "negative"))
        filled = int(np.flatnonzero(times.any(1))[-1]) + 1 if times.any() else 0
        total = times.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            per_bin = weighted / times
        trends = [
            DomainTrend(
                domain=self._curves.names[place],
                times=int(total[place]),
                value_per_time=float(weighted[:, place].sum() / total[place]),
                negative_share=float(negative[:, place].sum() / total[place]),
                trend=_finite(per_bin[:filled, place]),
            )
            for place in np.flatnonzero(total).tolist()
        ]
        return sorted(trends, key=lambda one: -one.value_per_time)

    def _curve(self) -> Curve:
        curves = self._curves
        means = {name: curves.mean(name) for name in ("train_loss", "val_loss", "learning_rate")}
        filled = np.flatnonzero(np.any([np.isfinite(mean) for mean in means.values()], axis=0))
        count = int(filled[-1]) + 1 if len(filled) else 0
        return Curve(
            steps=curves.centres[:count].tolist(),
            **{name: _finite(mean[:count]) for name, mean in means.items()},
        )


def _finite(values: NDArray[np.float64]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _histogram(scores: NDArray[np.float64]) -> tuple[list[int], list[float]]:
    """Equal bins between the first and the last percent; 0 is an edge where it lies between them."""
    if not len(scores):
        return [], []
    low, high = (float(edge) for edge in np.quantile(scores, [0.01, 0.99]))
    width = (high - low) / HISTOGRAM_BINS or max(abs(low), 1e-12) / HISTOGRAM_BINS
    first, last = math.floor(low / width), math.ceil(high / width)
    edges = np.arange(first, max(last, first + 1) + 1) * width
    counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
    return counts.tolist(), edges.tolist()


def _repeated_among(run: Run, names: Collection[str]) -> set[str]:
    """Those of ``names`` that more than one sample of ``run`` has. Windows of one sample are one.

    One pass over the ids, a chunk in memory at a time; it ends where all are known to repeat.
    """
    first: dict[str, int] = {}
    repeated: set[str] = set()
    if run.repeated_ids is None:
        return repeated
    rows, size = len(run.rows), run.layout.row_arrays()[0].chunk_rows
    for start in range(0, rows, size):
        ids, sources = (run.rows.read(name, start, min(start + size, rows)) for name in ("sample_id", "source_row"))
        for name in [name for name in names if name not in repeated]:
            with_id = sources[ids == name]
            if len(with_id) and np.any(with_id != first.setdefault(name, int(with_id[0]))):
                repeated.add(name)
        if len(repeated) == len(names):
            break
    return repeated


def _first(ranges: list[Steps], most: int | None) -> tuple[list[Steps], list[Steps]]:
    """(the first ``most`` steps of ``ranges``, the others)."""
    chosen: list[Steps] = []
    left = count(ranges) if most is None else most
    for start, stop in ranges:
        if left > 0:
            chosen.append((start, min(stop, start + left)))
            left -= chosen[-1][1] - start
    return chosen, without(ranges, chosen)


def _age(run: Run) -> float | None:
    """Seconds since something was committed."""
    paths = [journal.path for journal in run.journals.values()]
    if run.spans:
        paths.append(commit_path(run.path, run.spans[-1]))
    times = []
    for path in paths:
        with suppress(FileNotFoundError):  # a journal goes when its span is committed
            times.append(path.stat().st_mtime)
    return max(0.0, time.time() - max(times)) if times else None


def _life(run: Run, frame: Frame) -> dict[str, Any]:
    """What a frame says of who writes the run, and whether anybody does."""
    known = sorted(writers(run.path), key=lambda writer: (writer.alive, writer.touched))
    writer, age = known[-1] if known else None, _age(run)
    state: RunState = "finished" if frame.finished else "running" if writer is not None and writer.alive else "stopped"
    silent = None
    if state == "stopped":
        ages = [age] if age is not None else []
        ages += [max(0.0, time.time() - writer.touched)] if writer is not None else []
        silent = min(ages, default=None)
    return {
        "state": state,
        "commit_age": age,
        "silent": silent,
        "seconds_left": frame.seconds_left if state == "running" else None,
        "writer": None if writer is None else {name: getattr(writer, name) for name in WRITER},
    }
