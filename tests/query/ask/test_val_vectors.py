"""A val set that was asked about before asks again without a model, with the same bits; anything that changed computes
its vectors anew."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import CorpusError, MismatchError, UsageError
from ghoststore.store.base.writers import unfinished
from query.ask import kept_vectors, val_vectors
from query.ask.encoder import PartEncoder
from tests.conftest import tree
from tests.support.notes import Notes

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture
def folder(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of a model of its own, a val set and another one; and a folder for caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lab.model(tmp_path / "model", seed=3)
    lab.write(tmp_path / "train.jsonl", lab.sample_rows(40, 1))
    lab.write(tmp_path / "val.jsonl", lab.sample_rows(6, 2))
    lab.write(tmp_path / "minus.jsonl", lab.sample_rows(3, 4))
    build(tmp_path, "part")
    return tmp_path


def build(folder: Path, name: str, **settings: Any) -> None:
    ghoststore.build(
        checkpoint=folder / "model", data=folder / "train.jsonl", store=folder / "store", name=name, span_rows=16,
        device="cpu", **settings,
    )  # fmt: skip


def ask(folder: Path, **options: Any) -> tuple[dict[str, Any], bool, list[str]]:
    """(the answer, whether a model was opened, the notes)."""
    heard = Notes()
    given = {"store": folder / "store", "val_set": folder / "val.jsonl", "progress": heard, "device": "cpu"}
    with mock.patch.object(val_vectors, "PartEncoder", wraps=PartEncoder) as opened:
        answer = json.loads(json.dumps(ghoststore.query(**given | options).to_json()))
    return answer, opened.called, heard.said


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "cache/ghoststore/val-sets").iterdir())


WAYS: list[dict[str, Any]] = [
    {},
    {"each": True},
    {"group_field": "domain"},
    {"minus": "minus.jsonl"},
    {"max_samples": 2},
    {"phrase": "4:9", "max_samples": 1},
    {"metric": "cosine"},
    {"where": "source_row > 7", "top_k": 3},
]


def given(folder: Path, way: dict[str, Any]) -> dict[str, Any]:
    return {name: folder / value if name == "minus" else value for name, value in way.items()}


def test_the_same_question_has_the_same_bits(folder: Path) -> None:
    store = tree(folder / "store")
    first = [ask(folder, **given(folder, way)) for way in WAYS]
    # Metric, filters and numbers of rows are no matter of the vectors; the val set before `minus` was asked about.
    assert [anew for _, anew, _ in first] == [True, True, True, True, True, True, False, False]
    for way, (answer, _, _) in zip(WAYS, first, strict=True):
        again, anew, _ = ask(folder, **given(folder, way))
        assert (again, anew) == (answer, False), way
    out = folder / "chosen.jsonl"
    with mock.patch.object(val_vectors, "PartEncoder", None):
        ghoststore.select(store=folder / "store", val_set=folder / "val.jsonl", count=5, out=out, device="cpu")
    assert len(out.read_text().splitlines()) == 5
    assert tree(folder / "store") == store


def test_bits_are_those_of_a_user_without_caches(folder: Path) -> None:
    ask(folder)
    again, anew, _ = ask(folder)
    assert not anew
    shutil.rmtree(folder / "cache")
    assert ask(folder)[:2] == (again, True)


def _other_text(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "val.jsonl").read_text().splitlines()]
    rows[3]["text"] += "."
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _other_order(folder: Path) -> None:
    lines = (folder / "val.jsonl").read_text().splitlines()
    (folder / "val.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")


def _touched(folder: Path) -> None:
    os.utime(folder / "model/model.safetensors", ns=(1, 1))


def _other_software(folder: Path) -> None:
    kept_vectors.versions_of = lambda *_: {"torch": "3"}


def _damaged(folder: Path) -> None:
    (file,) = kept(folder)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _cut_short(folder: Path) -> None:
    (file,) = kept(folder)
    file.write_bytes(file.read_bytes()[:-1])


def _no_safetensors(folder: Path) -> None:
    (file,) = kept(folder)
    file.write_bytes(b"")


def _built_anew(folder: Path) -> None:
    ghoststore.remove(store=folder / "store", part="part")
    build(folder, "part", projection=ProjectionConfig(seed=8))


@pytest.mark.parametrize(
    "change", [_other_text, _other_order, _touched, _other_software, _damaged, _cut_short, _no_safetensors, _built_anew]
)
def test_what_changed_is_computed_anew(
    change: Callable[[Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_vectors, "versions_of", kept_vectors.versions_of)  # put back
    ask(folder)
    change(folder)
    assert ask(folder)[1]
    assert not ask(folder)[1]


def test_another_model_is_told_as_before(folder: Path, lab: Lab) -> None:
    ask(folder)
    lab.model(folder / "other", seed=9)
    with pytest.raises(MismatchError, match="other weights"):
        ask(folder, checkpoint=folder / "other")
    shutil.rmtree(folder / "model")
    lab.model(folder / "model", seed=9)
    with pytest.raises(MismatchError, match="other weights"):
        ask(folder)


def test_the_same_model_elsewhere(folder: Path) -> None:
    ask(folder)
    shutil.copytree(folder / "model", folder / "copy")
    _, anew, _ = ask(folder, checkpoint=folder / "copy")
    assert anew
    assert not ask(folder, checkpoint=folder / "copy")[1]
    assert not ask(folder)[1]


def test_notes_are_said_again(folder: Path) -> None:
    with (folder / "val.jsonl").open("a") as file:
        file.write(json.dumps({"id": "empty", "text": "a", "domain": "math"}) + "\n")
    (_, _, first), (_, anew, again) = ask(folder), ask(folder)
    assert not anew
    assert again == first
    assert any("left out" in note for note in first)


def test_growth_unions_and_sums(folder: Path, lab: Lab) -> None:
    """Rows of a part come and go: its vectors stay. A union has vectors of its own, a sum those of its parts."""
    rows = lab.sample_rows(70, 1)
    lab.write(folder / "train.jsonl", rows)
    ghoststore.build(store=folder / "store", like="part", data=folder / "train.jsonl", skip_samples=40, name="more")
    united = {"part": ["part", "more"]}
    answer, anew, _ = ask(folder, **united)
    assert anew
    assert ask(folder, **united)[:2] == (answer, False)
    ghoststore.gc(store=folder / "store", caches=True)
    assert ask(folder, **united)[:2] == (answer, False)


@pytest.mark.parametrize(
    "projection",
    [ProjectionConfig(precondition="none", compress=24), ProjectionConfig(precondition="none", rank_total=16)],
    ids=["sketched", "plain"],
)
def test_other_vectors(projection: ProjectionConfig, folder: Path) -> None:
    build(folder, "other", projection=projection)
    answer, anew, _ = ask(folder, part="other", layers=["*mlp*"] if projection.compress is None else [])
    assert anew
    again, anew, _ = ask(folder, part="other", layers=["*mlp*"] if projection.compress is None else [])
    assert (again, anew) == (answer, False)


def test_only_the_newest_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_vectors, "NEWEST", 2)
    for count in (1, 2, 1, 3):
        ask(folder, max_samples=count)
    assert len(kept(folder)) == 2
    assert [ask(folder, max_samples=count)[1] for count in (1, 3, 2)] == [False, False, True]
    monkeypatch.setattr(kept_vectors, "MOST", 1)
    ask(folder, max_samples=5)
    assert ask(folder, max_samples=5)[1]


def test_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "cache").write_text("no folder")
    answer, anew, notes = ask(folder)
    assert (anew, notes) == (True, [])
    assert ask(folder) == (answer, True, [])


def test_a_row_that_is_no_sample_is_told_before_a_model_is_loaded(folder: Path) -> None:
    with (folder / "val.jsonl").open("a") as file:
        file.write("[1]\n")
    with mock.patch.object(val_vectors, "PartEncoder", None), pytest.raises(CorpusError, match="line 7"):
        ghoststore.query(store=folder / "store", val_set=folder / "val.jsonl", device="cpu")


def test_a_phrase_is_of_one_text(folder: Path) -> None:
    with pytest.raises(UsageError, match="`phrase` is of one text"):
        ghoststore.query(store=folder / "store", val_set=folder / "val.jsonl", phrase="4:9", device="cpu")


def test_a_val_set_that_changes_while_the_model_is_loaded(folder: Path) -> None:
    """What is kept is of what was encoded, not of what was read before."""
    val, before = folder / "val.jsonl", (folder / "val.jsonl").read_bytes()

    def opened(*args: Any, **given: Any) -> PartEncoder:
        _other_text(folder)
        return PartEncoder(*args, **given)

    with mock.patch.object(val_vectors, "PartEncoder", opened):
        changed = ghoststore.query(store=folder / "store", val_set=val, device="cpu").to_json()["results"]
    answer, anew, _ = ask(folder)
    assert not anew
    assert answer["results"] == json.loads(json.dumps(changed))
    val.write_bytes(before)
    answer, anew, _ = ask(folder)
    assert anew
    assert answer["results"] != changed


def test_a_model_that_changes_while_it_is_loaded(folder: Path) -> None:
    def opened(*args: Any, **given: Any) -> PartEncoder:
        encoder = PartEncoder(*args, **given)
        _touched(folder)
        return encoder

    with mock.patch.object(val_vectors, "PartEncoder", opened):
        ghoststore.query(store=folder / "store", val_set=folder / "val.jsonl", device="cpu")
    os.utime(folder / "model/model.safetensors")
    assert not (folder / "cache").exists()


def test_a_template_of_the_tokenizer(folder: Path) -> None:
    """It lies in a folder inside; whatever changes there, the tokenizer is looked at again."""
    templates = folder / "model/additional_chat_templates"
    ask(folder)
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    with pytest.raises(MismatchError, match="tool_use"):
        ask(folder)


def test_names_that_are_no_unicode(folder: Path) -> None:
    with open(os.fsencode(folder / "model") + b"/notes\xe9.txt", "w"):
        pass
    answer, _, _ = ask(folder)
    assert ask(folder)[:2] == (answer, False)


def test_what_killed_processes_left(folder: Path) -> None:
    ask(folder)
    (file,) = kept(folder)
    left = unfinished(file.with_name("other.safetensors"))
    left.with_name(left.name.replace(f".{os.getpid()}.", ".999999999.")).write_bytes(b"x")
    left.write_bytes(b"x")  # of this process, as of one that is at work
    ask(folder, max_samples=2)
    assert [path.name for path in kept(folder) if path.name.startswith(".")] == [left.name]


TEMPLATE = "{% for m in messages %}{% for k, x in m.items() %}{{ k }}: {{ x }} {% endfor %}{% endfor %}"


@pytest.fixture
def chats(folder: Path, lab: Lab) -> Path:
    """A part of a model whose template prints the keys of a message in their order."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    rows = [{"id": row["id"], "messages": [{"role": "user", "content": row["text"]}]} for row in lab.sample_rows(20, 1)]
    lab.write(folder / "train.jsonl", rows)
    build(folder, "chats")
    return folder


def test_the_order_of_the_keys_of_a_message(chats: Path, lab: Lab) -> None:
    def asked(name: str, messages: list[dict[str, Any]], **more: Any) -> tuple[Any, bool, list[str]]:
        val = lab.write(chats / name, [{"id": "a", "messages": messages, **more}])
        return ask(chats, part="chats", val_set=val)

    first, anew, _ = asked("a.jsonl", [{"role": "user", "content": "the cat"}])
    assert anew
    other, anew, _ = asked("b.jsonl", [{"content": "the cat", "role": "user"}])
    assert anew
    assert other["results"] != first["results"]
    assert not asked("a.jsonl", [{"role": "user", "content": "the cat"}])[1]


def test_each_note_is_of_its_val_set(chats: Path, lab: Lab) -> None:
    """The one has tools, which the template leaves out, and the other has none."""
    row = {"id": "a0", "messages": [{"role": "user", "content": "the cat"}]}
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    one = lab.write(chats / "one.jsonl", [row | {"tools": tools}])
    other = lab.write(chats / "other.jsonl", [row | {"messages": [{"role": "user", "content": "some stone"}]}])
    settings: dict[str, Any] = {"part": "chats", "val_set": one}
    _, _, alone = ask(chats, **settings)
    assert any("tools" in note for note in alone)
    _, anew, both = ask(chats, minus=other, **settings)
    assert (anew, both) == (True, alone)
    assert ask(chats, minus=other, **settings)[1:] == (False, alone)
    shutil.rmtree(chats / "cache")
    ask(chats, minus=other, **settings)
    assert ask(chats, part="chats", val_set=other)[1:] == (False, [])


def test_token_ids_are_asked_about_each_time(folder: Path) -> None:
    """A tokenizer has to say that they are its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = [token for row in (folder / "val.jsonl").read_text().splitlines() for token in tokenizer(row)["input_ids"]]
    np.array(ids, dtype=np.uint16).tofile(folder / "val.bin")
    settings: dict[str, Any] = {"val_set": folder / "val.bin", "max_samples": 2}
    ask(folder, tokenizer=folder / "model", **settings)
    assert ask(folder, tokenizer=folder / "model", **settings)[1]
    with pytest.raises(UsageError, match="nothing says which tokenizer made them"):
        ask(folder, **settings)


def test_nobody_else_reads_it(folder: Path) -> None:
    ask(folder)
    assert (folder / "cache/ghoststore/val-sets").stat().st_mode & 0o077 == 0


def test_no_model_is_imported(folder: Path) -> None:
    """Neither for a val set that was asked about before, nor for a row of the part itself."""
    ask(folder)
    code = (
        "import sys, ghoststore\n"
        f"store, val = {str(folder / 'store')!r}, {str(folder / 'val.jsonl')!r}\n"
        "ghoststore.query(store=store, near=3, device='cpu')\n"
        "ghoststore.query(store=store, val_set=val, device='cpu')\n"
        "assert not {'transformers', 'tokenizers'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
