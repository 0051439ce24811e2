"""What is learned is learned once: resumed builds, other settings, damage, dry runs, and corpora of every kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import CorpusError, CorruptError, MismatchError, UsageError
from ghoststore.store.base.own import remember
from ghoststore.store.base.records import json_digest
from indexer.projection.calibration import ARRAYS, FACTORS, SIDES
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

PCA = ProjectionConfig(kind="pca", precondition="none", rank_total=81, compress=100)


def build(lab: Lab, store: Path, **settings: Any) -> ghoststore.BuildReport:
    settings = {
        "checkpoint": lab.checkpoint,
        "data": lab.corpus,
        "name": "part",
        "span_rows": 6,
        "device": "cpu",
    } | settings
    return ghoststore.build(store=store, **settings)


def ask(lab: Lab, store: Path, **settings: Any) -> ghoststore.QueryResult:
    settings = {"val_set": lab.corpus, "each": True, "top_k": 100, "metric": "dot", "device": "cpu"} | settings
    return ghoststore.query(store=store, **settings)


def no_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    def calibrate(*args: Any, **settings: Any) -> None:
        raise AssertionError("it was learned again")

    monkeypatch.setattr("indexer.build.job.calibrate", calibrate)


@pytest.fixture
def own(built: Path, tmp_path: Path) -> Path:
    """A copy of the shared store: its part is of the default projection."""
    return Path(shutil.copytree(built, tmp_path / "own"))


def projection_of(store: Path) -> dict[str, Any]:
    return dict(ghoststore.Store.open(store).part("part").manifest["projection"])


@pytest.mark.thin(1)
@pytest.mark.kill
@pytest.mark.parametrize("after", ["parts/part$", r"commits/00000001\.json$"])
def test_resumes_to_the_same_bytes_without_learning(
    lab: Lab, built: Path, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert projection_of(built)["precondition"] == "kronecker"
    store = tmp_path / "store"
    killed = lab.build(store, fault={"call": "name", "path": after, "when": "after", "act": "kill"})
    assert killed.code == -9, killed.err
    no_learning(monkeypatch)
    assert build(lab, store).resumed_rows == (0 if "part" in after else 12)
    assert lab.tree(store) == lab.tree(built)


@pytest.mark.kill
def test_killed_while_learning_leaves_nothing(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    no_learning(monkeypatch)
    with pytest.raises(AssertionError, match="learned again"):
        build(lab, store)
    assert not store.exists()


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("projection", "path"),
    [
        (ProjectionConfig(damping=0.5), "projection.damping: stored 0.1, asked for 0.5"),
        (ProjectionConfig(calibration_samples=12), "projection.calibration_samples: stored 256, asked for 12"),
        (ProjectionConfig(seed=4), "projection.seed"),
        (ProjectionConfig(rank_min=2), "projection.rank_min"),
        (ProjectionConfig(precondition="none"), "projection.precondition: stored 'kronecker', asked for 'none'"),
        (ProjectionConfig(kind="pca"), "projection.kind"),
        (ProjectionConfig(compress_by="all"), "projection.compress_by: stored 'layer', asked for 'all'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_settings_are_refused_before_anything_is_learned(
    lab: Lab, own: Path, projection: ProjectionConfig, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_learning(monkeypatch)
    before = lab.tree(own)
    with pytest.raises(MismatchError, match=path):
        build(lab, own, projection=projection)
    assert lab.tree(own) == before


def test_another_checkpoint_or_corpus_is_refused(lab: Lab, own: Path, tmp_path: Path, monkeypatch: Any) -> None:
    no_learning(monkeypatch)
    other = lab.write(tmp_path / "corpus.jsonl", lab.sample_rows(27, 1))
    with pytest.raises(MismatchError, match=r"corpus\.fingerprint"):
        build(lab, own, data=other)
    with pytest.raises(MismatchError, match=r"checkpoint\.fingerprint"):
        build(lab, own, checkpoint=lab.model(tmp_path / "model", seed=9))
    with pytest.raises(MismatchError, match=r"projection\.dimension"):
        build(lab, own, checkpoint=lab.model(tmp_path / "deeper", layers=2))


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", [*SIDES, *FACTORS])
def test_damage_is_named(lab: Lab, own: Path, name: str) -> None:
    file = next(path for path in (own / "parts" / "part" / name / "c").rglob("*") if path.is_file())
    whole = file.read_bytes()
    file.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with pytest.raises(CorruptError, match=name):
        ask(lab, own)
    with pytest.raises(CorruptError, match=name):
        build(lab, own)
    assert lab.run("verify", "--store", own).code == 4
    shutil.rmtree(own / "parts" / "part" / name)
    with pytest.raises(CorruptError, match=name):
        ask(lab, own)


def reseal(store: Path, change: Any) -> None:
    """Change the manifest, and its checksum with it."""
    path = store / "parts" / "part" / "zarr.json"
    whole = json.loads(path.read_text())
    change(whole["attributes"]["manifest"])
    whole["attributes"]["manifest_sha256"] = json_digest(whole["attributes"]["manifest"])
    path.write_text(json.dumps(whole))
    remember(whole["attributes"]["manifest"], whole["attributes"]["manifest"]["source"], path.parent)


def test_a_changed_digest_is_refused(lab: Lab, own: Path) -> None:
    reseal(own, lambda manifest: manifest["projection"]["calibration"].update(digest="sha256:0"))
    with pytest.raises(MismatchError, match=r"has the digest sha256:.*, not the sha256:0 of its manifest"):
        ask(lab, own)


def test_changed_sizes_are_refused(lab: Lab, own: Path) -> None:
    def move_a_border(manifest: dict[str, Any]) -> None:
        groups = manifest["storage"]["groups"]
        groups[0][2] += 1
        groups[1][1] += 1

    reseal(own, move_a_border)
    with pytest.raises(MismatchError, match="digest"):
        ask(lab, own)


def test_an_optimizer_state_is_another_metric(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`optimizer_state` and `precondition=kronecker` each"):
        build(lab, tmp_path / "s", projection=ProjectionConfig(precondition="kronecker"), optimizer_state=tmp_path)
    outcome = lab.build(tmp_path / "s", "--proj-precondition", "kronecker", "--optimizer-state", tmp_path)
    assert outcome.code == 2
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_dry_run_learns_nothing(lab: Lab, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = ghoststore.Store.open(built).part("part")
    shown = lab.build(tmp_path / "store", "--dry-run", "--json")
    assert shown.code == 0, shown.err
    no_learning(monkeypatch)
    report = build(lab, tmp_path / "store", dry_run=True)
    assert report.dimension == done.layout.dimension
    assert (shown.json["dimension"], shown.json["bytes_on_disk"]) == (report.dimension, report.bytes_on_disk)
    assert not (tmp_path / "store").exists()
    texts = {"sample_id", "text", "span_start", *ARRAYS}
    files = [path for path in done.path.glob("*/c/**/*") if path.is_file()]
    sizes = [path.stat().st_size for path in files if path.relative_to(done.path).parts[0] not in texts]
    assert report.bytes_on_disk == pytest.approx(sum(sizes), rel=0.01)
    assert build(lab, built, dry_run=True).manifest["projection"] == projection_of(built)


@pytest.mark.slow
@pytest.mark.parametrize("projection", [ProjectionConfig(compress=256), PCA], ids=["kronecker", "pca"])
def test_fewer_bits_and_windows(lab: Lab, projection: ProjectionConfig, tmp_path: Path) -> None:
    store = tmp_path / "store"
    options: dict[str, Any] = {"projection": projection, "proj_dtype": "float32"}
    build(lab, store, name="plain", **options)
    build(lab, store, name="int8", **{**options, "proj_dtype": "int8"})
    plain, coded = (ghoststore.Store.open(store).part(name) for name in ("plain", "int8"))
    assert plain.manifest["projection"] == coded.manifest["projection"]
    assert plain.groups == coded.groups
    wide = vectors_of(plain, 0, 27)
    error = np.linalg.norm(vectors_of(coded, 0, 27) - wide, axis=1) / np.linalg.norm(wide, axis=1)
    assert 0 < error.max() < 0.02
    long = [row | {"text": " ".join([row["text"]] * 5)} for row in lab.rows]
    data = lab.write(tmp_path / "long.jsonl", long)
    report = build(lab, store, name="windows", data=data, max_length=10, overlong="window", **options)
    assert report.rows > 27
    assert report.manifest["projection"]["calibration"]["samples"] == min(256, report.rows)
    for name in ("int8", "windows"):
        found = ask(lab, store, part=name, metric="cosine", val_set=data if name == "windows" else lab.corpus)
        assert all(result.hits[0].score > 0.99 for result in found.results), name


def test_standard_input(lab: Lab, built: Path, tmp_path: Path) -> None:
    outcome = lab.build(tmp_path / "store", "--data", "-", stdin=str(lab.corpus))
    assert outcome.code == 0, outcome.err
    assert projection_of(tmp_path / "store")["hash"] == projection_of(built)["hash"]


def test_fewer_samples_than_the_corpus_has(lab: Lab, tmp_path: Path) -> None:
    """As many are learned from as are asked for; a row that cannot be used is no sample."""
    rows: list[dict[str, Any]] = lab.sample_rows(12)
    rows[3]["text"] = ""
    data = lab.write(tmp_path / "rows.jsonl", rows)
    for asked, learned in ((5, {4, 5}), (12, {11}), (400, {11})):
        config = ProjectionConfig(calibration_samples=asked)
        report = build(lab, tmp_path / "store", name=f"part-{asked}", data=data, projection=config)
        assert report.manifest["projection"]["calibration"]["samples"] in learned
    empty = lab.write(tmp_path / "empty.jsonl", [{"text": ""}, {"text": "a"}])
    with pytest.raises(CorpusError, match="none of the 2 samples"):
        build(lab, tmp_path / "other", data=empty)
