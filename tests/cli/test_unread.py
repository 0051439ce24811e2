"""Fields that hold a part of the text and are not read: a note names each, once, whichever command reads the corpus."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ghoststore.corpus import Fields, open_corpus
from ghoststore.progress import Silent
from tests.support.corpora import jsonl_bytes, write_parquet

if TYPE_CHECKING:
    from tests.conftest import Lab

ALPACA = ["--prompt-field", "instruction", "--completion-field", "output"]
NOTE = "'input' of its rows is not read (read: 'instruction', 'output')"


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.parametrize(
    ("row", "fields", "unread"),
    [
        (
            {"instruction": "Add.", "input": "2 and 3", "output": "5"},
            {"prompt": "instruction", "completion": "output"},
            ["input"],
        ),
        # The fields are there, though this row leaves them empty.
        (
            {"instruction": "Add.", "input": "", "output": "5", "system": None},
            {"prompt": "instruction", "completion": "output"},
            ["system", "input"],
        ),
        (
            {"prompt": "p", "completion": "c", "context": "x", "tools": [], "id": "1", "source": "web"},
            {},
            ["tools", "context"],
        ),
        ({"messages": [{"role": "user", "content": "x"}], "system": "y"}, {}, ["system"]),
        ({"messages": [{"role": "user", "content": "x"}], "tools": None, "documents": None}, {}, []),
        ({"text": "x", "prompt": "p", "completion": "c"}, {}, ["prompt", "completion"]),
        ({"text": "x", "passage": "p", "choices": ["a"], "options": ["b"]}, {}, ["passage", "choices", "options"]),
        ({"text": "x", "context": "a domain"}, {"domain": "context"}, []),
        ({"text": "x", "id": "1", "domain": "d", "url": "u"}, {}, []),
    ],
)
def test_the_note_names_what_is_not_read(
    row: dict[str, Any], fields: dict[str, str], unread: list[str], lab: Lab, tmp_path: Path
) -> None:
    path, notes = lab.write(tmp_path / "rows.jsonl", [row, row]), Notes()
    with open_corpus(str(path), Fields(**fields), notes) as corpus:
        assert corpus.unread == unread
        assert len(list(corpus.samples())) == 2
    assert len(notes.notes) == bool(unread)
    for name in unread:
        assert repr(name) in notes.notes[0].partition("(read:")[0]
        assert str(path) in notes.notes[0]
        assert "in the file" in notes.notes[0]


SECOND = {"instruction": "Add.", "output": "5", "input": "2 and 3", "context": "sums"}
"""Of a corpus whose first row is ``{"instruction": …, "output": …}``."""


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet"])
def test_a_field_that_a_later_row_has_is_named_with_that_row(form: str, lab: Lab, tmp_path: Path) -> None:
    """Alpaca leaves ``input`` out of rows that need none. In Parquet all rows of a file have it, some as null."""
    first = [{"instruction": "Name a river.", "output": "The Po."}] * 2
    folder = tmp_path / "rows"
    folder.mkdir()
    if form == "parquet":
        write_parquet(folder / "a.parquet", first)
        write_parquet(folder / "b.parquet", [SECOND, *first])
    else:
        data = jsonl_bytes([*first, SECOND, SECOND, {**SECOND, "system": "x"}])
        (folder / f"a.{form}").write_bytes(gzip.compress(data) if form.endswith("gz") else data)
    notes = Notes()
    with open_corpus(str(folder), Fields(prompt="instruction", completion="output"), notes) as corpus:
        assert (corpus.unread, notes.notes) == ([], [])
        for _ in range(2):
            assert len(list(corpus.samples())) == 5
            assert len(list(corpus.only(()).samples())) == 0
    place = f"{folder / 'b.parquet'}, row 1" if form == "parquet" else f"{folder / f'a.{form}'}, line 3"
    known = "'input', 'context' of this row, and of none before it, are not read (read: 'instruction', 'output')"
    assert notes.notes[0].startswith(f"{place}: {known}. What belongs to the text there: join it to the prompt")
    assert [note.partition(": ")[2][:8] for note in notes.notes[1:]] == ([] if form == "parquet" else ["'system'"])


def test_a_build_says_what_a_later_row_has(lab: Lab, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"instruction": row["text"], "output": " the old cat"} for row in lab.rows]
    rows[17]["input"] = "the moon"
    rows[21]["input"] = "the sun"
    data, store = lab.write(tmp_path / "rows.jsonl", rows), tmp_path / "store"
    built = lab.run(
        "build",
        "--checkpoint",
        lab.checkpoint,
        "--data",
        data,
        "--store",
        store,
        *ALPACA,
        "--max-length",
        "32",
        "--quiet",
    )
    assert built.code == 0, built.err
    assert built.err.count("is not read") == 1
    assert f"note: {data}, line 18: 'input' of this row, and of none before it, is not read" in built.err


def test_token_shards_have_read_what_they_read(lab: Lab, tmp_path: Path) -> None:
    data = lab.write(tmp_path / "rows.jsonl", [{"text": "the cat sees", "context": "x"}] * 3)
    made = lab.run("tokenize", "--data", data, "--tokenizer", lab.checkpoint, "--out", tmp_path / "shards", "--quiet")
    assert made.err.count("'context' of its rows is not read (read: 'text')") == 1
    notes = Notes()
    with open_corpus(str(tmp_path / "shards"), Fields(), notes):
        assert notes.notes == []


@pytest.fixture(scope="module")
def alpaca(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"instruction": row["text"], "input": "the moon", "output": " the old cat"} for row in lab.rows]
    return lab.write(tmp_path_factory.mktemp("alpaca") / "rows.jsonl", rows)


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    "words",
    [
        ["build", "--checkpoint", "{model}", "--data", "{data}", "--store", "{tmp}/store"],
        ["tokenize", "--tokenizer", "{model}", "--data", "{data}", "--out", "{tmp}/out"],
        ["full-gradients", "--checkpoint", "{model}", "--data", "{data}", "--out", "{tmp}/out", "--max-samples", "2"],
        ["doctor", "--checkpoint", "{model}", "--data", "{data}"],
        [
            "train",
            "--checkpoint",
            "{model}",
            "--data",
            "{data}",
            "--val-set",
            "{data}",
            "--store",
            "{tmp}/store",
            "--output-dir",
            "{tmp}/out",
            "--max-steps",
            "1",
        ],
        ["query", "--store", "{built}", "--val-set", "{data}"],
        ["select", "--store", "{built}", "--val-set", "{data}", "--count", "2", "--out", "{tmp}/out.jsonl"],
        ["fidelity", "--store", "{built}", "--val-set", "{data}", "--rows", "11", "--val-samples", "2"],
        [
            "evaluate",
            "--store",
            "{built}",
            "--val-set",
            "{data}",
            "--out",
            "{tmp}/out",
            "--halves",
            "3",
            "--max-steps",
            "1",
            "--workers",
            "1",
            "--method",
            "cosine",
            "--method",
            "dot",
        ],
    ],
    ids=lambda words: words[0],
)
def test_every_command_says_it_once(words: list[str], alpaca: Path, lab: Lab, built: Path, tmp_path: Path) -> None:
    import shutil

    store = shutil.copytree(built, tmp_path / "built")
    places = {"model": lab.checkpoint, "data": alpaca, "tmp": tmp_path, "built": store}
    given = [word.format(**places) for word in words]
    outcome = lab.run(*given, *ALPACA, "--quiet")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count(NOTE) == 1, outcome.err
    assert f"note: {alpaca}: " in outcome.err


@pytest.mark.thin(1)
@pytest.mark.parametrize("prints", [False, True])
def test_tools_that_the_template_leaves_out_are_named_once(prints: bool, lab: Lab, tmp_path: Path) -> None:
    def template(model: Any, tokenizer: Any) -> None:
        tools = "{{ tools | tojson if tools }}" if prints else ""
        tokenizer.chat_template = tools + "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"

    model = lab.model(tmp_path / "model", change=template)
    turns = [{"role": "user", "content": "the cat"}, {"role": "bot", "content": "sees"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [{"messages": turns}, *({"messages": turns, "tools": tools} for _ in range(12))]
    data = lab.write(tmp_path / "rows.jsonl", rows)
    store = tmp_path / "store"
    said = "sample '1' has tools, and the tokenizer's chat template leaves them out"
    for words in (
        ["build", "--checkpoint", model, "--data", data, "--store", store, "--proj-precondition", "none"],
        ["tokenize", "--tokenizer", model, "--data", data, "--out", tmp_path / "shards"],
        ["query", "--store", store, "--val-set", data],
        ["full-gradients", "--checkpoint", model, "--data", data, "--out", tmp_path / "out", "--max-samples", "3"],
    ):
        outcome = lab.run(*words, "--quiet")
        assert outcome.code == 0, outcome.err
        assert outcome.err.count(said) == (0 if prints else 1), outcome.err
