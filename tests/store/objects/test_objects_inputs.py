"""Builds, queries and selections whose corpus, val set, checkpoint and tokenizer are in object storage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore.checkpoint.find import Checkpoint, find_folder
from ghoststore.checkpoint.load import find_checkpoint, find_tokenizer, load_tokenizer
from ghoststore.checkpoint.objects import UNUSED_SECONDS
from ghoststore.errors import CheckpointError, MismatchError, StorageError, UsageError
from ghoststore.progress import Silent
from ghoststore.store import Store
from ghoststore.store.base.object_path import cache_folder, location
from tests.support.adapters import save_adapter
from tests.support.nanogpt import gpt, save, write_stream
from tests.support.notes import Notes
from tests.support.object_server import KEY, SECRET, Request, contents, first

if TYPE_CHECKING:
    from tests.store.objects.conftest import Bucket

TREE = "s3://bucket/inputs"
PLACES = ("checkpoint", "data", "tokenizer")
"""Entries of ``source`` that say where inputs lie."""


@pytest.fixture
def inputs(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with a checkpoint, a corpus of two files and a val set; :data:`TREE` has the same. The cache is new."""
    folder = bucket.lab.folder / "inputs"
    if not folder.exists():
        rows = bucket.lab.sample_rows(40, seed=5)
        (folder / "corpus").mkdir(parents=True)
        bucket.lab.write(folder / "corpus/a.jsonl", rows[:17])
        bucket.lab.write(folder / "corpus/b.jsonl", rows[17:])
        bucket.lab.write(folder / "val.jsonl", bucket.lab.sample_rows(6, seed=9))
        shutil.copytree(bucket.lab.checkpoint, folder / "model")
        (folder / "model/training_state").mkdir()
        (folder / "model/training_state/state.json").write_text('{"learning_rate": 0.25}')
        (folder / "model/optimizer.pt").write_bytes(b"not for a build")
    put_all(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket.server.reset()
    return folder


def put_all(folder: Path, to: str = TREE) -> None:
    """Put what lies in ``folder`` where it does not lie yet: a new etag is another version."""
    there = {path.name: path for _, path in location(to).below()}  # type: ignore[attr-defined]
    for file in (path for path in folder.rglob("*") if path.is_file()):
        if there.get(file.name) is None or there[file.name].read_bytes() != file.read_bytes():
            location(f"{to}/{file.relative_to(folder)}").write_bytes(file.read_bytes())


def build(store: Path | str, place: Path | str, **options: Any) -> Any:
    given = {"checkpoint": f"{place}/model", "data": f"{place}/corpus/*.jsonl", "span_rows": 6, "device": "cpu"}
    return ghoststore.build(store=store, **{**given, **options})


def without_places(name: str, data: bytes) -> Any:
    if not name.endswith("parts/model-corpus/zarr.json"):
        return data
    document = json.loads(data)
    for place in PLACES:
        document["attributes"]["manifest"]["source"][place] = None
    del document["attributes"]["manifest_sha256"]
    return document


def copies() -> list[Path]:
    """The copies of checkpoints in the cache."""
    return list((cache_folder() / "checkpoints").glob("*/*"))


def start_build(bucket: Bucket, store: Path) -> int:
    """A build by a process with the cache of this one."""
    words = ["build", "--checkpoint", f"{TREE}/model", "--data", f"{TREE}/corpus/a.jsonl", "--store", str(store)]
    cache = os.environ["XDG_CACHE_HOME"]
    code = f"import os; os.environ['XDG_CACHE_HOME'] = {cache!r}; import ghoststore.cli; ghoststore.cli.main({words})"
    return bucket.lab.start(code=code)


def reads(bucket: Bucket, name: str) -> int:
    """How often the objects of ``name`` were read since the server counts."""
    return sum(line.startswith("GET") and f"/bucket/inputs/{name}" in line for line in bucket.server.log)


def test_a_build_has_the_bytes_of_one_from_a_disk(bucket: Bucket, inputs: Path, tmp_path: Path) -> None:
    """And so have query, select, tokenize and scores of them; only the places differ."""
    build(tmp_path / "here", inputs, tokenizer=str(inputs / "model"))
    build("s3://bucket/built", TREE, tokenizer=f"{TREE}/model")
    here, there = bucket.lab.tree(tmp_path / "here"), contents(bucket.server, "built")
    assert [{name: without_places(name, data) for name, data in files.items()} for files in (here, there)] == [
        {name: without_places(name, data) for name, data in here.items()}
    ] * 2
    source = Store.open("s3://bucket/built").part().manifest["source"]
    assert {name: source[name] for name in PLACES} == {
        "checkpoint": f"{TREE}/model",
        "data": f"{TREE}/corpus/*.jsonl",
        "tokenizer": f"{TREE}/model",
    }
    assert source["learning_rate"] == 0.25
    answers = []
    for store, place in ((tmp_path / "here", inputs), ("s3://bucket/built", TREE)):
        val = f"{place}/val.jsonl"
        results = ghoststore.query(store=store, val_set=val, top_k=7, device="cpu").to_json()["results"]
        assert all(hit["text"] for hit in results[0]["hits"])
        out = tmp_path / f"chosen-{len(answers)}.jsonl"
        ghoststore.select(store=store, val_set=val, out=out, count=9, device="cpu")
        tokens = tmp_path / f"tokens-{len(answers)}"
        ghoststore.tokenize(data=f"{place}/corpus", tokenizer=f"{place}/model", out=tokens)
        shards = {name: data for name, data in bucket.lab.tree(tokens).items() if name != "shards.json"}
        answers.append((results, out.read_bytes(), shards))
    assert answers[0] == answers[1]


def test_a_stream_of_them_is_read_once(bucket: Bucket, inputs: Path, tmp_path: Path) -> None:
    build(tmp_path / "here", inputs, stream=True)
    bucket.server.reset()
    build(tmp_path / "there", TREE, stream=True)
    assert reads(bucket, "corpus/a.jsonl") == 3  # also for the fields, and, as it is small, for a pointer of Git LFS
    assert reads(bucket, "corpus/b.jsonl") <= 2
    here, there = (bucket.lab.tree(tmp_path / name) for name in ("here", "there"))
    assert here.keys() == there.keys()
    for name, data in here.items():
        assert without_places(name, there[name]) == without_places(name, data)


def test_texts_of_a_corpus_that_changed_are_not_shown(bucket: Bucket, inputs: Path, tmp_path: Path) -> None:
    place = "s3://bucket/changing"
    put_all(inputs, place)
    build(tmp_path / "store", place)
    asked = {"store": tmp_path / "store", "val_set": inputs / "val.jsonl", "device": "cpu"}
    notes: list[str] = []

    class Notes(ghoststore.progress.Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    changed = (inputs / "corpus/b.jsonl").read_bytes().replace(b"0.", b"0!")
    location(f"{place}/corpus/b.jsonl").write_bytes(changed)
    hits = ghoststore.query(**asked, top_k=40, progress=Notes()).to_json()["results"][0]["hits"]
    lost = sum(hit["text"] is None for hit in hits)
    assert 0 < lost < len(hits)
    assert f"{lost} of {len(hits)} texts are not shown: {place}/corpus/*.jsonl has changed since the part" in notes[-1]
    with pytest.raises(MismatchError, match=r"s3://bucket/changing/corpus/\*\.jsonl has changed since part"):
        ghoststore.select(**asked, out=tmp_path / "chosen.jsonl", count=3)
    location(f"{place}/corpus/b.jsonl").unlink()
    ghoststore.query(**asked, progress=Notes())
    assert "not shown" in notes[-1]
    bucket.server.refuse = lambda request: "corpus" in request.path
    ghoststore.query(**asked, progress=Notes())
    assert "texts are not shown: cannot" in notes[-1]


@pytest.mark.slow
def test_a_network_that_fails_in_a_build_is_no_other_corpus(bucket: Bucket, inputs: Path, tmp_path: Path) -> None:
    """The corpus is read twice, once to plan. What fails in between is a network; the same command goes on."""
    seen: list[str] = []

    def later(request: Request) -> bool:
        seen.extend([request.path] * ("/corpus/a.jsonl" in request.path and request.method == "GET"))
        return len(seen) > 4 and "/corpus/" in request.path

    bucket.server.refuse = later
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/inputs/corpus/a\.jsonl"):
        build(tmp_path / "store", TREE)
    bucket.server.reset()
    build(tmp_path / "store", TREE)
    assert Store.open(tmp_path / "store").part().complete


def test_a_checkpoint_is_copied_once_and_a_changed_one_is_noticed(bucket: Bucket, inputs: Path, tmp_path: Path) -> None:
    place = "s3://bucket/models"
    put_all(inputs / "model", f"{place}/gpt")
    bucket.server.reset()
    found = find_folder(f"{place}/gpt")
    assert (found.name, found.recorded, found.where) == ("gpt", f"{place}/gpt", f"{place}/gpt")
    assert found.fingerprint() == find_folder(inputs / "model").fingerprint()
    assert not (found.folder / "optimizer.pt").exists()
    bucket.server.reset()
    again = find_folder(f"{place}/gpt/")
    assert again.folder == found.folder
    assert not [line for line in bucket.server.log if line.startswith("GET") and "list-type" not in line]
    other = bucket.lab.model(tmp_path / "other", seed=4)
    put_all(other, f"{place}/gpt")
    changed = find_folder(f"{place}/gpt")
    assert changed.folder != found.folder
    assert changed.fingerprint() == find_folder(other).fingerprint() != found.fingerprint()
    assert len(copies()) == 2
    long_ago = found.folder.parent.stat().st_mtime - 2 * UNUSED_SECONDS
    os.utime(found.folder.parent, (long_ago, long_ago))
    weights = changed.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])  # somebody took a byte: the copy is made again
    assert find_folder(f"{place}/gpt").fingerprint() == changed.fingerprint()
    assert copies() == [changed.folder.parent]


class Watching(Notes):
    """The tasks, too: (what it is, its unit, its total, what was counted)."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[list[Any]] = []

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Any:
        self.tasks.append([description, unit, total, done])
        return Counting(self.tasks[-1])


class Counting(Silent):
    def __init__(self, counted: list[Any]) -> None:
        self.counted = counted

    def advance(self, rows: int, tokens: int = 0) -> None:
        self.counted[-1] += rows

    def close(self) -> None:
        self.counted.append("closed")


def test_progress_of_a_copy(bucket: Bucket, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of all files while they are copied; a note where a process finds the copy; nothing from a disk."""
    monkeypatch.setattr("ghoststore.checkpoint.objects.PIECE", 1000)
    monkeypatch.setattr("ghoststore.checkpoint.objects._made", set())
    names = [path.name for path in (inputs / "model").iterdir()]
    sizes = {name: (inputs / "model" / name).stat().st_size for name in names if name != "training_state"}
    whole = sum(size for name, size in sizes.items() if name != "optimizer.pt")
    watching = Watching()
    find_checkpoint(f"{TREE}/model", progress=watching)
    state = (inputs / "model/training_state/state.json").stat().st_size
    assert watching.tasks == [[f"copying {TREE}/model", "bytes", whole + state, whole + state, "closed"]]
    assert find_checkpoint(f"{TREE}/model", progress=watching)
    assert len(watching.tasks) == 1
    assert watching.said == []
    monkeypatch.setattr("ghoststore.checkpoint.objects._made", set())  # as in another process
    for _ in range(2):
        found = find_checkpoint(f"{TREE}/model", progress=watching)
    assert isinstance(found, Checkpoint)
    assert len(watching.tasks) == 1
    assert watching.said == [f"checkpoint {TREE}/model is unchanged since it was copied: read from {found.folder}"]
    find_tokenizer(f"{TREE}/model", watching)
    assert [task[0] for task in watching.tasks[1:]] == [f"copying {TREE}/model"]
    local = Watching()
    find_checkpoint(inputs / "model", progress=local)
    find_tokenizer(inputs / "model", local)
    assert (local.tasks, local.said) == ([], [])


@pytest.mark.parametrize("command", ["build", "query", "tokenize", "train", "doctor", "full_gradients", "evaluate"])
def test_each_command_shows_it(
    bucket: Bucket, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    copied: list[Any] = []

    def stop(address: Any, patterns: Any, what: str = "checkpoint", **given: Any) -> Path:
        copied.append(given.get("progress"))
        raise Stop

    if command == "query":
        build(tmp_path / "store", TREE)
    for module in ("find", "load", "nanogpt"):
        monkeypatch.setattr(f"ghoststore.checkpoint.{module}.copied", stop)
    model, data = {"checkpoint": f"{TREE}/model"}, {"data": inputs / "corpus/a.jsonl"}
    file = "s3://bucket/file-of-nanogpt/ckpt.pt"  # which an evaluation makes a folder of
    location(file).write_bytes(b"x")
    given: dict[str, dict[str, Any]] = {
        "build": {**model, **data, "store": tmp_path / "store"},
        "query": {"store": tmp_path / "store", "val_set": inputs / "val.jsonl"},
        "tokenize": {**data, "tokenizer": f"{TREE}/model", "out": tmp_path / "out"},
        "train": {**model, **data, "output_dir": tmp_path / "out", "method": "Regular", "max_steps": 1},
        "doctor": model,
        "full_gradients": {**model, **data, "out": tmp_path / "out"},
        "evaluate": {"checkpoint": file, "store": "-", "val_set": inputs / "val.jsonl", "out": tmp_path / "out"},
    }
    progress = Notes()
    with pytest.raises(Stop):
        getattr(ghoststore, command)(**given[command], progress=progress)
    assert copied == [progress]


class Stop(Exception):
    """Ends a command where it would copy."""


def test_a_part_of_another_checkpoint_at_the_same_address_is_refused(
    bucket: Bucket, inputs: Path, tmp_path: Path
) -> None:
    place = "s3://bucket/replaced"
    put_all(inputs, place)
    build(tmp_path / "store", place)
    put_all(bucket.lab.model(tmp_path / "other", seed=4), f"{place}/model")
    with pytest.raises(MismatchError, match="other weights than those in s3://bucket/replaced/model"):
        ghoststore.query(store=tmp_path / "store", val_set=inputs / "val.jsonl", device="cpu")


def test_processes_that_copy_one_checkpoint_at_once(bucket: Bucket, inputs: Path) -> None:
    """One copies, the others wait for it; both builds have its bytes."""
    bucket.server.delay = 0.05
    pids = [start_build(bucket, bucket.lab.folder / f"at-once-{n}") for n in range(3)]
    outcomes = [bucket.lab.wait(pid) for pid in pids]
    for outcome in outcomes:
        assert outcome.code == 0, outcome.err
    said = [f"copying {TREE}/model" in outcome.err for outcome in outcomes]
    assert sorted(said) == [False, False, True]
    for outcome, copied in zip(outcomes, said, strict=True):
        assert (f"checkpoint {TREE}/model is unchanged since it was copied" in outcome.err) != copied
    assert reads(bucket, "model/model.safetensors") == 1
    assert len(copies()) == 1


@pytest.mark.kill
def test_a_copy_that_was_killed_is_none(bucket: Bucket, inputs: Path, tmp_path: Path) -> None:
    pids: list[int] = []
    started = threading.Event()

    def kill(request: Request) -> bool:
        if "model.safetensors" not in request.path:
            return False
        started.wait()
        os.kill(pids[0], signal.SIGKILL)
        return True

    bucket.server.lose = kill
    pids.append(start_build(bucket, tmp_path / "store"))
    started.set()
    assert bucket.lab.wait(pids[0]).code == -signal.SIGKILL
    bucket.server.reset()
    assert all(path.name.startswith(".") for path in copies())
    assert find_folder(f"{TREE}/model").fingerprint() == find_folder(inputs / "model").fingerprint()
    assert [path.name.startswith(".") for path in copies()] == [False]


def test_a_copy_that_breaks_off_is_continued_and_one_that_fails_is_none(bucket: Bucket, inputs: Path) -> None:
    bucket.server.cut = first(2, lambda request: "model.safetensors" in request.path)
    expected = find_folder(inputs / "model").fingerprint()
    assert find_folder(f"{TREE}/model").fingerprint() == expected
    shutil.rmtree(cache_folder())
    bucket.server.reset()
    bucket.server.refuse = lambda request: "model.safetensors" in request.path
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/inputs/model/model\.safetensors") as raised:
        find_folder(f"{TREE}/model")
    for secret in (KEY, SECRET, "Signature"):
        assert secret not in str(raised.value)
    bucket.server.reset()
    assert copies() == []
    assert find_folder(f"{TREE}/model").fingerprint() == expected


def test_an_object_that_is_written_again_while_it_is_copied(bucket: Bucket, inputs: Path) -> None:
    place = "s3://bucket/moving"
    put_all(inputs / "model", place)
    bucket.server.seen = once(
        lambda request: request.method == "GET" and "model.safetensors" in request.path,
        lambda: location(f"{place}/model.safetensors").write_bytes(b"other"),
    )
    with pytest.raises(MismatchError, match=r"s3://bucket/moving/model\.safetensors was written again while it was"):
        find_folder(place)
    assert copies() == []


def once(applies: Callable[[Request], bool], act: Callable[[], object]) -> Callable[[Request], None]:
    left = [1]

    def seen(request: Request) -> None:
        if applies(request) and left:
            left.clear()
            act()

    return seen


def test_what_is_no_checkpoint_is_named_by_its_address(bucket: Bucket, inputs: Path, tmp_path: Path) -> None:
    location("s3://bucket/odd/pickled/pytorch_model.bin").write_bytes(b"x")
    location("s3://bucket/odd/pickled/config.json").write_bytes(b"{}")
    location("s3://bucket/odd/bare/model.safetensors").write_bytes(b"x")
    location("s3://bucket/odd/broken/config.json").write_bytes((inputs / "model/config.json").read_bytes())
    location("s3://bucket/odd/broken/model.safetensors").write_bytes(b"short")
    for source, error, words in (
        (f"{TREE}/nothing", CheckpointError, "checkpoint s3://bucket/inputs/nothing: there is no such folder"),
        (f"{TREE}/corpus", CheckpointError, "checkpoint s3://bucket/inputs/corpus: none of its objects is called"),
        (f"{TREE}/model/model.safetensors", CheckpointError, "give the folder that holds it, s3://bucket/inputs/model"),
        ("s3://bucket/odd/pickled", CheckpointError, r"s3://bucket/odd/pickled holds its weights as a pickle only"),
        ("s3://bucket/odd/bare", CheckpointError, "s3://bucket/odd/bare has no config.json"),
        ("s3://bucket/odd/broken", CheckpointError, "s3://bucket/odd/broken/model.safetensors is not a readable"),
        ("s3://no-such-bucket/model", UsageError, "there is no bucket s3://no-such-bucket"),
        ("s3://key:secret@bucket/model", UsageError, "address of the checkpoint cannot be used"),
        ("https://example.org/model?token=secret", UsageError, "cannot be read"),
    ):
        with pytest.raises(error, match=words) as raised:
            build(tmp_path / "store", TREE, checkpoint=source)
        assert "secret" not in str(raised.value)
        assert str(cache_folder()) not in str(raised.value)
    location("s3://bucket/odd/no-words/config.json").write_bytes(b"{}")
    folder = find_tokenizer("s3://bucket/odd/no-words")
    with pytest.raises(CheckpointError, match="the folder s3://bucket/odd/no-words has no tokenizer"):
        load_tokenizer(folder)


def test_a_store_from_elsewhere_has_nothing_fetched(
    bucket: Bucket, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest may name any address: it is followed where this user's own build wrote it."""
    build(tmp_path / "store", TREE)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another-user"))
    bucket.server.reset()
    with pytest.raises(UsageError, match=r"names 's3://bucket/inputs/model' as its checkpoint, and no build of yours"):
        ghoststore.query(store=tmp_path / "store", val_set=inputs / "val.jsonl", device="cpu")
    assert not bucket.server.log
    asked = {"store": tmp_path / "store", "val_set": inputs / "val.jsonl", "device": "cpu"}
    assert ghoststore.query(**asked, checkpoint=f"{TREE}/model", data=f"{TREE}/corpus/*.jsonl").to_json()["results"]


@pytest.mark.slow
def test_workers_read_the_same_inputs(bucket: Bucket, inputs: Path, tmp_path: Path) -> None:
    build(tmp_path / "here", inputs, name="part")
    build(tmp_path / "there", TREE, name="part", workers=2)
    here, there = (bucket.lab.tree(tmp_path / name) for name in ("here", "there"))
    assert {name for name in here if here[name] != there.get(name)} == {"parts/part/zarr.json"}


def test_a_training_of_them(bucket: Bucket, inputs: Path, tmp_path: Path) -> None:
    weights = []
    for place in (inputs, TREE):
        out = tmp_path / f"out-{len(weights)}"
        ghoststore.train(
            data=f"{place}/corpus",
            val_set=f"{place}/val.jsonl",
            checkpoint=f"{place}/model",
            output_dir=out,
            max_steps=2,
            batch_size=4,
            device="cpu",
            method="Regular",
        )
        weights.append(sorted(path.read_bytes() for path in out.rglob("model.safetensors")))
    assert weights[0] == weights[1] != []


def test_an_adapter_and_its_base(bucket: Bucket, inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    put_all(save_adapter(tmp_path / "adapter", inputs / "model"), f"{TREE}/adapter")
    given = {"name": "part", "adapter": "only"}
    build(tmp_path / "here", inputs, **given, checkpoint=tmp_path / "adapter", base=inputs / "model")
    build(tmp_path / "there", TREE, **given, checkpoint=f"{TREE}/adapter", base=f"{TREE}/model")
    here, there = (bucket.lab.tree(tmp_path / name) for name in ("here", "there"))
    assert {name for name in here if here[name] != there.get(name)} == {"parts/part/zarr.json"}
    source = Store.open(tmp_path / "there").part().manifest["source"]
    assert (source["checkpoint"], source["base"]) == (f"{TREE}/adapter", f"{TREE}/model")
    val = inputs / "val.jsonl"
    answers = [ghoststore.query(store=tmp_path / name, val_set=val, device="cpu") for name in ("here", "there")]
    assert answers[0].to_json()["results"] == answers[1].to_json()["results"]


def test_a_file_of_nanogpt(bucket: Bucket, tmp_path: Path) -> None:
    """It is called after its folder, as on a disk."""
    rng = np.random.default_rng(0)
    path = save(gpt(vocab_size=300), tmp_path / "out-small/ckpt.pt")
    data = write_stream(tmp_path / "train.bin", rng.integers(0, 250, 200))
    for file in (path, data):
        location(f"s3://bucket/nanogpt/{file.relative_to(tmp_path)}").write_bytes(file.read_bytes())
    checkpoint = "s3://bucket/nanogpt/out-small/ckpt.pt"
    found = find_checkpoint(checkpoint)
    assert found.identity() == find_checkpoint(path).identity()
    assert (found.name, found.where, found.recorded) == ("out-small", checkpoint, checkpoint)
    store = tmp_path / "store"
    ghoststore.build(store=store, checkpoint=checkpoint, data="s3://bucket/nanogpt/train.bin", device="cpu")
    assert Store.open(store).part_names() == ["out-small-train"]
    asked = {"store": store, "val_set": data, "device": "cpu", "max_samples": 1}
    assert ghoststore.query(**asked).to_json()["results"][0]["hits"][0]["text"]
    with pytest.raises(CheckpointError, match=r"load_nanogpt\('s3://bucket/nanogpt/out-small/ckpt\.pt'\)"):
        find_folder(checkpoint)
    ghoststore.load_nanogpt(checkpoint).save_pretrained(tmp_path / "folder")
    assert find_folder(tmp_path / "folder").fingerprint()
    with pytest.raises(CheckpointError, match="there is no such folder, and no such object"):
        find_checkpoint("s3://bucket/nanogpt/out-small/none.pt")
