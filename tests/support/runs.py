"""A training run without training: the same numbers for the same step in every process. Imported by tests, and by
processes that tests start and kill.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ghoststore.store import RowTable, Run, RunLayout, RunWriter, Store, create_run
from ghoststore.store.base.records import json_digest
from ghoststore.store.run.gradients import GradientLayout
from ghoststore.store.run.journal import Journal, append_entry, journal_path, read_arrays
from ghoststore.store.run.journal_files import opened

LAYOUT = RunLayout(
    steps=23, ranks=2, batch=3, span_steps=5, rows=40, groups=("law", "code"), blocks=("mlp", "attn"), dimension=4
)
"""Five spans, the last of three steps."""
SPANS = 5
Values = dict[str, Any]


def values(step: int, layout: RunLayout = LAYOUT) -> Values:
    """What one step appends: every third step with a place that has no sample, every fourth with the val loss."""
    rng = np.random.default_rng([7, step])
    given: Values = {}
    for spec in layout.arrays():
        if "gradient" in spec.name or spec.name == "val_step":
            continue
        numbers = rng.standard_normal(spec.columns)
        given[spec.name] = (numbers if spec.columns else float(numbers)) if spec.dtype.kind == "f" else 96 + step
    given["sample"] = rng.integers(0, layout.rows, (layout.ranks, layout.batch))
    if step % 3 == 0:
        given["sample"][1, 2] = -1
        for name in ("score", "loss", "group_score", "block_score", "vector"):
            if name in given:
                given[name][1, 2] = np.nan
    if step % 4:
        del given["val_loss"]
    if layout.gradients is not None and layout.gradients.holds(step):
        given |= gradients(step, layout, layout.gradients)
    return given


def gradients(step: int, layout: RunLayout, kept: GradientLayout) -> Values:
    """Of a step that keeps them: as its encoding has them, NaN where there is no sample."""
    rng = np.random.default_rng([8, step])
    vectors = rng.standard_normal((layout.ranks * layout.batch + 1, kept.dimension)).astype(np.float32)
    if step % 3 == 0:
        vectors[5] = np.nan
    stored, scale = kept.encode(vectors)
    shape = (layout.ranks, layout.batch, -1)
    given: Values = {"gradient": stored[:-1].reshape(shape), "val_gradient": stored[-1], "val_step": step - 1}
    if scale is not None:
        given |= {"gradient_scale": scale[:-1].reshape(shape), "val_gradient_scale": scale[-1]}
    return given


def row_table(rows: int = LAYOUT.rows) -> RowTable:
    place = np.arange(rows)
    return RowTable(
        sample_id=np.array([f"sample-{row}é" for row in place], dtype=object),
        domain=place % 3 - 1,
        source_row=place * 2,
        source_file=place // 30,
        source_offset=place * 100,
        source_digest=np.random.default_rng(3).integers(0, 2**64, rows, dtype=np.uint64),
        window_start=place % 2,
        n_tokens=place + 5,
    )


def manifest(layout: RunLayout = LAYOUT, **sections: Any) -> dict[str, Any]:
    return {
        "model": {"architecture": "GPT2-Tiny", "layers": 2},
        "tokenizer": {"fingerprint": "sha256:t"},
        "corpus": {"fingerprint": "sha256:c", "domains": ["sky", "earth"], "repeated_ids": None},
        "val": {"fingerprint": "sha256:v"},
        "training": {"seed": 0, "learning_rate": 0.001},
        "scoring": {"method": "GradDotProd"},
        "storage": layout.to_json(),
        "source": {"data": "train.jsonl"},
        "software": {"python": "3"},
        "compute": {"device": "cpu"},
        **sections,
    }


def make(store: Path, name: str = "run", layout: RunLayout = LAYOUT, **sections: Any) -> Run:
    """A run with no steps, or the one that is there."""
    path = Store.create(store).run_path(name)
    return create_run(path, manifest(layout, **sections), row_table(layout.rows))


def train(store: Path, name: str = "run", layout: RunLayout = LAYOUT, start: int = 0, stop: int | None = None) -> Run:
    """Append the steps from ``start`` to ``stop``, whatever is committed; the run as it is then."""
    run = make(store, name, layout)
    with RunWriter(run) as writer:
        for step in range(start, layout.steps if stop is None else stop):
            writer.append(step, values(step, layout))
    run.reload()
    return run


def expected(array: str, steps: list[int], layout: RunLayout = LAYOUT) -> np.ndarray:
    """The stored numbers of ``steps``."""
    (spec,) = [spec for spec in layout.arrays() if spec.name == array]
    steps = [step for step in steps if step % spec.every == 0]
    rows = [np.asarray(values(step, layout).get(array, np.nan)) for step in steps]
    return np.array(rows).astype(spec.dtype).reshape(len(steps), *spec.columns)


def files(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


JOURNALED = replace(LAYOUT, save_steps=5, span_steps=15)
"""Two spans: of three save intervals, and of one and the short one in which the run ends."""
KEEPING = replace(
    LAYOUT,
    save_steps=6,
    span_steps=12,
    dimension=None,
    gradients=GradientLayout(every=3, dtype="int8", groups=(("mlp", 0, 3), ("attn", 3, 8))),
)
"""Two spans of two save intervals, the last short; of two steps in each the gradients are kept."""


def journal(store: Path, span: int = 0) -> Path:
    """The journal of a span of the one run of ``store``."""
    return journal_path(store / "runs/run", span)


def run_of(store: Path) -> Run:
    """The one run of ``store``."""
    return Store.open(store).run()


def steps_of(run: Run) -> list[int]:
    """The committed steps; every array is what was appended for them."""
    steps = run.committed_steps().tolist()
    for spec in run.layout.arrays():
        np.testing.assert_array_equal(run.read_committed(spec.name), expected(spec.name, steps, run.layout))
    return steps


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The manifest of a run, and what its journals say of it, as if it had been made with ``change`` in it."""
    run = Run(path)
    entries = []
    for journal in run.journals.values():
        with opened(journal.path) as handle:
            names = {spec.name for spec in run.layout.arrays()}
            entries += [(journal, e.start, read_arrays(handle, journal, e, run.layout, names)) for e in journal.entries]
        journal.path.unlink()
    group = json.loads((path / "zarr.json").read_text())
    attributes = group["attributes"]
    change(attributes["manifest"])
    attributes["manifest_sha256"] = json_digest(attributes["manifest"])
    (path / "zarr.json").write_text(json.dumps(group))
    changed = Run(path)
    anew = {journal.span: Journal(path=journal.path, span=journal.span) for journal, _, _ in entries}
    for journal, start, arrays in entries:
        append_entry(changed, anew[journal.span], start, arrays)
