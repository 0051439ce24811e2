"""Questions to parts whose projection is learned: fidelity in their metric, error curves, evaluation, several parts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import MismatchError, UsageError
from ghoststore.store.base.manifest import differences
from tests.support.exact_scores import scores_of
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

ALL = ("all",)
ROWS = 40
PARTS: dict[str, dict[str, Any]] = {
    "whole": {"projection": ProjectionConfig(layers=ALL, rank_total="full", precondition="kronecker")},
    "rank": {"projection": ProjectionConfig(layers=ALL, rank_total=64)},
    "sketched": {"projection": ProjectionConfig(layers=ALL, rank_total=64, compress=64, compress_by="layer")},
    "damped": {"projection": ProjectionConfig(layers=ALL, rank_total=64, damping=2.0)},
    "plain": {"projection": ProjectionConfig(layers=ALL, rank_total=64, precondition="none")},
    "principal": {"projection": ProjectionConfig(layers=ALL, rank_total=64, kind="pca", precondition="none")},
}
METRIC = ("whole", "rank", "sketched")


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of each of PARTS; copy it before changing it."""
    folder = tmp_path_factory.mktemp("learned")
    data = lab.write(folder / "train.jsonl", lab.sample_rows(ROWS, 1))
    lab.write(folder / "val.jsonl", lab.sample_rows(5, 3))
    shutil.copytree(lab.checkpoint, folder / "model")
    for name, settings in PARTS.items():
        ghoststore.build(
            checkpoint=folder / "model",
            data=data,
            store=folder / "store",
            name=name,
            span_rows=16,
            device="cpu",
            proj_dtype="float32",
            **settings,
        )
    return folder / "store"


def measure(store: Path, part: str, **settings: Any) -> ghoststore.FidelityReport:
    settings = {"rows": 25, "val_samples": 5, "device": "cpu", "metric": "dot"} | settings
    return ghoststore.fidelity(store=store, part=part, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_whole_axes_are_exact_in_the_metric(lab: Lab, store: Path, metric: Any) -> None:
    """Nothing is lost but what is in the metric; all parameters have none."""
    report = measure(store, "whole", metric=metric)
    assert report.layers.spearman.value > 1 - 1e-5
    assert report.layers.recall.value == 1
    assert report.layers.relative_error.value < 1e-3
    assert report.all is None
    shown = lab.run("fidelity", "--store", store, "--part", "whole", "--rows", "20", "--val-samples", "3", "--quiet")
    assert shown.code == 0, shown.err
    assert "against all parameters: not known" in shown.out


def test_the_metric_is_another(store: Path) -> None:
    """Products of plain gradients are no products in the metric."""
    opened = ghoststore.Store.open(store)
    products = {}
    for name in ("whole", "plain"):
        vectors = vectors_of(opened.part(name), 0, ROWS).astype(np.float64)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        products[name] = (unit @ unit.T)[np.triu_indices(ROWS, 1)]
    assert np.abs(products["whole"]).mean() < 0.7 * np.abs(products["plain"]).mean()


@pytest.mark.slow
def test_ranks_cost_something(store: Path) -> None:
    found = [measure(store, name).layers.relative_error.value for name in ("whole", "rank", "sketched")]
    assert found[0] < found[1] < found[2]
    assert measure(store, "principal").all is not None


def test_principal_directions_keep_more_than_drawn_ones(store: Path) -> None:
    drawn, learned = (measure(store, name).layers.relative_error.value for name in ("plain", "principal"))
    assert learned < drawn


def test_layers_of_a_sketch_of_each_layer(store: Path) -> None:
    report = measure(store, "whole", layers=["c_fc"])
    assert report.layers.relative_error.value < 1e-3
    one, other = measure(store, "sketched", layers=["c_fc"]), measure(store, "rank", layers=["c_fc"])
    assert one.only_layers == other.only_layers != []


@pytest.mark.slow
def test_a_curve_of_one_preconditioner(store: Path, tmp_path: Path) -> None:
    curve = ghoststore.plot_error(
        store=store, out=tmp_path / "error.png", part=list(METRIC), rows=20, val_samples=4, device="cpu"
    )
    points = {point.part: point for point in curve.points}
    assert set(points) == set(METRIC)
    assert points["whole"].mean_error.value < 1e-4
    assert points["whole"].mean_error.value < points["rank"].mean_error.value
    assert points["rank"].theory_rms is not None
    assert points["sketched"].theory_rms is None
    identities = [
        ghoststore.Store.open(store).part(name).manifest["projection"]["calibration"]["preconditioner"]
        for name in METRIC
    ]
    assert len(set(identities)) == 1


def test_a_curve_of_two_metrics_is_refused(store: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"store": store, "rows": 20, "val_samples": 4, "device": "cpu"}
    for other in ("plain", "damped"):
        with pytest.raises(MismatchError, match="are no points of one curve: precondition"):
            ghoststore.plot_error(out=tmp_path / "error.png", part=["rank", other], **asked)
    with pytest.raises(UsageError, match=r"preconditioned by the Kronecker factors learned at build.*give full_layers"):
        ghoststore.plot_error(out=tmp_path / "error.png", part=["rank"], reference="full", **asked)


def test_evaluation_by_exact_gradients(store: Path, tmp_path: Path) -> None:
    """Those of the layers are in the metric of the part; those of all parameters cannot be."""
    folder = store.parent
    val = str(folder / "val.jsonl")
    found = scores_of(folder, tmp_path / "out", ["exact-layers-dot"], part="whole")["exact-layers-dot"]
    asked = ghoststore.query(store=store, part="whole", val_set=val, each=True, metric="dot", top_k=ROWS, device="cpu")
    scores = np.zeros((5, ROWS))
    for place, result in enumerate(asked.results):
        for hit in result.hits:
            scores[place, hit.source_row] = hit.score
    np.testing.assert_allclose(found, scores, rtol=0, atol=1e-3 * np.abs(scores).max())
    for method in ("exact-dot", "exact-cosine"):
        with pytest.raises(
            UsageError, match=rf"`methods={method}`: .*preconditioned by the Kronecker factors learned at build"
        ):
            scores_of(folder, tmp_path / "other", [method], part="rank")


@pytest.mark.thin(1)
@pytest.mark.parametrize("layers", [[], ["c_fc"]], ids=["all", "layers"])
@pytest.mark.parametrize("kind", ["gaussian", "pca"])
def test_several_checkpoints(lab: Lab, store: Path, kind: str, layers: list[str], tmp_path: Path) -> None:
    """Each has learned for itself, and has sizes of its own: scores are summed all the same."""
    folder = store.parent
    projection = ProjectionConfig(kind=kind, compress=70, compress_by="layer", precondition="auto")
    for seed, name in enumerate(("one", "two")):
        ghoststore.build(
            checkpoint=lab.model(tmp_path / name, seed=seed),
            data=folder / "train.jsonl",
            store=tmp_path / "store",
            name=name,
            span_rows=16,
            device="cpu",
            projection=projection,
        )
    parts = [ghoststore.Store.open(tmp_path / "store").part(name) for name in ("one", "two")]
    calibrations = [part.manifest["projection"]["calibration"]["digest"] for part in parts]
    assert calibrations[0] != calibrations[1]

    def scores(part: Any, **settings: Any) -> dict[tuple[str, int], float]:
        found = ghoststore.query(
            store=tmp_path / "store",
            part=part,
            val_set=folder / "val.jsonl",
            each=True,
            metric="dot",
            top_k=ROWS,
            device="cpu",
            layers=layers,
            **settings,
        )
        return {(result.query, hit.source_row): hit.score for result in found.results for hit in result.hits}

    both, singles = scores(["one", "two"], part_weights=[0.5, 2.0]), [scores("one"), scores("two")]
    largest = max(map(abs, both.values()))
    for key, score in both.items():
        assert score == pytest.approx(0.5 * singles[0][key] + 2 * singles[1][key], rel=1e-4, abs=1e-5 * largest)


def test_manifests_hold_the_same_fields_whatever_was_learned(store: Path) -> None:
    plain = ghoststore.Store.open(store).part("plain").manifest["projection"]
    learned = ghoststore.Store.open(store).part("damped").manifest["projection"]
    assert plain.keys() == learned.keys()
    assert all(plain[name] is None for name in ("calibration", "calibration_samples", "damping", "optimizer_state"))
    assert {path for path, _, _ in differences(plain, learned)} >= {"precondition", "damping", "calibration_samples"}
    asked: dict[str, Any] = {"store": store, "part": "plain", "val_set": store.parent / "val.jsonl", "device": "cpu"}
    assert len(ghoststore.query(**asked, top_k=ROWS).results[0].hits) == ROWS
