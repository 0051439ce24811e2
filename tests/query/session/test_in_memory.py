"""Every function that takes data or a checkpoint takes what is in memory, with the result of the same in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import MismatchError, UsageError
from ghoststore.store import Part, Store
from tests.conftest import sample_rows
from tests.support.notes import Notes

if TYPE_CHECKING:
    from tests.conftest import Lab

ROWS = sample_rows(24, 1)
VAL = sample_rows(4, 3)
PROJECTION = ProjectionConfig(precondition="none", rank_total=16)


@pytest.fixture(scope="module")
def loaded(lab: Lab) -> dict[str, Any]:
    """The model of the lab and its tokenizer, loaded by the user."""
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint).train()
    return {"checkpoint": model, "tokenizer": AutoTokenizer.from_pretrained(lab.checkpoint)}


def built(lab: Lab, store: Path, data: Any, **options: Any) -> Part:
    settings = {"checkpoint": lab.checkpoint, "projection": PROJECTION, "span_rows": 8, "device": "cpu", "name": "part"}
    ghoststore.build(**{"data": data, "store": store, **settings, **options})
    return Store.open(store).part()


@pytest.fixture(scope="module")
def of_file(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Part:
    """The part of the rows in a file, by the model of a folder."""
    folder = tmp_path_factory.mktemp("file")
    return built(lab, folder / "store", lab.write(folder / "train.jsonl", ROWS))


@pytest.fixture(scope="module")
def of_memory(lab: Lab, loaded: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Part:
    """The part of the same rows in memory, by the loaded model."""
    return built(lab, tmp_path_factory.mktemp("memory") / "store", ROWS, **loaded)


def arrays(part: Part, *, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    """The chunks and checksums of the part, by name."""
    return {
        str(path.relative_to(part.path)): path.read_bytes()
        for path in sorted(part.path.rglob("c/*"))
        if path.is_file() and path.relative_to(part.path).parts[0] not in without
    }


def store_of(part: Part) -> Path:
    return part.path.parent.parent


def test_a_part_of_what_is_in_memory_is_that_of_files(of_file: Part, of_memory: Part) -> None:
    """But for byte offsets, which rows in memory lack, and the texts, which are kept."""
    places = ("source_offset", "text", "span_start")
    assert arrays(of_memory, without=places) == arrays(of_file, without=places)
    assert (of_file.layout.store_text, of_memory.layout.store_text) == (False, True)
    for section in ("checkpoint", "tokenizer", "projection", "tokens", "layers", "corpus", "compute", "software"):
        assert of_memory.manifest[section] == of_file.manifest[section], section
    source = of_memory.manifest["source"]
    assert (source["data"], source["form"], source["checkpoint"], source["tokenizer"]) == ("-", "memory", "-", "-")


def test_a_loaded_model_builds_the_bytes_of_its_folder(
    lab: Lab, loaded: dict[str, Any], of_file: Part, tmp_path: Path
) -> None:
    """Every array, every record; the user's model stays in training mode."""
    data = of_file.manifest["source"]["data"]
    part = built(lab, tmp_path / "store", data, **loaded)
    assert arrays(part) == arrays(of_file)
    assert [(part.path / "commits" / f"{n:08d}.json").read_bytes() for n in range(3)] == [
        (of_file.path / "commits" / f"{n:08d}.json").read_bytes() for n in range(3)
    ]
    assert loaded["checkpoint"].training
    assert not any(module._forward_hooks for module in loaded["checkpoint"].modules())


def test_a_build_goes_on_with_the_same_rows_in_memory(lab: Lab, of_memory: Part, tmp_path: Path) -> None:
    """Whether they are a list or a table; of other rows nothing is computed."""
    store = tmp_path / "store"
    part = built(lab, store, ROWS, name=None)
    assert part.name == f"{lab.checkpoint.name}-memory"
    for span in (1, 2):
        for key in (f"commits/{span:08d}.json", *part.layout.span_keys(span)):
            (part.path / key).unlink()
    part = built(lab, store, list(map(dict, ROWS)), name=part.name)
    assert part.complete
    assert arrays(part) == arrays(of_memory)
    with pytest.raises(MismatchError, match=r"corpus\.fingerprint"):
        built(lab, store, ROWS[:-1], name=part.name)


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", ["texts", "prompts", "dataset"])
def test_a_query_of_what_is_in_memory(lab: Lab, of_file: Part, tmp_path: Path, kind: str) -> None:
    rows: Any = VAL
    if kind == "texts":
        rows = [{"text": row["text"]} for row in VAL]
    elif kind == "prompts":
        rows = [{"id": i, "prompt": "the sky", "completion": f" {row['text']}"} for i, row in enumerate(VAL)]
    val = lab.write(tmp_path / "val.jsonl", rows)
    given: Any = [row["text"] for row in VAL] if kind == "texts" else rows
    given = datasets.Dataset.from_list(rows) if kind == "dataset" else given
    here, there = (
        ghoststore.query(store=store_of(of_file), val_set=source, each=True).to_json() for source in (given, val)
    )
    name = f"4 {'texts' if kind == 'texts' else 'rows'} in memory"
    assert (here["settings"].pop("val_set"), there["settings"].pop("val_set")) == (name, str(val))
    assert here == there


def test_texts_of_a_part_of_what_was_in_memory(
    lab: Lab, of_memory: Part, of_file: Part, loaded: dict[str, Any]
) -> None:
    here = ghoststore.query(store=store_of(of_memory), val_set=VAL, **loaded)
    there = ghoststore.query(store=store_of(of_file), val_set=VAL)
    assert here.results == there.results
    assert here[0][0].text is not None
    with pytest.raises(
        UsageError, match=r"was built from a model in memory: give `checkpoint`, that model or the folder"
    ):
        ghoststore.query(store=store_of(of_memory), val_set=VAL)
    of_folder = ghoststore.query(store=store_of(of_memory), val_set=VAL, checkpoint=lab.checkpoint)
    assert of_folder.results == there.results


@pytest.mark.slow
def test_what_needs_the_corpus_takes_it_again(
    of_memory: Part, of_file: Part, tmp_path: Path, loaded: dict[str, Any]
) -> None:
    """Tokens of rows, original rows: `fidelity`, a second stage, `select`."""
    here, there = store_of(of_memory), store_of(of_file)
    with pytest.raises(
        UsageError, match=r"on standard input or on data in memory, which cannot be read again: give `data`"
    ):
        ghoststore.fidelity(store=here, rows=12, val_samples=3, **loaded)
    measured = [
        ghoststore.fidelity(store=store, rows=12, val_samples=3, **given).layers
        for store, given in ((here, {"data": ROWS, **loaded}), (there, {}))
    ]
    assert measured[0] == measured[1]
    ranked = [
        ghoststore.query(store=store, val_set=VAL, rerank=24, **given).results
        for store, given in ((here, {"data": ROWS, **loaded}), (there, {"data": ROWS}))
    ]
    assert ranked[0] == ranked[1]
    out = tmp_path / "chosen.jsonl"
    ghoststore.select(store=here, val_set=VAL, data=ROWS, count=5, out=out, **loaded)
    ghoststore.select(store=there, val_set=VAL, count=5, out=tmp_path / "there.jsonl")
    chosen = [json.loads(line) for line in out.read_text().splitlines()]
    assert chosen == [json.loads(line) for line in (tmp_path / "there.jsonl").read_text().splitlines()]
    assert all(row in ROWS for row in chosen)
    with pytest.raises(MismatchError, match="has changed"):
        ghoststore.select(store=here, val_set=VAL, data=ROWS[::-1], count=5, out=tmp_path / "x.jsonl", **loaded)


@pytest.mark.slow
def test_repair_takes_what_was_in_memory(lab: Lab, of_memory: Part, tmp_path: Path, loaded: dict[str, Any]) -> None:
    part = built(lab, tmp_path / "store", ROWS, **loaded)
    chunk = part.path / part.layout.span_keys(1)[0]
    whole = chunk.read_bytes()
    chunk.write_bytes(bytes(len(whole)))
    (left,) = ghoststore.repair(store=tmp_path / "store").unmended
    assert "on what is in memory, which cannot be read again: give `data`" in left.why
    assert ghoststore.repair(store=tmp_path / "store", data=ROWS, **loaded).sound
    assert chunk.read_bytes() == whole


def test_full_gradients(lab: Lab, tmp_path: Path, loaded: dict[str, Any]) -> None:
    data = lab.write(tmp_path / "rows.jsonl", ROWS)
    ghoststore.full_gradients(checkpoint=lab.checkpoint, data=data, out=tmp_path / "there", max_samples=3, device="cpu")
    ghoststore.full_gradients(data=ROWS, out=tmp_path / "here", max_samples=3, device="cpu", **loaded)
    (there, here) = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")} for name in ("there", "here")
    )
    assert there
    assert there == here
    assert all(p.grad is None for p in loaded["checkpoint"].parameters())


@pytest.mark.slow
def test_tokenize_and_shards(lab: Lab, tmp_path: Path, loaded: dict[str, Any]) -> None:
    """With processes, too."""
    data = lab.write(tmp_path / "rows.jsonl", ROWS)
    there = ghoststore.tokenize(data=data, tokenizer=lab.checkpoint, out=tmp_path / "there", shard_samples=8)
    reports = [
        ghoststore.tokenize(
            data=ROWS, tokenizer=loaded["tokenizer"], out=tmp_path / f"here{n}", shard_samples=8, workers=n
        )
        for n in (None, 2)
    ]
    for report in reports:
        assert report.corpus_fingerprint == there.corpus_fingerprint
        assert report.tokenizer_fingerprint == there.tokenizer_fingerprint
        assert ghoststore.TokenShards.open(report.out).source["data"] == "-"
    shards = [ghoststore.TokenShards.open(report.out) for report in (there, *reports)]
    for sample in range(len(ROWS)):
        tokens = [shard.tokens_of(sample).tolist() for shard in shards]
        assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.slow
def test_doctor(loaded: dict[str, Any], tmp_path: Path) -> None:
    report = ghoststore.doctor(data=ROWS, samples=3, store=tmp_path, device="cpu", **loaded)
    assert (report.model, report.settings["data"]) == ("GPT2LMHeadModel", "24 rows in memory")
    assert loaded["checkpoint"].training


@pytest.mark.slow
def test_train_and_its_run(lab: Lab, tmp_path: Path, loaded: dict[str, Any]) -> None:
    """The same weights and scores as from files; it resumes with the same rows, and takes no model in memory."""
    settings: dict[str, Any] = {
        "max_steps": 4,
        "batch_size": 4,
        "architecture": "GPT2-Tiny",
        "device": "cpu",
        "seed": 0,
        "keep_gradients": 2,
    }
    data, val = lab.write(tmp_path / "rows.jsonl", ROWS), lab.write(tmp_path / "val.jsonl", VAL)
    losses = [
        ghoststore.train(
            data=rows,
            val_set=vals,
            tokenizer=tokenizer,
            store=tmp_path / f"store{n}",
            output_dir=tmp_path / f"out{n}",
            **settings,
        )
        for n, (rows, vals, tokenizer) in enumerate(((data, val, lab.checkpoint), (ROWS, VAL, loaded["tokenizer"])))
    ]
    assert losses[0].val_loss == losses[1].val_loss
    of_run = ghoststore.query(store=tmp_path / "store1", run="GPT2-Tiny-memory", text=False)
    assert of_run.results == ghoststore.query(store=tmp_path / "store0", run="GPT2-Tiny-rows", text=False).results
    folder = max((tmp_path / "out1").glob("checkpoint-*"))
    trained = {"checkpoint": AutoModelForCausalLM.from_pretrained(folder), "tokenizer": loaded["tokenizer"]}
    answers = [
        ghoststore.query(store=tmp_path / "store1", run="GPT2-Tiny-memory", val_set=VAL, text=False, **given).results
        for given in (trained, {"checkpoint": folder})
    ]
    assert answers[0] == answers[1]
    again = ghoststore.train(
        data=ROWS,
        val_set=VAL,
        tokenizer=loaded["tokenizer"],
        store=tmp_path / "store1",
        output_dir=tmp_path / "out1",
        **settings,
    )
    assert again.resumed_from == 4
    notes = Notes()
    scores = [
        ghoststore.scores(store=tmp_path / f"store{n}", progress=notes, **given)
        for n, given in enumerate(({}, {"data": ROWS}))
    ]
    assert scores[0].hits == scores[1].hits
    assert not any("not shown" in words for words in notes.said)
    with pytest.raises(UsageError, match="a training goes on from a folder"):
        ghoststore.train(data=ROWS, output_dir=tmp_path / "x", method="Regular", max_steps=1, **loaded)


@pytest.mark.slow
def test_evaluate(of_memory: Part, of_file: Part, tmp_path: Path, loaded: dict[str, Any]) -> None:
    settings: dict[str, Any] = {
        "halves": 3,
        "max_steps": 3,
        "batch_size": 4,
        "tests": ("lds", "tail-patch"),
        "methods": ("dot", "tf-idf"),
        "workers": 2,
        "top_k": 4,
        "repeats": 1,
    }
    there = ghoststore.evaluate(store=store_of(of_file), val_set=VAL, out=tmp_path / "there", **settings)
    before = [p.clone() for p in loaded["checkpoint"].parameters()]
    here = ghoststore.evaluate(
        store=store_of(of_memory), val_set=VAL, out=tmp_path / "here", data=ROWS, **settings, **loaded
    )
    assert here.lds == there.lds
    assert here.tail_patch == there.tail_patch
    assert here.settings["val_set"] == "4 rows in memory"
    assert all(torch.equal(p, q) for p, q in zip(before, loaded["checkpoint"].parameters(), strict=True))
