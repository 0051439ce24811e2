"""``ghoststore.watch``: follows a training run while it is written. Each frame reads only the new steps."""

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

from ghoststore.corpus import source_of
from ghoststore.corpus.locate import exists
from ghoststore.errors import UsageError
from ghoststore.progress import Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.shared import Data, WeightOption, in_memory
from ghoststore.settings.store import WatchOptions
from ghoststore.store import Run, Store
from ghoststore.store.base.object_path import ObjectPath
from ghoststore.store.base.own import is_own
from ghoststore.store.base.writers import writers
from ghoststore.store.run.ranges import Steps, count, merged, without
from ghoststore.store.spans.commits import commit_path
from query.common.texts import texts_of
from query.training_scores.chosen import RECENT_STEPS, Chosen
from query.training_scores.curves import STEP_ARRAYS, Curves
from query.training_scores.frame import Curve, DomainTrend, Extreme, Frame, RunState
from query.training_scores.spread import Spread, finite_list
from query.training_scores.steps import ScoreColumn, StepPiece, end_of, gaps_of, stream_steps
from query.training_scores.sums import ScoreSums, Units, best
from query.training_scores.weights import StepWeights

STEPS_A_FRAME = 20_000
"""Most steps that one frame reads, so that the first frame of a long run appears at once and later ones complete it."""
BINS, FEW_BINS, MANY_DOMAINS = 256, 64, 500
RECENT_SCORES = 2000
HISTOGRAM_BINS = 32
EXTREMES = 20
"""Best and worst samples of a frame: as many as a tall terminal shows."""
WRITER = ("host", "pid", "command", "since", "touched", "alive")


@takes(WatchOptions)
def watch(options: WatchOptions) -> Iterator[Frame]:
    """Frames of a training run, one every ``interval`` seconds, until its last step is committed.

    With ``once`` a single one, of all that is committed. A store without the run is waited for, but not with ``once``.
    Every frame reads only the steps that are new; memory grows with the row table alone.

    Of several runs, without a name, it follows the one that a process writes, or the newest.

    Raises UsageError for a store that is none, and with ``once`` for a run that is not there; CorruptError for damaged
    steps.
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


def newest_of(names: Sequence[str], store: Store) -> str:
    """Of the runs ``names`` of ``store`` the one that a process writes, or else the one that was written last."""

    def age(name: str) -> tuple[bool, float]:
        folder = store.run_path(name)
        if isinstance(folder, ObjectPath):  # where the entries of a journal are objects, and folders have no times
            paths: list[Path] = [path for _, path in folder.below()]
        else:
            inside = _entries(folder)
            paths = [folder, *inside, *(path for entry in inside for path in _entries(entry))]
        return any(writer.alive for writer in writers(folder)), max(_modified(*paths), default=0.0)

    return names[0] if len(names) == 1 else max(names, key=age)


class _NoteList(Silent):
    """A progress that collects its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class Watcher:
    """Running sums over a run. :meth:`look` adds what was committed since the last call."""

    def __init__(
        self,
        store: str | Path,
        run: str | None = None,
        *,
        text: bool = True,
        data: Data | None = None,
        spread: bool = False,
    ) -> None:
        self._store = Store.open(store)
        self._name = run
        self._run: Run | None = None
        self._pending: list[Steps] = []
        """Ranges of committed steps to read."""
        self._texts_at_hand, self._data = text, data
        self._texts: dict[int, str | None] = {}
        self._ids: dict[int, tuple[str, int]] = {}
        """(id, source row) of the units looked up so far."""
        self._repeats: dict[str, bool] = {}
        """For each id looked up so far whether several samples have it."""
        self._last: Frame | None = None
        self._notes = _NoteList()
        self._spread: Spread | None = None
        self._wants_spread = spread

    @property
    def opened(self) -> bool:
        """Whether the run is there."""
        return self._run is not None

    def look(self, most_steps: int | None = None) -> Frame:
        """A frame of the run as it is now. Reads at most ``most_steps`` new steps (None: all)."""
        if self._run is None:
            waiting = self._open()
            if waiting is not None:
                return Frame(store=str(self._store.path), run=self._name, waiting=waiting)
        assert self._run is not None
        self._pending = merged([*self._pending, *self._run.reload()])
        chosen, self._pending = _first(self._pending, most_steps)
        if self._last is None or chosen:
            column, weights = ScoreColumn("score"), self._weights
            also = (*STEP_ARRAYS, *(() if self._spread is None else self._spread.also))
            for piece in stream_steps(self._run, column, chosen, weights=weights, also=also):
                self._add(piece)
            self._last = self._frame(self._run)
        fields = writer_fields(self._run, finished=self._last.finished)
        left = None if fields["state"] == "stopped" else self._last.seconds_left
        return replace(self._last, **fields, seconds_left=left)

    def _open(self) -> str | None:
        """Open the run. Returns None, or what to wait for if the run does not exist yet."""
        names = self._store.run_names()
        if self._name is None and not names:
            return (
                f"no training run in {self._store.path} yet; `ghoststore train --store {self._store.path} …` makes one"
            )
        if self._name is not None and self._name not in names:
            self._store.run_path(self._name)  # UsageError for what cannot be a name
            return f"no run {self._name!r} in {self._store.path} yet; it has: {', '.join(names) or 'none'}"
        name = self._name or newest_of(names, self._store)
        self._runs = len(names) if self._name is None else 1
        run = self._store.run(name)
        self._run, self._pending = run, list(run.ranges)
        self._units = Units(run, "sample")
        self._sums = ScoreSums(len(self._units))
        self._weights = StepWeights(run, WeightOption.weight, (0, run.layout.steps))
        self._curves = Curves(run, BINS if len(run.domains) <= MANY_DOMAINS else FEW_BINS)
        self._domain = self._units.domain
        self._recent_scores: deque[NDArray[np.float64]] = deque()
        self._recent_count = 0
        self._recent_steps: deque[tuple[float, float, float]] = deque(maxlen=RECENT_STEPS)
        self._chosen = Chosen(run) if run.layout.weights else None
        self._spread = Spread(run) if self._wants_spread else None
        self._latest: dict[str, float | None] = dict.fromkeys(("train_loss", "val_loss", "learning_rate"))
        return None

    def _add(self, piece: StepPiece) -> None:
        """Add the steps of ``piece`` to all sums."""
        places = piece.places
        counts = self._sums.add(places, self._units.of(places.row))
        self._curves.add(piece, counts)
        if self._chosen is not None:
            self._chosen.add(piece)
        if self._spread is not None:
            self._spread.add(piece, counts)
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
            "runs": self._runs,
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
        remaining = run.layout.steps - end
        chosen = {} if self._chosen is None else self._chosen.fields()
        return Frame(
            **shared,
            unread=unread,
            finished=end == run.layout.steps,
            gaps=gaps_of(run, (0, end)),
            notes=list(self._notes.notes),
            seconds_left=remaining * seconds / len(self._recent_steps) if seconds and remaining else None,
            train_loss=self._latest["train_loss"],
            val_loss=self._latest["val_loss"],
            learning_rate=self._latest["learning_rate"],
            tokens_per_second=tokens / seconds if seconds else None,
            seconds_per_step=seconds / len(self._recent_steps) if seconds else None,
            score_share=scoring / seconds if seconds else None,
            scored=tally.scored,
            left_out=tally.unscored + tally.not_finite + tally.without_learning_rate,
            negative_share=tally.negative_share,
            **chosen,
            recent_scores=len(recent),
            recent_negative_share=float((recent < 0).mean()) if len(recent) else None,
            histogram=histogram,
            histogram_edges=edges,
            best=[self._extreme(int(place), values, run) for place in ranked[0]],
            worst=[self._extreme(int(place), values, run) for place in ranked[1]],
            domains=self._trends(),
            curve=self._curve(),
            spread=None if self._spread is None else self._spread.frame(),
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
        """Read the ids of ``units`` and, if that is quick, their texts."""
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
            self._texts |= zip(new, texts_of(run, rows, self._notes, self._data), strict=True)
            self._texts_at_hand = not self._notes.notes

    def _is_quick(self, run: Run) -> bool:
        """Whether to look for texts: not in compressed files, which would be read from the start, and not if the corpus
        is gone. If somebody else may have written its path, ``texts_of`` refuses it with a note.
        """
        source = run.manifest["source"]
        if str(source.get("form")).endswith((".gz", ".zst")):
            return False
        recorded = source.get("corpus")
        path = self._data or (recorded if is_own(run.manifest) else None)
        return recorded is not None if path is None else in_memory(path) or exists(str(source_of(path)))

    def _trends(self) -> list[DomainTrend]:
        times, weighted, negative = (self._curves.domain_sums(name) for name in ("times", "weighted", "negative"))
        filled = int(np.flatnonzero(times.any(1))[-1]) + 1 if times.any() else 0
        total = times.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            per_bin = weighted / times
        value, below = (sums.sum(0) / np.maximum(total, 1) for sums in (weighted, negative))
        shares = [None] * len(total) if self._chosen is None else finite_list(self._chosen.shares)
        trends = [
            DomainTrend(
                domain=self._curves.names[place],
                times=int(total[place]),
                value_per_time=float(value[place]) if total[place] else None,
                negative_share=float(below[place]) if total[place] else None,
                kept_share=shares[place],
                trend=finite_list(per_bin[:filled, place]),
            )
            for place in range(len(total))
            if total[place] or shares[place] is not None
        ]
        least = -math.inf
        return sorted(trends, key=lambda trend: -(least if trend.value_per_time is None else trend.value_per_time))

    def _curve(self) -> Curve:
        curves = self._curves
        means = {name: curves.mean(name) for name in ("train_loss", "val_loss", "learning_rate")}
        filled = np.flatnonzero(np.any([np.isfinite(mean) for mean in means.values()], axis=0))
        count = int(filled[-1]) + 1 if len(filled) else 0
        return Curve(
            steps=curves.centres[:count].tolist(),
            **{name: finite_list(mean[:count]) for name, mean in means.items()},
        )


def _histogram(scores: NDArray[np.float64]) -> tuple[list[int], list[float]]:
    """(counts, edges) of equal bins between the 1st and the 99th percentile. If 0 lies between these, it is an edge."""
    if not len(scores):
        return [], []
    low, high = (float(edge) for edge in np.quantile(scores, [0.01, 0.99]))
    width = (high - low) / HISTOGRAM_BINS or max(abs(low), 1e-12) / HISTOGRAM_BINS
    first, last = math.floor(low / width), math.ceil(high / width)
    edges = np.arange(first, max(last, first + 1) + 1) * width
    counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
    return counts.tolist(), edges.tolist()


def _repeated_among(run: Run, names: Collection[str]) -> set[str]:
    """Those of the ids ``names`` that more than one sample of ``run`` has. Windows of one sample count as one.

    Reads the ids once, chunk by chunk, and stops as soon as all of ``names`` are known to repeat.
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
    """Split ``ranges`` into (the first ``most`` steps, the remaining ones)."""
    chosen: list[Steps] = []
    remaining = count(ranges) if most is None else most
    for start, stop in ranges:
        if remaining > 0:
            chosen.append((start, min(stop, start + remaining)))
            remaining -= chosen[-1][1] - start
    return chosen, without(ranges, chosen)


def _age(run: Run) -> float | None:
    """Seconds since the last commit; None without any."""
    times: list[float] = []
    for span, journal in run.journals.items():
        path = journal.path
        # In an object store a journal is a folder of its entries.
        entries = (entry for _, entry in path.below()) if isinstance(path, ObjectPath) else [path]
        # It is removed when its span is committed.
        times += _modified(*entries) or _modified(commit_path(run.path, span))
    if run.spans:
        times += _modified(commit_path(run.path, run.spans[-1]))
    return max(0.0, time.time() - max(times)) if times else None


def _entries(folder: Path) -> list[Path]:
    """What is in it; nothing if it is no folder, or gone: a run that is at work removes some."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _modified(*paths: Path) -> list[float]:
    """When those of ``paths`` that are there were written: a run that is at work replaces files."""
    times = []
    for path in paths:
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return times


def writer_fields(run: Run, *, finished: bool) -> dict[str, Any]:
    """The fields of a frame about the writer of the run: whether there is one, and since when there is none.

    In an object store nothing shows who writes: an unfinished run has no ``state`` there, but the age of its commit.
    """
    by_age = sorted(writers(run.path), key=lambda writer: (writer.alive, writer.touched))
    writer, age = by_age[-1] if by_age else None, _age(run)
    state: RunState | None = "running" if writer is not None and writer.alive else "stopped"
    if finished or isinstance(run.path, ObjectPath):
        state = "finished" if finished else None
    silent = None
    if state == "stopped":
        ages = [age] if age is not None else []
        ages += [max(0.0, time.time() - writer.touched)] if writer is not None else []
        silent = min(ages, default=None)
    return {
        "state": state,
        "commit_age": age,
        "silent": silent,
        "writer": None if writer is None else {name: getattr(writer, name) for name in WRITER},
    }
