"""Damage to token shards is named, and hostile folders are refused."""

from __future__ import annotations

import io
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ghoststore.corpus import Corpus
from ghoststore.errors import CorpusError, CorruptError, MismatchError
from ghoststore.store.base.records import json_digest
from ghoststore.tokens.manifest import npy_bytes
from ghoststore.tokens.shards import TokenShards
from tests.support.harms import empty, flip_middle, lengthen, truncate
from tests.support.shards import tokenize

if TYPE_CHECKING:
    from tests.conftest import Lab

FILES = [
    "tokens-00000001.npy",
    "samples-00000002.npy",
    "ids-00000003.npy",
    "commits/00000004.json",
    "tokenizer/tokenizer.json",
    "shards.json",
]


@pytest.mark.thin
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", [flip_middle, truncate, lengthen, empty, Path.unlink])
def test_damage_is_named(lab: Lab, folder: Path, file: str, harm: Callable[[Path], None]) -> None:
    """With ``verify``, all; without, what opening can see; as a corpus, before a row of it is given."""
    harm(folder / file)
    gone = harm == Path.unlink and file.endswith("json") and not file.startswith("tokenizer")
    expected = CorpusError if gone else CorruptError
    with pytest.raises(expected, match=file.split("/")[-1] if not gone else "holds no token shards|incomplete"):
        TokenShards.open(folder, verify=True)
    if not file.startswith("tokenizer"):
        with pytest.raises(expected):
            list(Corpus.open(str(folder)).samples())
    if harm != flip_middle and not file.startswith("tokenizer"):
        with pytest.raises(expected):
            TokenShards.open(folder)


def test_a_damaged_shard_is_made_again_as_the_message_says(lab: Lab, whole: Path, folder: Path) -> None:
    truncate(folder / "ids-00000003.npy")
    record = folder / "commits/00000003.json"
    with pytest.raises(CorruptError, match=f"delete {record} and run `ghoststore tokenize` again"):
        tokenize(lab, lab.corpus, folder, shard_samples=5)
    record.unlink()
    tokenize(lab, lab.corpus, folder, shard_samples=5)
    assert lab.tree(folder) == lab.tree(whole)


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change ``shards.json`` and seal it again, as one with bad intent would."""
    path = folder / "shards.json"
    value = json.loads(path.read_text())
    del value["sha256"]
    change(value)
    value["sha256"] = json_digest(value)
    path.write_text(json.dumps(value))


def set_in(*keys: str) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    def to(value: Any) -> Callable[[dict[str, Any]], None]:
        def change(root: dict[str, Any]) -> None:
            for key in keys[:-1]:
                root = root[key]
            root[keys[-1]] = value

        return change

    return to


samples, size = set_in("manifest", "corpus", "samples"), set_in("manifest", "storage", "shard_samples")
files, domains = set_in("files"), set_in("manifest", "corpus", "domains")
HOSTILE = {
    "samples-huge": samples(1 << 47),
    "samples-beyond": samples(1 << 80),
    "samples-negative": samples(-5),
    "samples-text": samples("27"),
    "samples-true": samples(True),
    "samples-more": samples(28),
    "samples-fewer": samples(26),
    "shard-huge": size(1 << 31),
    "shard-zero": size(0),
    "shards": set_in("manifest", "storage", "shards")(10**12),
    "dtype": set_in("manifest", "storage", "token_dtype")("object"),
    "other-dtype": set_in("manifest", "storage", "token_dtype")("uint32"),
    "vocabulary": set_in("manifest", "tokenizer", "vocabulary")(1 << 40),
    "fingerprint": set_in("manifest", "tokenizer", "fingerprint")(None),
    "files-outside": files({"../../etc/passwd": "0" * 64}),
    "files-absolute": files({"/etc/passwd": "0" * 64}),
    "files-deep": files({"tokenizer/../../../etc/passwd": "0" * 64}),
    "files-list": files(["tokenizer/tokenizer.json"]),
    "domains-text": domains("sky"),
    "domains-numbers": domains([1, 2]),
    "domains-many": domains(["x"] * 20_000),
    "section": set_in("manifest", "corpus")(None),
    "manifest": set_in("manifest")([]),
    "version-list": set_in("ghoststore_shards")([2]),
    "version": set_in("ghoststore_shards")(2),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused(folder: Path, name: str) -> None:
    forge(folder, HOSTILE[name])
    expected = MismatchError if name.startswith("version") else (CorruptError, CorpusError)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(expected) as caught:
        TokenShards.open(folder)
    assert len(str(caught.value)) < 1500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b"\x00" * 100, b"[" * 100_000, b'{"ghoststore_shards": 1}', b"1" * 9000]
)
def test_a_manifest_that_is_none(folder: Path, content: bytes) -> None:
    (folder / "shards.json").write_bytes(content)
    with pytest.raises(CorruptError, match=r"shards\.json is damaged"):
        TokenShards.open(folder)


def test_a_manifest_too_large_to_be_one(folder: Path) -> None:
    with open(folder / "shards.json", "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptError, match="it is too large"):
        TokenShards.open(folder)


def recommit(folder: Path, shard: int, **arrays: Any) -> None:
    """Replace arrays of a shard and forge its record."""
    path = folder / f"commits/{shard:08d}.json"
    value = json.loads(path.read_text())
    del value["record_sha256"]
    for kind, content in arrays.items():
        data = content if isinstance(content, bytes) else npy_bytes(content)
        (folder / f"{kind}-{shard:08d}.npy").write_bytes(data)
        value["files"][f"{kind}-{shard:08d}.npy"]["bytes"] = len(data)
    value["record_sha256"] = json_digest(value)
    path.write_text(json.dumps(value))


def read(folder: Path) -> None:
    shards = TokenShards.open(folder)
    shards.tokens_of(2)
    _ = shards.sample_id


def test_hostile_arrays_are_refused(whole: Path, tmp_path: Path) -> None:
    """Places outside, objects (which could run code), headers that claim what is not there, ids of no vocabulary."""
    sound = np.load(whole / "samples-00000000.npy")
    tokens = np.load(whole / "tokens-00000000.npy")

    def changed(**columns: int) -> np.ndarray[Any, Any]:
        array = sound.copy()
        for name, value in columns.items():
            array[name][2] = value
        return array

    objects = np.array([{"a": 1}] * len(tokens), dtype=object)
    pickled = io.BytesIO()
    np.lib.format.write_array(pickled, objects, version=(1, 0))
    huge = npy_bytes(tokens).replace(f"({len(tokens)},)".encode(), b"(99999999999,)")
    cases: list[dict[str, Any]] = [
        {"samples": changed(start=-8)},
        {"samples": changed(start=1 << 60)},
        {"samples": changed(length=-1)},
        {"samples": changed(length=1 << 30)},
        {"samples": changed(id_stop=1 << 60)},
        {"samples": changed(domain=2)},
        {"samples": changed(id_stop=-1)},
        {"samples": changed(domain=-2)},
        {"samples": changed(first_target=0)},
        {"samples": sound[:4]},
        {"samples": sound.view("u1")},
        {"tokens": tokens.astype(np.uint32)},
        {"tokens": tokens.reshape(1, -1)},
        {"tokens": pickled.getvalue()},
        {"tokens": huge},
        {"tokens": b"\x93NUMPY"},
        {"tokens": np.full_like(tokens, 290)},
        {"ids": np.frombuffer(b"\xff" * 25, dtype=np.uint8)},
    ]
    for number, case in enumerate(cases):
        folder = Path(shutil.copytree(whole, tmp_path / str(number)))
        recommit(folder, 0, **case)
        with pytest.raises(CorruptError, match="00000000"):
            read(folder)
