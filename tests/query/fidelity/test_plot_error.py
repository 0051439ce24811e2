"""The curve over parts: its numbers by brute force and by theory, the four references, the files, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.torch import load_file

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import CheckpointError, MismatchError, UsageError
from ghoststore.progress import Silent
from query.fidelity.sample import SampleSpec
from tests.support.notes import Notes
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

ROWS, VALS, CORPUS = 60, 12, 80
PARTS = {
    # Names that say nothing, and one that lies: parts are found by their manifests.
    "a": ProjectionConfig(precondition="none", rank_total=4),
    "rank-4": ProjectionConfig(precondition="none", rank_total=16, seed=3),
    "c": ProjectionConfig(precondition="none", rank_total=64),
    "d": ProjectionConfig(precondition="none", rank_total=256, seed=5),
    "e": ProjectionConfig(precondition="none", rank_total=256, compress=96),
    "f": ProjectionConfig(precondition="none", rank_total=64, kind="rademacher", seed=8),
    "whole": ProjectionConfig(precondition="none", rank_total="full"),
}


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("error")
    data = lab.write(folder / "train.jsonl", lab.sample_rows(CORPUS, 1))
    shutil.copytree(lab.checkpoint, folder / "model")
    for name, projection in PARTS.items():
        build(folder, name, projection=projection, data=data)
    return folder / "store"


def build(folder: Path, name: str, **settings: Any) -> None:
    """Of exact numbers: the errors are those of projections alone."""
    settings = {"checkpoint": folder / "model", "store": folder / "store", "device": "cpu", "span_rows": 16} | settings
    ghoststore.build(name=name, proj_dtype="float32", **settings)


def curve_of(store: Path, out: Path, **settings: Any) -> ghoststore.ErrorCurve:
    settings = {"rows": ROWS, "val_samples": VALS, "device": "cpu"} | settings
    return ghoststore.plot_error(store=store, out=out, **settings)


@pytest.fixture(scope="module")
def exact(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """(rows of the corpus, numbers) float64, by `full-gradients`: of all parameters and of the layers."""
    found = {}
    for parameters in ("all", "projected"):
        out = tmp_path_factory.mktemp("gradients") / parameters
        ghoststore.full_gradients(
            checkpoint=store.parent / "model",
            data=store.parent / "train.jsonl",
            out=out,
            max_samples=CORPUS,
            parameters=parameters,
            device="cpu",
        )
        found[parameters] = load_file(out / "gradients-00000.safetensors")["gradients"].double().numpy()
    return found


@pytest.mark.thin(1)
@pytest.mark.parametrize(("reference", "parameters"), [("full_layers", "projected"), ("full", "all")])
def test_numbers_equal_brute_force(
    store: Path, exact: dict[str, np.ndarray], reference: str, parameters: Any, tmp_path: Path
) -> None:
    curve = curve_of(store, tmp_path / "error.png", reference=reference, metric="dot")
    assert [point.part for point in curve.points] == ["a", "rank-4", "e", "c", "f", "d", "whole"]
    opened = ghoststore.Store.open(store)
    ranked, vals = SampleSpec(rows=ROWS, val_samples=VALS).choose(opened.part("a"), Silent())
    gradients = exact[parameters]
    truth = gradients[vals] @ gradients[ranked].T
    lengths = np.linalg.norm(gradients[vals], axis=1)[:, None] * np.linalg.norm(gradients[ranked], axis=1)
    for point in curve.points:
        vectors = vectors_of(opened.part(point.part), 0, CORPUS).astype(np.float64)
        errors = np.abs(vectors[vals] @ vectors[ranked].T - truth) / lengths
        assert point.mean_error.value == pytest.approx(errors.mean(), rel=1e-3, abs=1e-6)
        assert point.rms_error.value == pytest.approx(np.sqrt(np.square(errors).mean()), rel=1e-3, abs=1e-6)
        assert point.mean_error.low <= point.mean_error.value <= point.mean_error.high
        assert point.numbers == vectors.shape[1]
        assert (point.theory_rms is not None) == (reference == "full_layers" and point.part != "f")
    whole = curve.points[-1]
    if reference == "full_layers":
        assert whole.mean_error.value < 1e-6
        assert whole.theory_rms == 0
        assert whole.agreement.spearman.value > 1 - 1e-5
    else:
        assert whole.mean_error.value > 1e-3


@pytest.mark.slow
def test_measured_lies_on_theory(store: Path, tmp_path: Path) -> None:
    """One draw of each projection scatters about the standard deviation of the theory, and falls with the rank."""
    points = {point.part: point for point in curve_of(store, tmp_path / "error.png").points}
    ratios = [
        points[name].rms_error.value / (points[name].theory_rms or np.nan) for name in ("a", "rank-4", "c", "d", "e")
    ]
    assert all(0.4 < ratio < 2.5 for ratio in ratios), ratios
    assert 0.6 < np.exp(np.mean(np.log(ratios))) < 1.6, ratios
    falling = [points[name].theory_rms or 0.0 for name in ("a", "rank-4", "c", "d", "whole")]
    assert falling == sorted(falling, reverse=True)
    dense = [points[name].theory_dense for name in ("a", "c", "d")]
    assert dense == pytest.approx([np.sqrt(2 / (np.pi * points[name].numbers)) for name in ("a", "c", "d")])


@pytest.mark.slow
def test_many_draws_lie_on_theory(lab: Lab, store: Path, tmp_path: Path) -> None:
    """Over twelve seeds of one rank the root mean square of the errors is that of the theory."""
    data = lab.write(tmp_path / "train.jsonl", lab.sample_rows(40, 1))
    for seed in range(12):
        projection = ProjectionConfig(precondition="none", rank_total=36, seed=seed)
        build(tmp_path, f"seed-{seed}", checkpoint=store.parent / "model", projection=projection, data=data)
    curve = curve_of(tmp_path / "store", tmp_path / "error.png", rows=30, val_samples=10)
    measured = np.sqrt(np.mean([point.rms_error.value**2 for point in curve.points]))
    assert measured == pytest.approx(curve.points[0].theory_rms, rel=0.3)


@pytest.mark.slow
def test_against_a_part_of_some_rank(store: Path, tmp_path: Path) -> None:
    """The part is known by its manifest: `rank-4` is of rank 16."""
    curve = curve_of(store, tmp_path / "error.png", reference="rank=16", part=["a", "rank-4", "c"], metric="dot")
    assert [point.part for point in curve.points] == ["a", "c"]
    opened = ghoststore.Store.open(store)
    parts = [opened.part(name) for name in ("a", "rank-4", "c")]
    ranked, vals = SampleSpec(rows=ROWS, val_samples=VALS).choose(parts[0], Silent())
    a, target, _ = (vectors_of(part, 0, CORPUS).astype(np.float64) for part in parts)
    lengths = np.linalg.norm(target[vals], axis=1)[:, None] * np.linalg.norm(target[ranked], axis=1)
    errors = np.abs(a[vals] @ a[ranked].T - target[vals] @ target[ranked].T) / lengths
    assert curve.points[0].mean_error.value == pytest.approx(errors.mean(), rel=1e-4)
    assert curve.points[0].theory_rms is None
    for rank, problem in ((64, "2 parts were"), (7, "no part was")):
        with pytest.raises(UsageError, match=f"`reference=rank={rank}`: {problem} built with a rank total of {rank}"):
            curve_of(store, tmp_path / "other.png", reference=f"rank={rank}")
    with pytest.raises(UsageError, match=r"no other part.*: build more parts"):
        curve_of(store, tmp_path / "other.png", reference="rank=4", part="a")


def test_one_part_is_no_curve(store: Path, tmp_path: Path) -> None:
    for parts, points in (("a", 1), (["a", "c"], 2)):
        notes = Notes()
        curve = curve_of(store, tmp_path / f"{points}.png", part=parts, rows=11, val_samples=2, progress=notes)
        assert len(curve.points) == points
        assert ["build more parts" in said for said in notes.said] == [True] * (points == 1)


@pytest.mark.slow
def test_against_a_naive_projection(store: Path, tmp_path: Path) -> None:
    """The whole gradients against a dense projection of them: the error is the dense one's, on its curve."""
    curve = curve_of(store, tmp_path / "error.png", reference="naive_proj_layers=400", part="whole")
    (point,) = curve.points
    assert 0.4 < point.mean_error.value / np.sqrt(2 / (np.pi * 400)) < 2
    assert point.agreement.spearman.value > 0.8
    with pytest.raises(UsageError, match="a dense matrix of"):
        curve_of(store, tmp_path / "other.png", reference="naive_proj_layers=99999999")


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_files(lab: Lab, store: Path, suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"error{suffix}"
    outcome = lab.run(
        "plot-error",
        "--store",
        store,
        "--out",
        out,
        "--rows",
        "20",
        "--val-samples",
        "4",
        "--part",
        "a",
        "--part",
        "c",
        "--quiet",
        "--json",
    )
    assert outcome.code == 0, outcome.err
    assert out.read_bytes()[:5].strip() in (b"\x89PNG", b"%PDF-", b"<?xml")
    assert json.loads((tmp_path / "error.json").read_text()) == outcome.json
    assert [point["part"] for point in outcome.json["points"]] == ["a", "c"]
    again = lab.run("plot-error", "--store", store, "--out", out)
    assert again.code == 2
    assert "exists; nothing was written" in again.err
    table = lab.run("plot-error", "--store", store, "--out", tmp_path / "b.png", "--rows", "20", "--val-samples", "4")
    assert table.code == 0, table.err
    assert "dense theory" in table.out


@pytest.mark.slow
def test_parts_that_do_not_belong_together(lab: Lab, store: Path, tmp_path: Path) -> None:
    shutil.copytree(store.parent / "model", tmp_path / "model")
    data = lab.write(tmp_path / "train.jsonl", lab.sample_rows(30, 1))
    for name, settings in {
        "one": {},
        "other-corpus": {"data": lab.write(tmp_path / "other.jsonl", lab.sample_rows(30, 2))},
        "other-model": {"checkpoint": lab.model(tmp_path / "second", seed=4)},
        "other-layers": {"projection": ProjectionConfig(precondition="none", layers=("mlp",), rank_total=16)},
        "other-loss": {"loss_reduction": "sum"},
    }.items():
        build(
            tmp_path,
            name,
            **{"projection": ProjectionConfig(precondition="none", rank_total=16), "data": data, **settings},
        )
    for name, what in (
        ("other-corpus", "corpus.fingerprint"),
        ("other-model", "checkpoint.fingerprint"),
        ("other-layers", "layers"),
        ("other-loss", "loss.reduction"),
    ):
        with pytest.raises(MismatchError, match=f"are no points of one curve: {what}"):
            curve_of(tmp_path / "store", tmp_path / "error.png", part=["one", name])
    with pytest.raises(MismatchError, match="Name those that are with `part`"):
        curve_of(tmp_path / "store", tmp_path / "error.png")


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "exact"}, "`reference` 'exact': give full, full_layers, rank=N or naive_proj_layers=N"),
        ({"reference": "naive_proj_layers=0"}, "at least one number"),
        ({"metric": "euclid"}, "`metric` 'euclid' is unknown"),
        ({"rows": 3}, "`rows` must be at least 11"),
        ({"part": "nothing"}, "has no part 'nothing'"),
        ({"out": "error.txt"}, "`out=.*error.txt`: pictures are written as"),
    ],
)
def test_refused(store: Path, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    out = tmp_path / settings.pop("out", "error.png")
    with pytest.raises(UsageError, match=message):
        curve_of(store, out, **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_checkpoint_gone(lab: Lab, store: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(store.parent, tmp_path / "copy"))
    model = Path(shutil.copytree(lab.checkpoint, tmp_path / "model"))
    shutil.rmtree(folder / "store" / "parts")
    (folder / "store" / "parts").mkdir()
    build(
        folder,
        "part",
        checkpoint=model,
        data=folder / "train.jsonl",
        projection=ProjectionConfig(precondition="none", rank_total=16),
    )
    model.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="the error of part 'part' cannot be measured without its checkpoint"):
        curve_of(folder / "store", tmp_path / "error.png")
    assert curve_of(folder / "store", tmp_path / "error.png", checkpoint=tmp_path / "moved").points
