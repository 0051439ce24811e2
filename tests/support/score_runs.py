"""A training run without training, with everything that a run can have in it: several ranks and spans, a gap, repeated
samples, empty places, scores that are NaN or infinite, groups, blocks, windows. And the slow reference of its values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ghoststore.store import RowTable, Run, RunLayout, RunWriter, Store, create_run
from ghoststore.store.base.own import remember

BLOCKS = ("transformer.h.0.mlp.c_fc", "transformer.h.0.attn.c_proj", "transformer.h.10.mlp.c_fc")
GROUPS = ("law", "code")
DOMAINS = ("sky", "earth")
ROWS, SAMPLES = 24, 15
LAYOUT = RunLayout(steps=23, ranks=2, batch=3, span_steps=5, rows=ROWS, groups=GROUPS, blocks=BLOCKS, dimension=None)
GAP = (10, 15)
"""Steps that are never committed."""
NO_RATE = 6
"""A step without a learning rate."""
Values = dict[str, Any]


def values(step: int, layout: RunLayout = LAYOUT) -> Values:
    """What one step appends. Sample 0 is in every step, sometimes twice."""
    rng = np.random.default_rng([11, step])
    shape = (layout.ranks, layout.batch)
    sample = rng.integers(0, layout.rows, shape)
    sample[0, 0] = 0
    if step % 4 == 0:
        sample[1, 0] = 0
    if step % 3 == 0:
        sample[1, 2] = -1
    given: Values = {"sample": sample}
    for name, width in (("score", ()), ("loss", ()), ("group_score", (2,)), ("block_score", (3,))):
        if name in ("group_score", "block_score") and not getattr(layout, name.replace("_score", "s")):
            continue
        numbers = rng.standard_normal((*shape, *width)) * 3 + 0.5
        if step % 5 == 1:
            numbers[0, 1] = np.nan
        if step % 7 == 2:
            numbers[0, 2] = np.inf
        if step % 7 == 3:
            numbers[0, 2] = -np.inf
        numbers[sample < 0] = np.nan
        given[name] = numbers
    return given | {
        "learning_rate": np.nan if step == NO_RATE else 1e-3 / (step + 1),
        "train_loss": 5.0 - step / 10,
        "val_loss": 6.0 - step / 10 if step % 4 == 3 else np.nan,
        "tokens": 100 + step,
        "seconds": 0.5,
        "score_seconds": 0.125,
    }


def row_table(rows: int = ROWS, samples: int = SAMPLES, **columns: Any) -> RowTable:
    """Rows in the order of the corpus; the first samples have two windows each."""
    two = rows - samples
    source = np.sort(np.concatenate([np.arange(samples), np.arange(two)]))
    start = np.concatenate([[0], (source[1:] == source[:-1]) * 31])
    given: dict[str, Any] = {
        "sample_id": np.array([f"s{row}" for row in source], dtype=object),
        "domain": source % 3 - 1,
        "source_row": source,
        "source_file": source * 0,
        "source_offset": source * 0 - 1,
        "source_digest": source.astype(np.uint64) + 7,
        "window_start": start,
        "n_tokens": source * 0 + 32,
    }
    return RowTable(**(given | columns))


def make(
    store: Path, name: str = "run", layout: RunLayout = LAYOUT, table: RowTable | None = None, **sections: Any
) -> Run:
    """A run without steps, or the one that is there. ``sections`` replace those of the manifest."""
    manifest: dict[str, Any] = {
        "model": {},
        "tokenizer": {"fingerprint": "sha256:t"},
        "corpus": {"fingerprint": "sha256:c", "domains": list(DOMAINS), "repeated_ids": None},
        "val": {},
        "training": {},
        "scoring": {},
        "storage": layout.to_json(),
        "source": {"data": "train.jsonl"},
        "software": {},
        "compute": {},
        **sections,
    }
    run = create_run(Store.create(store).run_path(name), manifest, table or row_table())
    remember(run.manifest, run.manifest["source"], run.path)  # as a training does
    return run


def append(run: Run, start: int, stop: int) -> None:
    """Append steps ``start`` to ``stop``; those of GAP are skipped."""
    with RunWriter(run) as writer:
        for step in range(start, stop):
            if GAP[0] <= step < GAP[1]:
                continue
            if step >= GAP[1] and writer.next_step < step:
                writer.skip_to(step)
            writer.append(step, values(step, run.layout))


def opened_before_its_span(store: Path) -> Run:
    """A run as it was opened when a journal had its steps; the span that holds them now has replaced it."""
    run = make(store, layout=replace(LAYOUT, span_steps=10, save_steps=5))
    append(run, 0, 5)
    opened = Store.open(store).run("run")
    assert opened.journals
    assert not opened.spans
    append(run, 5, 10)
    return opened


def whole(store: Path, name: str = "run") -> Run:
    """The run with all its steps, those of GAP aside."""
    run = make(store, name)
    append(run, 0, LAYOUT.steps)
    run.reload()
    return run


def committed() -> list[int]:
    return [step for step in range(LAYOUT.steps) if not GAP[0] <= step < GAP[1]]


@dataclass
class Reference:
    """The slow way: every place of every step, one after another."""

    steps: list[int]
    array: str = "score"
    places: tuple[int, ...] | None = None
    unit: str = "sample"
    weight: str = "unit"
    """What a step counts with: ``unit`` or ``learning-rate``."""
    rated: bool = True
    """Whether a score needs a weight."""

    def places_of(self, step: int) -> Iterator[tuple[int, int, float, float, float]]:
        """(rank, row, score, learning rate, loss) as stored."""
        given = values(step)
        for rank, place in np.ndindex(LAYOUT.ranks, LAYOUT.batch):
            row = int(given["sample"][rank, place])
            if row >= 0:
                stored = given[self.array].astype(np.float32)[rank, place]
                score = float(stored) if self.places is None else sum(float(stored[i]) for i in self.places)
                loss = float(np.float32(given["loss"][rank, place]))
                yield rank, row, score, float(given["learning_rate"]), loss

    def factor(self, step: int) -> float:
        """The weight of a step."""
        if self.weight == "learning-rate":
            return float(values(step)["learning_rate"])
        sizes = [abs(score) for _, _, score, _, _ in self.places_of(step) if np.isfinite(score)]
        return len(sizes) / sum(sizes)

    def counts(self, score: float, factor: float) -> bool:
        return bool(np.isfinite(score) and (np.isfinite(factor) or not self.rated))

    def key(self, row: int) -> int:
        return int(row_table().source_row[row]) if self.unit == "sample" else row

    def scores(self) -> Mapping[int, list[tuple[int, float, float]]]:
        """By unit: (step, score, weight of the step) of every score that counts."""
        found: dict[int, list[tuple[int, float, float]]] = defaultdict(list)
        for step in self.steps:
            factor = self.factor(step)
            for _, row, score, _, _ in self.places_of(step):
                if self.counts(score, factor):
                    found[self.key(row)].append((step, score, factor))
        return found

    def values(self, kind: str) -> dict[int, float]:
        """By unit, those with a score alone."""
        how = {
            "cumulative": lambda seen: sum(score * factor for _, score, factor in seen),
            "mean": lambda seen: sum(score * factor for _, score, factor in seen) / len(seen),
            "sum": lambda seen: sum(score for _, score, _ in seen),
            "last": lambda seen: seen[-1][1],
        }[kind]
        return {unit: how(seen) for unit, seen in self.scores().items()}


def first_row(key: int, unit: str) -> int:
    """The row that stands for a unit."""
    return int(np.flatnonzero(row_table().source_row == key)[0]) if unit == "sample" else key


def domain_of(key: int, unit: str) -> str | None:
    place = int(row_table().domain[first_row(key, unit)])
    return DOMAINS[place] if place >= 0 else None


def run_on(
    store: Path, name: str, source: np.ndarray, digest: np.ndarray, start: np.ndarray | None = None, **sections: Any
) -> np.ndarray:
    """A run whose rows are these, each scored in 2 of 3 steps or so; the value of each row (NaN: not scored), every
    step scaled to a mean |score| of 1.
    """
    rows = len(source)
    table = RowTable(
        sample_id=np.array([f"row-{i}" for i in source], dtype=object),
        domain=source * 0 - 1,
        source_row=source,
        source_file=source * 0,
        source_offset=source * 0 - 1,
        source_digest=digest,
        window_start=source * 0 if start is None else start,
        n_tokens=source * 0 + 5,
    )
    layout = RunLayout(steps=3, ranks=1, batch=rows, span_steps=3, rows=rows)
    sections = {"corpus": {"fingerprint": "sha256:other", "domains": None, "repeated_ids": None}} | sections
    run = make(store, name, layout, table, **sections)
    rng, value, times = np.random.default_rng(3), np.zeros(rows), np.zeros(rows)
    with RunWriter(run) as writer:
        for step in range(3):
            score = rng.standard_normal(rows).astype(np.float32)
            score[rng.random(rows) < 0.6] = np.nan
            eta = 0.1 * (step + 1)
            counts = np.isfinite(score)
            value[counts] += score[counts] / np.abs(score[counts]).mean(dtype=np.float64)
            times += counts
            writer.append(step, {"sample": np.arange(rows)[None], "score": score[None], "learning_rate": eta})
    value[times == 0] = np.nan
    return value
