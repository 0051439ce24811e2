"""A stale, damaged, foreign or half-made index is refused or built again, never used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import ghoststore
from ghoststore.errors import BusyError, CorruptError, GhostStoreError, MismatchError, UsageError
from ghoststore.store import Part
from ghoststore.store.base.disk import exclusive
from ghoststore.store.base.own import remember_digest
from ghoststore.store.base.records import json_digest
from ghoststore.store.part.index_manifest import IndexManifest
from ghoststore.store.part.indexes import MANIFEST
from query.ann.index import AnnIndex
from query.search.part_score import Term
from query.search.search import search
from tests.support.harms import CHANGES, Harm, delete, empty, flip, flip_middle
from tests.support.made_parts import ROWS, clustered, make_part

if TYPE_CHECKING:
    from tests.conftest import Lab

Build = Callable[..., ghoststore.IndexReport]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one part and its index: copied before it is changed."""
    store = tmp_path_factory.mktemp("sound") / "store"
    make_part(store, clustered())
    ghoststore.index(store=store, name="mine")
    return store


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "store"))


def part_of(store: Path) -> Part:
    return ghoststore.Store.open(store).part()


def file_of(store: Path, kind: str) -> Path:
    folder = store / "parts/part/index/mine"
    return folder / MANIFEST if kind == "manifest" else next(folder.glob(f"*.{kind}"))


def term_of(part: Part) -> Term:
    return Term.of(part, torch.from_numpy(clustered(5)).double() + 0.1, metric="cosine")


def answer(part: Part) -> list[list[int]]:
    return AnnIndex.open(part, "mine").search(term_of(part), top_k=5)[0].rows.tolist()


def state(store: Path) -> str:
    (one,) = ghoststore.info(store).parts[0].indexes
    return str(one["state"])


@pytest.mark.thin(3)
@pytest.mark.parametrize("harm", [*CHANGES, delete])
@pytest.mark.parametrize("kind", ["faiss", "rows", "manifest"])
def test_a_damaged_file_is_named_and_built_again(store: Path, kind: str, harm: Harm) -> None:
    part = part_of(store)
    right, path = answer(part), file_of(store, kind)
    harm(path)
    if (kind, harm) == ("manifest", delete):
        with pytest.raises(UsageError, match="no index 'mine'"):
            answer(part)
    else:
        with pytest.raises(CorruptError) as caught:
            answer(part)
        assert path.name in str(caught.value)
        assert "ghoststore index" in str(caught.value)
        assert [path.name in damage.file for damage in ghoststore.verify(store).damage] == [True]
    assert ghoststore.index(store=store, name="mine").built
    assert answer(part) == right
    assert state(store) == "current"
    assert ghoststore.verify(store).sound


def test_every_byte_of_the_manifest_matters(store: Path) -> None:
    """A sample of its bits: no other error than ours, and no other answer."""
    part, path = part_of(store), file_of(store, "manifest")
    right, whole = answer(part), path.read_bytes()
    for place in range(0, len(whole), 13):
        flip(path, place)
        with suppress(GhostStoreError):
            assert answer(part) == right
        path.write_bytes(whole)
    assert answer(part) == right


def test_a_damaged_chunk_is_never_a_result(store: Path) -> None:
    """Rows that a search scores are checked one by one; the index does not hide what exact search would name."""
    part = part_of(store)
    index = AnnIndex.open(part, "mine")
    index._searcher.candidates = ROWS
    right = index.search(term_of(part), top_k=5)[0]
    for chunk in ("0", "9", "15"):
        path = store / f"parts/part/vectors/c/{chunk}/0"
        whole = path.read_bytes()
        for harm in [flip_middle, empty, delete]:
            harm(path)
            with pytest.raises(CorruptError) as caught:
                index.search(term_of(part), top_k=5)
            assert f"vectors/c/{chunk}/0" in str(caught.value)
            with pytest.raises(CorruptError):
                ghoststore.index(store=store, name="new")
            path.write_bytes(whole)
    np.testing.assert_array_equal(index.search(term_of(part), top_k=5)[0].rows, right.rows)
    assert not (store / "parts/part/index/new").exists()


def test_more_spans_make_it_stale(tmp_path: Path) -> None:
    store = tmp_path / "store"
    make_part(store, clustered(), spans=[0, 1, 2])
    ghoststore.index(store=store, name="mine")
    before = AnnIndex.open(part_of(store), "mine")
    part = make_part(store, clustered(), spans=[3, 4])
    with pytest.raises(MismatchError, match=r"'mine' is stale: it covers 3 spans, part 'part' has 5.*ghoststore index"):
        answer(part)
    assert state(store) == "stale"
    assert ghoststore.verify(store).sound
    assert before.search(term_of(before.part), top_k=200)[0].rows.max() < 150
    assert ghoststore.index(store=store, name="mine").built
    np.testing.assert_array_equal(answer(part), search([term_of(part)], top_k=5)[0].rows)


def test_an_index_of_other_vectors(store: Path, tmp_path: Path) -> None:
    """Even of a part of the same shape: the commit records tell them apart."""
    make_part(tmp_path / "other", clustered(seed=5))
    shutil.copytree(store / "parts/part/index", tmp_path / "other/parts/part/index")
    with pytest.raises(MismatchError, match="was built of other vectors"):
        answer(part_of(tmp_path / "other"))
    assert ghoststore.index(store=tmp_path / "other", name="mine").built


def test_replaced_while_open(store: Path) -> None:
    """Who has it open keeps what was opened; who opens it next gets the new one."""
    part = part_of(store)
    old = AnnIndex.open(part, "mine")
    right = old.search(term_of(part), top_k=5)[0]
    ghoststore.index(store=store, name="mine", factory="IVF4,SQ8", rebuild=True)
    np.testing.assert_array_equal(old.search(term_of(part), top_k=5)[0].rows, right.rows)
    assert AnnIndex.open(part, "mine").manifest.factory == "IVF4,SQ8"
    assert len(list((store / "parts/part/index/mine").glob("*.faiss"))) == 1
    shutil.rmtree(store / "parts/part/index")
    np.testing.assert_array_equal(old.search(term_of(part), top_k=5)[0].scores, right.scores)


def test_replaced_while_it_is_being_opened(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the manifest that was read first are gone: it is opened again."""
    part, real, calls = part_of(store), AnnIndex._load, []

    def replaced(*arguments: Any) -> AnnIndex:
        calls.append(1)
        if len(calls) == 1:
            ghoststore.index(store=store, name="mine", factory="SQfp16", rebuild=True)
        return real(*arguments)

    monkeypatch.setattr(AnnIndex, "_load", replaced)
    assert AnnIndex.open(part, "mine").manifest.factory == "SQfp16"
    assert len(calls) == 2


@pytest.mark.kill
@pytest.mark.thin(2)
@pytest.mark.parametrize("path", [r"begun\.faiss", r"begun\.rows", r"\.index\.json\..*\.tmp", "index.json$"])
@pytest.mark.parametrize("first", [True, False], ids=["new", "over another"])
def test_killed_while_building(store: Path, lab: Lab, path: str, first: bool) -> None:
    """The old one stands, or none; and the next build sweeps what was left."""
    part, name = part_of(store), "fresh" if first else "mine"
    right = answer(part)
    call = "name" if path == "index.json$" else "fsync"
    order = {"fault": {"call": call, "path": path, "act": "kill"}}
    build = ("index", "--store", store, "--name", name, "--rebuild", "--quiet")
    assert lab.run(*build, **order).code == -9
    assert [one["name"] for one in ghoststore.info(store).parts[0].indexes] == ["mine"]
    assert answer(part) == right
    assert ghoststore.verify(store).sound
    assert lab.run(*build).code == 0
    folder = store / "parts/part/index" / name
    assert sorted(file.suffix for file in folder.iterdir()) == [".faiss", ".json", ".json", ".rows"]


@pytest.mark.parametrize("act", ["ENOSPC", "EIO"])
def test_a_disk_that_refuses(store: Path, lab: Lab, act: str) -> None:
    order = {"fault": {"call": "fsync", "path": r"begun\.faiss", "act": act}}
    outcome = lab.run("index", "--store", store, "--name", "fresh", "--quiet", **order)
    assert outcome.code == 6, outcome.err
    assert not (store / "parts/part/index/fresh").exists()


def test_two_at_once(store: Path) -> None:
    with exclusive(store / "parts/part/index/mine", "x"), pytest.raises(BusyError, match="index 'mine' of part 'part'"):
        ghoststore.index(store=store, name="mine", rebuild=True)


def test_a_resumed_build_leaves_the_index_alone(lab: Lab, tmp_path: Path) -> None:
    """A real build: its checks and sweeping know nothing of `index/`; the index it had is stale after it."""
    store = tmp_path / "store"
    order = {"fault": {"call": "name", "path": r"commits/00000002\.json", "act": "kill"}}
    assert lab.build(store, **order).code == -9
    ghoststore.index(store=store, name="early")
    before = lab.tree(store / "parts/part/index")
    assert lab.build(store).code == 0
    assert lab.tree(store / "parts/part/index") == before
    assert ghoststore.verify(store).sound
    assert state(store) == "stale"
    assert ghoststore.index(store=store, name="early").manifest.rows == len(lab.rows)


def resealed(path: Path, **changes: Any) -> None:
    """A manifest that somebody wrote on purpose: its checksum holds."""
    value = json.loads(path.read_bytes())
    del value["manifest_sha256"]
    value |= changes
    path.write_text(json.dumps({**value, "manifest_sha256": json_digest(value)}))


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 10**30},
        {"rows": 395},
        {"rows": -1},
        {"dimension": 0},
        {"candidates": 0},
        {"effort": -3},
        {"effort": "many"},
        {"metric": "l2"},
        {"scale": 0.0},
        {"scale": "nan"},
        {"front_dimension": 5},
        {"front_dimension": 10**9},
        {"front_key": "k"},
        {"files": {}},
        {"recall": {"row": {"at_10": 1}}},
        {"recall": {}},
        {"files": {"faiss": {"bytes": 1, "sha256": "../../../x"}, "rows": {"bytes": 1, "sha256": ""}}},
        {"surprise": 1},
    ],
)
def test_hostile_manifests(store: Path, changes: dict[str, Any]) -> None:
    resealed(file_of(store, "manifest"), **changes)
    with pytest.raises(CorruptError, match="is not the manifest of an index"):
        answer(part_of(store))
    assert state(store) == "damaged"


def test_a_manifest_of_another_version(store: Path) -> None:
    resealed(file_of(store, "manifest"), ghoststore_index=2)
    with pytest.raises(MismatchError, match="has version 2; this release reads 1"):
        answer(part_of(store))
    assert ghoststore.index(store=store, name="mine").built


def test_an_endless_manifest(store: Path) -> None:
    with open(file_of(store, "manifest"), "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptError, match="not the manifest of an index"):
        answer(part_of(store))


def test_files_of_another_index_with_checksums_that_hold(store: Path) -> None:
    """Rows out of order or out of the part, an index of other numbers: refused although every checksum holds."""
    import hashlib

    folder, manifest = store / "parts/part/index/mine", file_of(store, "manifest")
    whole, value = manifest.read_bytes(), json.loads(manifest.read_bytes())

    def put(kind: str, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        (folder / f"{digest[:16]}.{kind}").write_bytes(data)
        resealed(manifest, files=value["files"] | {kind: {"bytes": len(data), "sha256": digest}})
        remember_digest(IndexManifest.read(manifest).digest, folder)  # or it would not be looked at

    rows = np.fromfile(folder / f"{value['files']['rows']['sha256'][:16]}.rows", dtype="<i8").reshape(-1, 3)
    for bad in (rows[::-1], rows + np.array([1000, 0, 0]), rows - np.array([10, 0, 0])):
        put("rows", np.ascontiguousarray(bad).tobytes())
        with pytest.raises(CorruptError, match="names rows that part 'part' cannot have"):
            answer(part_of(store))
    manifest.write_bytes(whole)
    put("faiss", b"no index of FAISS at all")
    with pytest.raises(CorruptError, match="cannot be read by faiss"):
        answer(part_of(store))
    make_part(store.parent / "small", clustered(60))
    ghoststore.index(store=store.parent / "small", name="small")
    put("faiss", next((store.parent / "small/parts/part/index/small").glob("*.faiss")).read_bytes())
    with pytest.raises(CorruptError, match="its manifest says 396"):
        answer(part_of(store))


def test_a_folder_that_is_no_index(store: Path) -> None:
    for name in ("empty", "strange name", ".hidden"):
        (store / "parts/part/index" / name).mkdir()
        (store / "parts/part/index" / name / "other.json").write_text("{}")
    (store / "parts/part/index/strange name" / MANIFEST).write_text("{}")
    assert AnnIndex.open(part_of(store)).name == "mine"
    assert ghoststore.verify(store).sound


def test_an_index_from_elsewhere_is_not_opened(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_of(store)
    right = answer(part)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    with pytest.raises(UsageError, match=r"index 'mine' of part 'part' was not built by you .* builds it here"):
        answer(part)
    assert ghoststore.index(store=store, name="mine").built
    assert answer(part) == right
    assert not ghoststore.index(store=store, name="mine").built
