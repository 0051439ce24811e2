"""``train --keep-gradients``: the gradients of a run are those of a build at the same weights, nothing else changes,
and a training that is killed ends with the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import UsageError
from ghoststore.store import Store
from ghoststore.store.run.visits import stream_visits
from tests.support.parts import vectors_of
from tests.support.trainings import arrays_of, same_bits

if TYPE_CHECKING:
    from tests.support.trainings import Gym, Trained

PLAIN = ProjectionConfig(layers=("all",), rank_total=16, precondition="none")
SHORT: dict[str, Any] = {"max_steps": 8, "eval_interval": 4, "dot_prod_save_interval": 2}
GRADIENTS = ("gradient", "gradient_scale", "val_gradient", "val_gradient_scale", "val_step")


def built(gym: Gym, trained: Trained, folder: Path, step: int = 0) -> Any:
    """(vectors by source row, vectors of the val set) of a build at the weights before ``step``."""
    vectors = []
    for name in ("plain", "plain-val"):
        ghoststore.build(
            checkpoint=trained.checkpoint(step) if step else gym.models["tiny"],
            data=gym.data[name],
            store=folder / "store",
            name=name,
            projection=PLAIN,
            proj_dtype="float32",
            device="cpu",
        )
        vectors.append(vectors_of(Store.open(folder / "store").part(name)).astype(np.float64))
    return vectors


def error(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 4])
def test_vectors_are_those_of_a_build(gym: Gym, step: int, tmp_path: Path) -> None:
    """With exact scores and with sketched ones the same bytes; those of a part within the error of the encoding."""
    kept = {"keep_gradients": 4, "projection": PLAIN, "val_batch_size": 7, **SHORT}
    trained = gym.train(**kept, proj_dtype="float32", keep_checkpoints=None)
    rows, val = built(gym, trained, tmp_path, step)
    visits = list(stream_visits(trained.run, [(step, step + 1)], val=True))
    assert len(visits) == 1
    source = trained.run.rows.read_rows("source_row", visits[0].row)
    assert error(visits[0].vectors, rows[source]) < 1e-5
    assert visits[0].val is not None
    assert error(visits[0].val[0], val.mean(0)) < 1e-5
    coded = gym.train(**kept)
    (codes,) = stream_visits(coded.run, [(step, step + 1)])
    assert error(codes.vectors, rows[source]) < 0.02
    sketched = gym.train(**kept, score="sketched")
    assert same_bits(*({name: t.arrays()[name] for name in GRADIENTS} for t in (coded, sketched))) == []


def test_nothing_else_changes(gym: Gym) -> None:
    """Weights, scores and losses are those of a training that keeps none, bit for bit."""
    plain = gym.train(**SHORT)
    kept = gym.train(**SHORT, keep_gradients=2, projection=PLAIN)
    assert same_bits(kept.weights(), plain.weights()) == []
    arrays = kept.arrays()
    assert arrays["gradient"].shape[0] == 4
    assert same_bits({name: arrays[name] for name in plain.arrays()}, plain.arrays()) == []


@pytest.mark.slow
def test_accumulation_and_old_val_gradients(gym: Gym) -> None:
    """Micro-batches stand side by side; each step has the val gradient that it was scored against."""
    given = {
        **SHORT,
        "keep_gradients": 1,
        "projection": PLAIN,
        "val_refresh_interval": 3,
        "gradient_accumulation_steps": 2,
    }
    run = gym.train(**given).run
    assert run.read_committed("gradient").shape == (8, 1, 6, run.layout.gradients.columns)  # type: ignore[union-attr]
    # After a checkpoint the val gradient is computed anew, as in a training that resumes.
    assert run.read_committed("val_step").tolist() == [0, 0, 0, 3, 4, 4, 6, 6]
    val = run.read_committed("val_gradient")
    assert [bool((val[step] == val[step - 1]).all()) for step in range(1, 8)] == [
        True,
        True,
        False,
        False,
        True,
        False,
        True,
    ]
    whole = gym.train(**{**given, "gradient_accumulation_steps": 1, "batch_size": 6}).run
    first = [next(iter(stream_visits(each, [(0, 1)]))) for each in (run, whole)]
    order = [np.argsort(visits.row) for visits in first]
    assert error(first[0].vectors[order[0]], first[1].vectors[order[1]]) < 0.02


OPTIONS = ("--keep-gradients", "2", "--proj-rank-total", "16")


@pytest.fixture(scope="module")
def whole(gym: Gym) -> Path:
    folder = gym.folder / "whole-keeping"
    assert gym.run(folder, *OPTIONS).code == 0
    return folder


@pytest.mark.kill
@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "number"),
    [
        (r"journal/00000000\.log$", 3),
        (r"\.checkpoint-9\.[^/]*tmp/training_state/pending", 1),
        (r"commits/\.00000000\.gradient\.", 1),
        (r"commits/\.00000000\.json", 1),
    ],
)
def test_killed(gym: Gym, whole: Path, path: str, number: int, tmp_path: Path) -> None:
    fault = {"call": "fsync", "path": path, "when": "before", "number": number, "act": "kill"}
    assert gym.run(tmp_path, *OPTIONS, fault=fault).code == -9
    again = gym.run(tmp_path, *OPTIONS)
    assert again.code == 0, again.err
    runs = [Store.open(folder / "store").run("run") for folder in (tmp_path, whole)]
    assert runs[0].complete
    assert same_bits(*map(arrays_of, runs)) == []
    assert ghoststore.verify(tmp_path / "store").sound


def test_what_cannot_be_is_refused(gym: Gym, tmp_path: Path) -> None:
    for options, words in (
        ({"projection": PLAIN}, "projection options belong to `score=sketched` and `keep_gradients`"),
        ({"keep_gradients": 0}, "`keep_gradients` must be at least 1"),
        ({"proj_dtype": "float16"}, "`proj_dtype=float16` belongs to `keep_gradients`"),
        ({"keep_gradients": 1, "proj_dtype": "int4"}, "`proj_dtype` 'int4' is unknown"),
        ({"keep_gradients": 1, "method": "Regular"}, "`keep_gradients` belongs to `method=GradDotProd`"),
    ):
        with pytest.raises(UsageError, match=words):
            gym.fresh(tmp_path, **options)
    said = gym.run(tmp_path, "--keep-gradients", "0")
    assert (said.code, "--keep-gradients must be at least 1" in said.err) == (2, True)
