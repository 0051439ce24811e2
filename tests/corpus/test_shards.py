"""Token shards: every token and every sample comes back, from wherever it came, and damage is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tokenizers
import transformers

import ghoststore
from ghoststore.checkpoint.load import load_tokenizer
from ghoststore.corpus import Corpus, Fields, Position, Tokenized
from ghoststore.errors import BusyError, CorpusError, CorruptError, MismatchError, UsageError
from ghoststore.store.base.disk import exclusive
from ghoststore.store.base.records import json_digest
from ghoststore.tokens.shards import SAMPLE, TokenShards, npy_bytes
from indexer.encode.tokens import Tokenizer

from .conftest import Write

if TYPE_CHECKING:
    from tests.conftest import Lab

TEXTS = [
    "the cat sees the moon",
    "",
    "ünïcødé 漢字 🐈",
    "two\nlines",
    "a",
    "x" * 300,
    "the old river runs under a stone",
]
DOMAINS = ["sky", None, "earth", "earth", "sky", None, "sky"]
ROWS = [{"id": f"ïd-{i}", "text": text, "domain": d} for i, (text, d) in enumerate(zip(TEXTS, DOMAINS, strict=True))]


@pytest.fixture(scope="session")
def whole(lab: Lab) -> Path:
    """Shards of the corpus of the lab, six: copy them before changing them."""
    out = lab.folder / "shards"
    ghoststore.tokenize(data=lab.corpus, tokenizer=lab.checkpoint, out=out, shard_samples=5, workers=1)
    return out


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def tokenize(lab: Lab, data: Path | str, out: Path, **more: Any) -> TokenShards:
    ghoststore.tokenize(data=data, tokenizer=lab.checkpoint, out=out, workers=1, **{"shard_samples": 3, **more})
    return TokenShards.open(out, verify=True)


def check(shards: TokenShards, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Everything of ``shards`` is that of ``corpus``, sample by sample, and leads back to it."""
    samples = list(corpus.samples())
    assert shards.samples == len(samples)
    encoded = [tokenizer.encode([sample])[0] for sample in samples]
    for number, (ids, first_target) in enumerate(encoded):
        found = shards.tokens_of(number)
        assert (found.dtype, found.tolist()) == (np.int32, ids.tolist())
        assert (shards.length[number], shards.first_target[number]) == (len(ids), first_target)
    names = [shards.domains[code] if code >= 0 else None for code in shards.domain]
    assert names == [sample.domain for sample in samples]
    assert shards.sample_id.tolist() == [sample.id for sample in samples]
    assert shards.source_row.tolist() == [sample.source_row for sample in samples]
    assert shards.tokens == sum(len(ids) for ids, _ in encoded)
    places = [
        Position(source_row=int(row), file=int(file), offset=int(offset))
        for row, file, offset in zip(shards.source_row, shards.source_file, shards.source_offset, strict=True)
    ]
    again = corpus.fetch(places)
    assert [again[place.source_row] for place in places] == samples
    assert shards.source_digest.tolist() == [sample.digest() for sample in samples]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv.zst", "parquet", "dataset", "folder-jsonl"])
def test_every_sample_comes_back_and_leads_back(lab: Lab, form: str, write: Write, tmp_path: Path) -> None:
    rows = [{**row, "domain": row["domain"] or ""} for row in ROWS] if "csv" in form else ROWS
    data = write(form, rows)
    shards = tokenize(lab, data, tmp_path / "out")
    check(shards, Corpus.open(data), Tokenizer(load_tokenizer(lab.checkpoint)))
    assert shards.source["data"] == data
    assert shards.source["form"] == Corpus.open(data).form
    assert shards.length[1] == 0, "an empty sample keeps its place"


@pytest.mark.parametrize("kind", ["prompt", "messages", "null"])
def test_every_kind_of_content(lab: Lab, kind: str, write: Write, tmp_path: Path) -> None:
    contents: dict[str, list[dict[str, Any]]] = {
        "prompt": [{"prompt": "the cat", "completion": " runs"}, {"prompt": "", "completion": ""}] * 3,
        "messages": [{"messages": [{"role": "user", "content": text}]} for text in ("hi", "the moon")] * 3,
        "null": [{"text": None}, {"text": "a"}, {"text": None}, {"text": None}, {"text": None}, {"text": None}],
    }

    def template(model: Any, tokenizer: Any) -> None:
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

    checkpoint = lab.model(tmp_path / "model", change=template)
    data = write("jsonl", contents[kind])
    ghoststore.tokenize(data=data, tokenizer=checkpoint, out=tmp_path / "out", shard_samples=2)
    tokenizer = Tokenizer(load_tokenizer(checkpoint))
    check(TokenShards.open(tmp_path / "out"), Corpus.open(data), tokenizer)
    shards = Corpus.open(str(tmp_path / "out"))
    assert [sample.preview() for sample in shards.samples()] == [
        tokenizer.tokenizer.decode(tokenizer.encode([sample])[0][0].tolist()) for sample in Corpus.open(data).samples()
    ]


def test_only_some_domains(lab: Lab, write: Write, tmp_path: Path) -> None:
    data = write("jsonl", ROWS)
    shards = tokenize(lab, data, tmp_path / "sky", domains=["sky"], shard_samples=2)
    assert (shards.domains, shards.source_row.tolist()) == (["sky"], [0, 4, 6])
    check(shards, Corpus.open(data).only(["sky"]), Tokenizer(load_tokenizer(lab.checkpoint)))
    first = tokenize(lab, data, tmp_path / "first", domains=["sky", "earth"], max_samples=3, shard_samples=2)
    assert first.source_row.tolist() == [0, 2, 3]
    assert first.source["only_domains"] == ["earth", "sky"]
    for domains, words in ((["sea"], "'sea'"), (["sky", "sea"], "--domain 'sea': no sample")):
        with pytest.raises(UsageError, match=words):
            tokenize(lab, data, tmp_path / "none", domains=domains)
    assert not (tmp_path / "none").exists()


def test_max_samples_reads_no_further(lab: Lab, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\nnonsense\n')
    assert tokenize(lab, data, tmp_path / "out", max_samples=3, shard_samples=2).samples == 3


@pytest.mark.slow
def test_a_large_vocabulary_is_uint32(write: Write, tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(65_537)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    data = write("jsonl", [{"text": "w7 w65536 w1"}])
    report = ghoststore.tokenize(data=data, tokenizer=tmp_path / "words", out=tmp_path / "out")
    assert (report.token_dtype, report.vocabulary) == ("uint32", 65_537)
    assert TokenShards.open(tmp_path / "out").tokens_of(0).tolist() == [7, 65_536, 1]


def test_files_are_plain_numpy(whole: Path) -> None:
    shards = TokenShards.open(whole)
    tokens = np.load(whole / "tokens-00000001.npy", mmap_mode="r")
    samples = np.load(whole / "samples-00000001.npy", mmap_mode="r")
    assert (tokens.dtype, samples.dtype) == (np.uint16, SAMPLE)
    third = samples[2]
    assert tokens[third["start"] : third["start"] + third["length"]].tolist() == shards.tokens_of(7).tolist()
    again = pickle.loads(pickle.dumps(shards))
    assert again.tokens_of(7).tolist() == shards.tokens_of(7).tolist()
    for outside in (-1, 27):
        with pytest.raises(IndexError, match=f"sample {outside} of 27"):
            shards.tokens_of(outside)


def test_shards_are_a_corpus(lab: Lab, whole: Path) -> None:
    corpus = Corpus.open(str(whole))
    samples = list(corpus.samples())
    assert (corpus.form, corpus.files) == ("token-shards", [whole])
    assert [(s.id, s.domain, s.preview()) for s in samples] == [(r["id"], r["domain"], r["text"]) for r in lab.rows]
    for sample in samples[::4]:
        place = Position(source_row=sample.source_row, file=0)
        assert list(corpus.samples(place)) == samples[sample.source_row :]
        assert corpus.fetch([place]) == {sample.source_row: sample}
    canonical = json.loads(samples[3].canonical())
    assert isinstance(samples[3].content, Tokenized)
    assert canonical["content"] == {"tokens": samples[3].content.ids.tolist(), "first_target": 1}
    with pytest.raises(UsageError, match="token shards have no fields to name; leave out --text-field"):
        list(Corpus.open(str(whole), Fields(text="text")).samples())
    with pytest.raises(CorpusError, match="a split is for a saved DatasetDict"):
        Corpus.open(f"{whole}:train")
    with pytest.raises(UsageError, match="holds tokens already"):
        ghoststore.tokenize(data=whole, tokenizer=lab.checkpoint, out=whole.with_name("again"))


@pytest.mark.thin(1)
@pytest.mark.parametrize("rows", ["text", "prompt"])
def test_build_and_query_from_shards(lab: Lab, rows: str, tmp_path: Path) -> None:
    """Vectors to the bit those of the corpus itself; results with the same ids, scores and texts."""
    contents = {
        "text": [*lab.rows[:12], {"id": "long", "text": "the cat " * 40, "domain": None}, {"id": "no", "text": ""}],
        "prompt": [{"prompt": row["text"], "completion": " the moon"[: i % 9]} for i, row in enumerate(lab.rows[:12])],
    }
    data = lab.write(tmp_path / "data.jsonl", [{"domain": None, **row} for row in contents[rows]])
    tokenize(lab, data, tmp_path / "shards", shard_samples=5)
    results, vectors = [], []
    for source in (data, tmp_path / "shards"):
        store = tmp_path / f"store-{source.name}"
        ghoststore.build(
            checkpoint=lab.checkpoint, data=source, store=store, span_rows=4, overlong="window", device="cpu"
        )
        part = ghoststore.Store.open(store).part()
        vectors.append([part.read(name, 0, part.rows).tolist() for name in ("vectors", "loss", "n_tokens", "status")])
        results.append(ghoststore.query(store=store, val_set=source, each=True, top_k=3, device="cpu").results)
    assert vectors[0] == vectors[1]
    assert results[0] == results[1]
    assert part.manifest["source"] | {"checkpoint": None} == {
        "checkpoint": None,
        "tokenizer": None,
        "data": str(tmp_path / "shards"),
        "form": "token-shards",
        "optimizer_state": None,
        "learning_rate": None,
    }


def test_texts_of_damaged_shards_are_not_shown(lab: Lab, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    ghoststore.build(checkpoint=lab.checkpoint, data=folder, store=store, device="cpu")
    (folder / "tokens-00000001.npy").unlink()
    outcome = lab.run("query", "--store", store, "--val-set", lab.corpus, "--quiet", "--json")
    assert outcome.code == 0, outcome.err
    assert "texts are not shown" in outcome.err
    assert "tokens-00000001.npy" in outcome.err
    assert {hit["text"] for hit in outcome.json["results"][0]["hits"]} == {None}


def test_another_tokenizer_is_refused(lab: Lab, built: Path, folder: Path, tmp_path: Path) -> None:
    def other(model: Any, tokenizer: Any) -> None:
        tokenizer.add_tokens(["<other>"])

    checkpoint = lab.model(tmp_path / "model", change=other)
    theirs = TokenShards.open(folder).tokenizer_identity["fingerprint"]
    ours = Tokenizer(load_tokenizer(checkpoint)).identity["fingerprint"]
    outcome = lab.build(tmp_path / "store", "--checkpoint", checkpoint, "--data", folder)
    assert outcome.code == 3, outcome.err
    assert theirs in outcome.err
    assert ours in outcome.err
    assert "tokenizer.added_tokens.290: stored None, found {'content': '<other>'" in outcome.err
    assert not list(tmp_path.glob("store/parts/*/zarr.json"))
    ghoststore.tokenize(data=lab.corpus, tokenizer=checkpoint, out=tmp_path / "others")
    with pytest.raises(MismatchError, match=ours):
        ghoststore.query(store=built, val_set=tmp_path / "others", device="cpu")
    with pytest.raises(MismatchError, match=rf"tokenizer\.fingerprint: stored '{theirs}', asked for '{ours}'"):
        ghoststore.tokenize(data=lab.corpus, tokenizer=checkpoint, out=folder, shard_samples=5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"shard_samples": 4}, "storage.shard_samples: stored 5, asked for 4"),
        ({"max_samples": 20}, "corpus.max_samples: stored None, asked for 20"),
        ({"domains": ["sky"]}, r"corpus.only_domains: stored None, asked for \['sky'\]"),
        ({"fields": Fields(text="id")}, "corpus.fingerprint: stored"),
    ],
)
def test_other_settings_are_refused(lab: Lab, folder: Path, more: dict[str, Any], words: str) -> None:
    before = lab.tree(folder)
    with pytest.raises(MismatchError, match=words):
        tokenize(lab, lab.corpus, folder, **{"shard_samples": 5, **more})
    assert lab.tree(folder) == before


def test_another_corpus_is_refused(lab: Lab, folder: Path, tmp_path: Path) -> None:
    changed = lab.write(tmp_path / "changed.jsonl", [*lab.rows[:-1], {**lab.rows[-1], "text": "x"}])
    with pytest.raises(MismatchError, match=r"corpus\.fingerprint: stored .*, asked for"):
        tokenize(lab, changed, folder, shard_samples=5)


def test_nothing_to_do_changes_nothing(lab: Lab, whole: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    report = ghoststore.tokenize(data=lab.corpus, tokenizer=lab.checkpoint, out=whole, shard_samples=5)
    assert (report.resumed_samples, report.written_tokens) == (27, 0)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == stamps


def test_folders_of_something_else(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UsageError, match="holds no token shards; give a new folder"):
            tokenize(lab, lab.corpus, out)
    (tmp_path / "empty").mkdir()
    assert tokenize(lab, lab.corpus, tmp_path / "empty").samples == 27
    with pytest.raises(CorpusError, match=r"holds no token shards \(it has no shards\.json\)"):
        TokenShards.open(tmp_path)


def test_an_incomplete_folder_is_refused(lab: Lab, folder: Path) -> None:
    (folder / "commits/00000002.json").unlink()
    for opened in (TokenShards.open, lambda path: Corpus.open(str(path))):
        with pytest.raises(CorpusError, match=r"incomplete: 5 of 6 shards are there; run `ghoststore tokenize` again"):
            opened(folder)


# Kills, errors of the disk, several processes.


def order(lab: Lab, out: Path, *more: str | Path) -> list[str | Path]:
    words = ["--data", lab.corpus, "--tokenizer", lab.checkpoint, "--out", out, "--shard-samples", "5", "--quiet"]
    return ["tokenize", *words, *more]


MOMENTS = {
    # The call, the paths it is called with, when, and how many of the six shards are committed then.
    "folder-begun": ("fsync", r"\.out\.tmp/commits", "before", None),
    "folder-unnamed": ("name", r"/out$", "before", None),
    "folder-named": ("name", r"/out$", "after", 0),
    "tokens-unwritten": ("fsync", r"out/\.tokens-00000001\.npy", "before", 1),
    "tokens-unnamed": ("name", r"out/tokens-00000002\.npy$", "before", 2),
    "samples-named": ("name", r"out/samples-00000002\.npy$", "after", 2),
    "ids-named": ("name", r"out/ids-00000000\.npy$", "after", 0),
    "record-unwritten": ("fsync", r"commits/\.00000003\.json", "before", 3),
    "record-named": ("name", r"commits/00000003\.json$", "after", 4),
    "last-record": ("name", r"commits/00000005\.json$", "after", 6),
}


@pytest.mark.kill
@pytest.mark.thin(3)
@pytest.mark.parametrize("act", ["kill", "interrupt", "ENOSPC"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_resumes_to_the_same_bytes(lab: Lab, whole: Path, moment: str, act: str, tmp_path: Path) -> None:
    call, path, when, shards = MOMENTS[moment]
    out = tmp_path / "out"
    fault = {"call": call, "path": path, "when": when, "act": act}
    outcome = lab.run(*order(lab, out), fault=fault)
    assert outcome.code == {"kill": -9, "interrupt": 130, "ENOSPC": 6}[act], outcome.err
    if act == "ENOSPC":
        assert "no space is left" in outcome.err
        assert str(out) in outcome.err
    if shards is None:
        assert not out.exists()
    elif shards < 6:
        with pytest.raises(CorpusError, match=f"{shards} of 6 shards"):
            TokenShards.open(out)
    resumed = lab.run(*order(lab, out, "--json"))
    assert resumed.code == 0, resumed.err
    assert resumed.json["resumed_samples"] == min((shards or 0) * 5, 27)
    assert lab.tree(out) == lab.tree(whole)


def test_a_shard_without_its_record_is_made_again(lab: Lab, whole: Path, folder: Path) -> None:
    """Whatever a process that died had written of it; and files of others are left alone."""
    (folder / "commits/00000001.json").unlink()
    (folder / "tokens-00000001.npy").write_bytes(b"half")
    (folder / "mine.npy").write_bytes(b"mine")
    tokenize(lab, lab.corpus, folder, shard_samples=5)
    assert lab.tree(folder) == lab.tree(whole) | {"mine.npy": b"mine"}


def test_two_at_once(lab: Lab, whole: Path, folder: Path) -> None:
    (folder / "commits/00000001.json").unlink()
    with exclusive(folder, "it"):
        outcome = lab.run(*order(lab, folder))
        assert outcome.code == 5, outcome.err
        assert f"folder {folder} is being written by another process; wait for it, or choose another --out" in (
            outcome.err
        )
        with pytest.raises(BusyError):
            tokenize(lab, lab.corpus, folder, shard_samples=5)
    started = [lab.start(*order(lab, folder)) for _ in range(3)]
    outcomes = [lab.wait(pid) for pid in started]
    assert {outcome.code for outcome in outcomes} <= {0, 5}, [outcome.err for outcome in outcomes]
    assert lab.tree(folder) == lab.tree(whole)


def workers_of(pid: int) -> list[int]:
    """Processes that ``pid`` started."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []


def until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of ``condition``, within a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError(what)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.kill
@linux
def test_workers(lab: Lab, whole: Path, tmp_path: Path) -> None:
    """Two workers: the same bytes. Both are killed with the process that started them, or one alone: an error that
    names it; and the same command resumes.
    """
    words = order(lab, tmp_path / "out", "--workers", "2", "--json")
    killed = lab.start(*words)
    pids = until(lambda: len(workers_of(killed)) == 2 and workers_of(killed), "no workers")
    os.kill(pids[1], signal.SIGKILL)
    outcome = lab.wait(killed)
    assert outcome.code == 1
    assert f"worker 1 (process {pids[1]}) was killed by SIGKILL" in outcome.err
    assert "the same command resumes" in outcome.err
    assert "Traceback" not in outcome.err

    parent = lab.start(*words)
    until(lambda: (tmp_path / "out/commits/00000000.json").exists(), "no shard")
    pids = workers_of(parent)
    os.kill(parent, signal.SIGKILL)
    assert lab.wait(parent).code == -9
    until(lambda: not any(Path(f"/proc/{pid}/fd/0").exists() for pid in pids), "a worker outlived its parent")
    outcome = lab.run(*words)
    assert outcome.code == 0, outcome.err
    assert outcome.json["resumed_samples"] > 0
    assert lab.tree(tmp_path / "out") == lab.tree(whole)


@linux
def test_standard_input(lab: Lab, tmp_path: Path) -> None:
    """Workers share what was spooled, and their errors are raised as they are."""
    data = lab.write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "a"}]}] * 4)
    words = [
        "tokenize",
        "--data",
        "-",
        "--tokenizer",
        lab.checkpoint,
        "--out",
        tmp_path / "out",
        "--shard-samples",
        "2",
    ]
    outcome = lab.run(*words, "--workers", "2", "--quiet", stdin=str(data))
    assert outcome.code == 2, outcome.err
    assert "no chat template" in outcome.err
    outcome = lab.run(*words, "--text-field", "messages", "--quiet", stdin=str(data))
    assert outcome.code == 2, outcome.err
    shutil.rmtree(tmp_path / "out")
    lab.write(data, lab.rows)
    outcome = lab.run(*words, "--workers", "1", "--json", "--quiet", stdin=str(data))
    assert outcome.code == 0, outcome.err
    shards = TokenShards.open(tmp_path / "out", verify=True)
    assert (shards.source["data"], shards.samples) == ("-", 27)


# Damage and hostile folders.


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


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
@pytest.mark.parametrize("harm", [flip, cut, lengthen, empty, Path.unlink])
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
    if harm != flip and not file.startswith("tokenizer"):
        with pytest.raises(expected):
            TokenShards.open(folder)


def test_a_damaged_shard_is_made_again_as_the_message_says(lab: Lab, whole: Path, folder: Path) -> None:
    cut(folder / "ids-00000003.npy")
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
    with pytest.raises(CorruptError, match="not a manifest"):
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
