"""One flipped bit, a file cut short, a file that is gone: `verify` names it, and a query never returns it as data."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore
from ghoststore.errors import CorruptError, GhostStoreError, MismatchError
from tests.support.harms import CHANGES, Harm, delete, empty, flip, flip_middle, truncate

if TYPE_CHECKING:
    from tests.conftest import Lab


def other_chunk(path: Path) -> None:
    """Bytes whose checksum holds, of other rows."""
    source = path.parent / str(int(path.name) + 1)
    if source.is_file():
        shutil.copy(source, path)
    else:  # of an array with columns
        shutil.copy(path.parent.parent / str(int(path.parent.name) + 1) / path.name, path)


CHUNKS = [
    "vectors/c/1/0",
    "norm/c/1/0",
    "loss/c/1",
    "n_tokens/c/1",
    "status/c/1",
    "sample_id/c/1",
    "domain/c/1",
    "source_row/c/1",
    "source_file/c/1",
    "source_offset/c/1",
    "source_digest/c/1",
    "window_start/c/1",
]
READ_BY_QUERY = [name for name in CHUNKS if name.split("/")[0] not in ("loss", "n_tokens")]
"""What a query with texts reads, when it returns every row."""
METADATA = ["zarr.json", "vectors/zarr.json", "norm/zarr.json", "sample_id/zarr.json", "span_start/zarr.json"]


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "store"))


def part(store: Path) -> Path:
    return store / "parts" / "part"


def names(lab: Lab, store: Path, file: str) -> None:
    """`ghoststore verify` ends with 4 and names ``file``."""
    outcome = lab.run("verify", "--store", store, "--json")
    assert outcome.code == 4, outcome.out + outcome.err
    report = outcome.json
    assert report["sound"] is False
    assert any(damage["part"] == "part" and file in damage["file"] + damage["problem"] for damage in report["damage"])


def query_all(lab: Lab, store: Path) -> ghoststore.QueryResult:
    return ghoststore.query(store=store, val_set=lab.corpus, top_k=100, max_samples=1, device="cpu")


@pytest.mark.parametrize("harm", [*CHANGES, delete, other_chunk])
def test_verify_names_every_damaged_chunk(lab: Lab, store: Path, harm: Harm) -> None:
    """All of them, in one go: nothing hides behind the first."""
    harmed = CHUNKS if harm is not other_chunk else ["vectors/c/1/0", "norm/c/1/0", "sample_id/c/1", "source_row/c/1"]
    for file in harmed:
        harm(part(store) / file)
    assert sorted(damage.file for damage in ghoststore.verify(store).damage) == sorted(harmed)
    names(lab, store, harmed[0])


@pytest.mark.thin
@pytest.mark.parametrize("file", ["vectors/c/0/0", "sample_id/c/4", "commits/00000003.json", *METADATA])
@pytest.mark.parametrize("harm", [flip_middle, truncate, empty])
def test_verify_names_one_damaged_file(lab: Lab, store: Path, file: str, harm: Harm) -> None:
    harm(part(store) / file)
    names(lab, store, file.removesuffix("/zarr.json"))


@pytest.mark.parametrize("file", ["span_start/c/0/0", *METADATA])
def test_verify_names_a_missing_file(lab: Lab, store: Path, file: str) -> None:
    delete(part(store) / file)
    names(lab, store, "part" if file == "zarr.json" else file.split("/")[0])


def test_verify_names_the_missing_folder_of_records(lab: Lab, store: Path) -> None:
    shutil.rmtree(part(store) / "commits")
    names(lab, store, "commits")


@pytest.mark.thin(1)
@pytest.mark.parametrize("file", ["span_start/c/0/0", "span_start/zarr.json", "norm/zarr.json", "zarr.json"])
def test_verify_sees_every_byte_outside_the_spans(store: Path, file: str) -> None:
    """A sample of all bytes, one bit each; and no other error than ours, whatever the bit makes of the file."""
    path = part(store) / file
    whole, unseen = path.read_bytes(), []
    for place in {*range(0, len(whole), max(1, len(whole) // 60)), *range(len(whole) * 9 // 10, len(whole), 7)}:
        flip(path, place)
        with suppress(MismatchError):  # the format version itself was hit
            if ghoststore.verify(store).sound:
                unseen.append(whole[max(0, place - 20) : place + 20])
        path.write_bytes(whole)
    assert unseen == []


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("file", ["sample_id/zarr.json", "norm/zarr.json", "domain/zarr.json"])
def test_a_bit_in_the_metadata_is_never_other_data(lab: Lab, store: Path, file: str) -> None:
    """Such as the separator of chunk names: "/" is one bit from ".", and a chunk that is not found reads as zeros."""
    path = part(store) / file
    whole = path.read_bytes()
    sound = query_all(lab, store)
    places = {whole.index(b'"/"') + 1, *range(0, len(whole), max(1, len(whole) // 25))}
    for place in sorted(places):
        flip(path, place)
        with suppress(CorruptError):
            assert query_all(lab, store).results == sound.results, whole[max(0, place - 20) : place + 20]
        path.write_bytes(whole)


@pytest.mark.thin(1)
@pytest.mark.parametrize("harm", [*CHANGES, delete])
def test_query_returns_no_damaged_rows(lab: Lab, store: Path, harm: Harm) -> None:
    """Whichever chunk it is, the error names it; and when all is whole again the answer is the old one."""
    sound = query_all(lab, store)
    for file in READ_BY_QUERY:
        path = part(store) / file
        whole = path.read_bytes()
        harm(path)
        with pytest.raises(CorruptError) as caught:
            query_all(lab, store)
        assert file.split("/")[0] in str(caught.value), f"{file}: {caught.value}"
        path.write_bytes(whole)
    assert query_all(lab, store) == sound


def test_query_of_a_damaged_chunk_ends_with_4(lab: Lab, store: Path) -> None:
    flip_middle(part(store) / "vectors/c/2/0")
    outcome = lab.run("query", "--store", store, "--val-set", lab.corpus, "--json")
    assert (outcome.code, outcome.out) == (4, "")
    assert str(part(store) / "vectors/c/2/0") in outcome.err
    assert "ghoststore verify" in outcome.err


def test_damaged_records(lab: Lab, store: Path) -> None:
    """`info` reads records: it names a damaged one; one of another span does not pass for this one's."""
    record = part(store) / "commits/00000001.json"
    shutil.copy(part(store) / "commits/00000002.json", record)
    names(lab, store, "commits/00000001.json")
    with pytest.raises(CorruptError, match=r"00000001\.json is the record of span 2, not 1"):
        ghoststore.info(store)
    empty(record)
    with pytest.raises(CorruptError, match=r"00000001\.json is not a commit record"):
        ghoststore.info(store)
    shutil.copy(part(store) / "commits/00000002.json", part(store) / "commits/00000005.json")
    with pytest.raises(CorruptError, match="records of spans"):
        ghoststore.Store.open(store).part()
    names(lab, store, "part")


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname"])
def test_a_record_that_names_a_file_elsewhere(lab: Lab, store: Path, name: str) -> None:
    """Hostile records are not followed out of the part."""
    from ghoststore.store.base.records import FileRecord, seal
    from ghoststore.store.spans.commits import Commit, commit_path, read_commit

    (store / "outside").write_text("secret")
    honest = read_commit(part(store), 1)
    files = {**honest.files, name: FileRecord(6, "0" * 64)}
    hostile = Commit(span=1, start=6, stop=12, files=files, statuses=honest.statuses, tokens=honest.tokens)
    commit_path(part(store), 1).write_bytes(seal(hostile.to_json()))
    names(lab, store, "which is no file of span 1")


@pytest.mark.thin
@pytest.mark.parametrize("data", [b"[]", b"null", b"1", b'{"attributes": 3}', b"[" * 100_000, b"\xff\xfe"])
@pytest.mark.parametrize("file", ["zarr.json", "parts/part/zarr.json", "parts/part/commits/00000000.json"])
def test_hostile_json(store: Path, file: str, data: bytes) -> None:
    """Every refusal is one of ours."""
    (store / file).write_bytes(data)
    with pytest.raises(GhostStoreError):
        ghoststore.info(store)
