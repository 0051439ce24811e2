"""Preconditioned scores against a dense float64 reference, their limits, the cache, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import UsageError
from ghoststore.progress import Silent
from ghoststore.store.base.records import FileRecord, json_digest
from query.search.second_moment import DampedInverse, SecondMoment
from tests.conftest import save_model
from tests.support.made_parts import clustered, make_part
from tests.support.parts import unbuild

if TYPE_CHECKING:
    from tests.conftest import Lab

SKETCHED = ProjectionConfig(precondition="none", compress=12)
PLAIN = ProjectionConfig(precondition="none", rank_total=16)
PROJECTIONS = pytest.mark.parametrize("projection", ["sketched", "plain"])


@pytest.fixture(scope="module")
def stores(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store a projection: the corpus with two rows that cannot be used, and the val set as a part of its own."""
    folder = tmp_path_factory.mktemp("precondition")
    rows: list[dict[str, Any]] = lab.sample_rows(60, 1)
    rows[7]["text"], rows[31]["text"] = "", None
    data = lab.write(folder / "train.jsonl", rows)
    lab.write(folder / "val.jsonl", lab.sample_rows(5, 3))
    made = {}
    for name, projection in (("sketched", SKETCHED), ("plain", PLAIN)):
        made[name] = folder / name
        for part, source in (("train", data), ("val", folder / "val.jsonl")):
            ghoststore.build(
                checkpoint=lab.checkpoint,
                data=source,
                store=made[name],
                name=part,
                projection=projection,
                proj_dtype="float32",
                span_rows=16,
                device="cpu",
            )
    return made


def vectors(store: Path, part: str) -> np.ndarray:
    found = ghoststore.Store.open(store).part(part)
    return found.encoding.decode(found.read("vectors", 0, found.layout.rows)).astype(np.float64)


def usable(store: Path) -> np.ndarray:
    part = ghoststore.Store.open(store).part("train")
    return np.asarray(part.read("status", 0, part.layout.rows)) < 16


def dense_inverse(store: Path, damping: float) -> np.ndarray:
    """(H + λI)⁻¹ as one D × D matrix, zero between blocks."""
    part, rows = ghoststore.Store.open(store).part("train"), vectors(store, "train")[usable(store)]
    second = rows.T @ rows / len(rows)
    blocks = np.zeros_like(second)
    for _, start, stop in part.groups:
        blocks[start:stop, start:stop] = second[start:stop, start:stop]
    return np.linalg.inv(blocks + damping * np.trace(blocks) / len(blocks) * np.eye(len(blocks)))


def ask(store: Path, **settings: Any) -> Any:
    val_set = store.parent / "val.jsonl"
    settings = {"part": "train", "each": True, "top_k": 60, "text": False, "device": "cpu"} | settings
    return ghoststore.query(store=store, val_set=val_set, **settings)


@pytest.mark.thin
@PROJECTIONS
@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_equals_a_dense_reference(stores: dict[str, Path], projection: str, metric: str, damping: float) -> None:
    store = stores[projection]
    rows, queries, inverse = vectors(store, "train"), vectors(store, "val"), dense_inverse(store, damping)
    expected = queries @ inverse @ rows.T
    if metric == "cosine":
        lengths = [np.sqrt(np.einsum("nd,de,ne->n", x, inverse, x)) for x in (queries, rows)]
        expected /= lengths[0][:, None] * np.where(lengths[1] > 0, lengths[1], 1.0)
    found = ask(store, metric=metric, precondition="second-moment", damping=damping)
    for result, scores in zip(found.results, expected, strict=True):
        assert len(result.hits) == usable(store).sum()
        got = np.array([hit.score for hit in result.hits])
        wanted = scores[[hit.source_row for hit in result.hits]]
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7 * np.abs(scores).max())
        assert (np.diff(got) <= 0).all()


def test_layers_and_preconditioner_together(stores: dict[str, Path]) -> None:
    """A subset of blocks takes the same λ, and the blocks of H that it needs."""
    store = stores["plain"]
    part = ghoststore.Store.open(store).part("train")
    inverse = dense_inverse(store, 0.1)
    mask = np.zeros(len(inverse), dtype=bool)
    for name, start, stop in part.groups:
        mask[start:stop] = "c_fc" in name
    assert mask.any()
    assert not mask.all()
    chosen = inverse * np.outer(mask, mask)
    rows, queries = vectors(store, "train"), vectors(store, "val")
    expected = queries @ chosen @ rows.T
    lengths = [np.sqrt(np.einsum("nd,de,ne->n", x, chosen, x)) for x in (queries, rows)]
    expected /= lengths[0][:, None] * np.where(lengths[1] > 0, lengths[1], 1.0)
    found = ask(store, precondition="second-moment", layers=["c_fc"])
    for result, scores in zip(found.results, expected, strict=True):
        for hit in result.hits:
            assert hit.score == pytest.approx(scores[hit.source_row], rel=1e-6, abs=1e-8)


@pytest.mark.thin(1)
@PROJECTIONS
def test_large_damping_gives_the_plain_scores(stores: dict[str, Path], projection: str) -> None:
    store = stores[projection]
    damping = 1e9
    mean = SecondMoment.of(ghoststore.Store.open(store).part("train"), Silent()).mean_eigenvalue
    for metric, unit in (("cosine", 1.0), ("dot", damping * mean)):
        plain = ask(store, metric=metric)
        damped = ask(store, metric=metric, precondition="second-moment", damping=damping)
        for mine, theirs in zip(damped.results, plain.results, strict=True):
            assert [hit.id for hit in mine.hits] == [hit.id for hit in theirs.hits]
            np.testing.assert_allclose(
                [hit.score * unit for hit in mine.hits], [hit.score for hit in theirs.hits], rtol=1e-6, atol=1e-9
            )


@PROJECTIONS
def test_self_influence(stores: dict[str, Path], projection: str) -> None:
    store = stores[projection]
    rows, inverse = vectors(store, "train"), dense_inverse(store, 0.1)
    expected = np.einsum("nd,de,ne->n", rows, inverse, rows)
    inverse_of = DampedInverse(ghoststore.Store.open(store).part("train"), 0.1, Silent())
    np.testing.assert_allclose(inverse_of.self_influence().sum(1), expected, rtol=1e-6, atol=1e-12)
    result = ghoststore.self_influence(store=store, part="train", top_k=60)
    (ranked,) = result.results
    best = [row for row in np.lexsort((np.arange(60), -expected)) if usable(store)[row]]
    assert [hit.source_row for hit in ranked.hits] == best
    np.testing.assert_allclose([hit.score for hit in ranked.hits], expected[best], rtol=1e-6)
    assert result.settings["damping"] == 0.1


@pytest.mark.slow
def test_equal_rows_have_equal_lengths(tmp_path: Path) -> None:
    """Wherever they stand in a chunk, and however long that is: so ties go to the lower row."""
    rows = np.tile(clustered(37), (10, 1))[:363]
    squares = DampedInverse(make_part(tmp_path, rows, unusable=()), 0.1, Silent()).self_influence()
    np.testing.assert_array_equal(squares, squares[np.arange(363) % 37])


class Notes(Silent):
    def __init__(self) -> None:
        self.tasks: list[str] = []
        self.notes: list[str] = []

    def task(self, description: str, *args: Any, **kwargs: Any) -> Any:
        self.tasks.append(description)
        return super().task(description, *args, **kwargs)

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_cache_is_used_checked_and_left_behind(lab: Lab, stores: dict[str, Path], tmp_path: Path) -> None:
    """The scan runs once; again after damage, which is told, and after more rows."""
    store = tmp_path / "store"
    settings: dict[str, Any] = {
        "checkpoint": lab.checkpoint,
        "data": stores["plain"].parent / "train.jsonl",
        "store": store,
        "name": "train",
        "projection": PLAIN,
        "span_rows": 16,
        "device": "cpu",
    }
    ghoststore.build(**settings)
    val = stores["plain"].parent / "val.jsonl"

    def query() -> tuple[Notes, list[float]]:
        notes = Notes()
        found = ghoststore.query(
            store=store, val_set=val, precondition="second-moment", top_k=5, device="cpu", progress=notes
        )
        return notes, [hit.score for hit in found.results[0].hits]

    first, scores = query()
    assert {"second moment", "self-influence"} <= set(first.tasks)
    again, same = query()
    assert not {"second moment", "self-influence"} & set(again.tasks)
    assert same == scores
    cache = store / "parts" / "train" / "second_moment"
    for damaged in sorted([*cache.glob("*.safetensors"), *cache.glob("*.npy")]):
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(bytes(data))
        after, same = query()
        assert any("is damaged" in note for note in after.notes), damaged
        assert same == pytest.approx(scores)
    for record in sorted(cache.glob("second_moment.json")):
        record.write_text("{}")
        after, same = query()
        assert any("is damaged" in note for note in after.notes)
        assert same == pytest.approx(scores)
    put_back = unbuild(ghoststore.Store.open(store).part("train"), 3)
    fewer, other = query()
    assert "second moment" in fewer.tasks
    assert other != scores
    put_back()
    _, same = query()
    assert same == pytest.approx(scores)
    assert len(list(cache.glob("second_moment-*.safetensors"))) == 1
    shutil.rmtree(cache)
    _, same = query()
    assert same == pytest.approx(scores)
    outcome = lab.run("verify", "--store", store, "--json")
    assert json.loads(outcome.out)["sound"]
    assert ghoststore.build(**settings).resumed_rows == 60


def test_who_may_read_a_record_may_read_its_file(stores: dict[str, Path], tmp_path: Path) -> None:
    """safetensors 0.8 makes files that their owner alone may read."""
    shutil.copytree(stores["plain"], tmp_path / "store")
    val = stores["plain"].parent / "val.jsonl"
    ghoststore.query(store=tmp_path / "store", part="train", val_set=val, precondition="second-moment", device="cpu")
    kept = list((tmp_path / "store/parts/train/second_moment").glob("second_moment*"))
    assert len(kept) == 2
    assert len({path.stat().st_mode for path in kept}) == 1


def test_a_cache_of_other_shapes_is_not_used(stores: dict[str, Path], tmp_path: Path) -> None:
    """Its checksums hold, for whoever can write a store can write these too."""
    store = tmp_path / "store"
    shutil.copytree(stores["plain"], store)
    shutil.copy(stores["plain"].parent / "val.jsonl", tmp_path / "val.jsonl")
    wanted = ask(store, precondition="second-moment")
    cache = store / "parts" / "train" / "second_moment"
    zeros = io.BytesIO()
    np.save(zeros, np.zeros((2, 2)))
    for name, content, message in (
        ("second_moment", save({"rows": torch.tensor(3)}), "has other tensors"),
        ("self_influence-0.1", zeros.getvalue(), r"of shape (2, 2)"),
    ):
        (data,) = cache.glob(f"{name}-????????????????.[sn]*")
        data.write_bytes(content)
        record = json.loads((cache / f"{name}.json").read_text())
        record["file"] = asdict(FileRecord.of(data))
        del record["record_sha256"]
        record["record_sha256"] = json_digest(record)
        (cache / f"{name}.json").write_text(json.dumps(record))
        notes = Notes()
        found = ask(store, precondition="second-moment", progress=notes)
        assert any(message in note for note in notes.notes)
        assert [hit.score for hit in found.results[0].hits] == [hit.score for hit in wanted.results[0].hits]


def test_a_record_names_no_file_of_others(stores: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(stores["plain"], store)
    shutil.copy(stores["plain"].parent / "val.jsonl", tmp_path / "val.jsonl")
    wanted = ask(store, precondition="second-moment")
    path = store / "parts" / "train" / "second_moment" / "second_moment.json"
    record = json.loads(path.read_text()) | {"data": "../../val/zarr.json"}
    del record["record_sha256"]
    path.write_text(json.dumps(record | {"record_sha256": json_digest(record)}))
    notes = Notes()
    found = ask(store, precondition="second-moment", progress=notes)
    assert any("it names a file '../../val/zarr.json'" in note for note in notes.notes)
    assert [hit.score for hit in found.results[0].hits] == [hit.score for hit in wanted.results[0].hits]


def test_dampings_do_not_pile_up(stores: dict[str, Path], tmp_path: Path) -> None:
    """Of the self-influences, which have a number for each row and block, the newest few stay."""
    store = tmp_path / "store"
    shutil.copytree(stores["plain"], store)
    for damping in (0.1, 0.2, 0.3, 0.4, 0.5):
        ghoststore.self_influence(store=store, part="train", damping=damping, device="cpu")
    cache = store / "parts" / "train" / "second_moment"
    assert len(list(cache.glob("self_influence-*.json"))) == len(list(cache.glob("self_influence-*.npy"))) == 3
    assert (cache / "self_influence-0.5.json").exists()
    assert (cache / "second_moment.json").exists()


def test_read_only_store_answers_and_says_so(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("query.search.part_cache.write_record", refuse)
    notes = Notes()
    found = ask(stores["plain"], precondition="second-moment", damping=0.3217, progress=notes)
    assert found.results
    assert any("not kept" in note for note in notes.notes)


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precondition": "second-moment", "damping": 0.0}, "singular"),
        ({"precondition": "second-moment", "damping": -0.1}, "`damping` must be 0 or more"),
        ({"precondition": "second-moment", "damping": float("nan")}, "`damping` must be 0 or more"),
        ({"precondition": "second-moment", "damping": float("inf")}, "`damping` must be 0 or more"),
        ({"damping": 0.1}, "`damping` belongs to `precondition=second-moment`"),
        ({"precondition": "kfac"}, "'kfac' is unknown"),
    ],
)
def test_refused(lab: Lab, stores: dict[str, Path], settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Ten rows cannot fill a block of sixteen numbers."""
    data = lab.write(tmp_path / "few.jsonl", lab.sample_rows(10, 1))
    store = tmp_path / "store"
    ghoststore.build(checkpoint=lab.checkpoint, data=data, store=store, projection=PLAIN, device="cpu")
    with pytest.raises(UsageError, match=message):
        ghoststore.query(store=store, val_set=stores["plain"].parent / "val.jsonl", device="cpu", **settings)


def test_damping_zero_of_a_regular_block(stores: dict[str, Path]) -> None:
    """58 rows fill blocks of 12 numbers: the inverse exists and is used."""
    store = stores["sketched"]
    rows, queries, inverse = vectors(store, "train"), vectors(store, "val"), dense_inverse(store, 0.0)
    expected = queries @ inverse @ rows.T
    found = ask(store, metric="dot", precondition="second-moment", damping=0.0)
    for result, scores in zip(found.results, expected, strict=True):
        for hit in result.hits:
            assert hit.score == pytest.approx(scores[hit.source_row], rel=1e-5, abs=1e-6 * np.abs(scores).max())


def test_no_gradient_anywhere(lab: Lab, tmp_path: Path) -> None:
    data = lab.write(tmp_path / "empty.jsonl", [{"text": ""}] * 3)
    val = lab.write(tmp_path / "val.jsonl", lab.sample_rows(2))
    ghoststore.build(checkpoint=lab.checkpoint, data=data, store=tmp_path / "store", projection=PLAIN, device="cpu")
    with pytest.raises(UsageError, match="no usable row"):
        ghoststore.query(store=tmp_path / "store", val_set=val, precondition="second-moment", device="cpu")


@pytest.mark.slow
def test_advice_for_a_sketch_that_is_too_large_for_a_second_moment(lab: Lab, tmp_path: Path) -> None:
    """By default that of plain gradients is one of all layers together."""
    checkpoint = save_model(tmp_path / "deep", layers=17)
    given: dict[str, Any] = {"checkpoint": checkpoint, "data": lab.corpus, "store": tmp_path / "store", "device": "cpu"}
    asked: dict[str, Any] = {"store": tmp_path / "store", "val_set": lab.corpus, "precondition": "second-moment"}
    ghoststore.build(**given, name="one", projection=ProjectionConfig(precondition="none", compress=17_000))
    with pytest.raises(UsageError, match=r"block of 17,000 numbers.*compress-by layer.*proj-compress`.*rank-total"):
        ghoststore.query(**asked, part="one", device="cpu")
    for name, advice in {"layer": {"compress": 17_000, "compress_by": "layer"}, "less": {"compress": 512}}.items():
        ghoststore.build(**given, name=name, projection=ProjectionConfig(precondition="none", **advice))
        assert ghoststore.query(**asked, part=name, device="cpu").results[0].hits
