"""The whole way of some forms of corpus, by the commands: a build that is killed and resumed, a query that shows texts,
a selection of the original rows. Vectors, ids and texts are those of the same rows as lines of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore.corpus import Corpus, ResolvedFields
from tests.support.corpora import csv_bytes, json_bytes, jsonl_bytes, write_arrow, write_parquet

if TYPE_CHECKING:
    from tests.conftest import Lab, Rows

pytestmark = pytest.mark.slow
COUNT = 15
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Way:
    """How rows are written into a folder, the options that read them from there, and the file that is selected."""

    rows: Callable[[Rows], Rows]
    write: Callable[[Path, Rows], Sequence[str]]
    options: Sequence[str] = ()
    out: str = "out.jsonl"


def same(rows: Rows) -> Rows:
    return rows


def nested(rows: Rows) -> Rows:
    return [
        {"meta": {"domain": row["domain"], "id": row["id"], "year": 2000 + i}, "body": {"text": row["text"]}}
        for i, row in enumerate(rows)
    ]


def turns(rows: Rows) -> Rows:
    return [
        {
            "id": row["id"],
            "conversations": [{"from": "human", "value": "Go on."}, {"from": "gpt", "value": row["text"]}],
        }
        for row in rows
    ]


def prompted(rows: Rows) -> Rows:
    return [
        {
            "id": 2**80 + i,
            "prompt": [{"role": "user", "content": "Go on."}],
            "completion": [{"role": "assistant", "content": row["text"]}],
        }
        for i, row in enumerate(rows)
    ]


def one(name: str, encode: Callable[[Rows], bytes]) -> Callable[[Path, Rows], Sequence[str]]:
    def write(folder: Path, rows: Rows) -> Sequence[str]:
        (folder / name).write_bytes(encode(rows))
        return ["--data", str(folder / name)]

    return write


def feather(folder: Path, rows: Rows) -> Sequence[str]:
    write_arrow(folder / "a.feather", rows)
    return ["--data", str(folder / "a.feather")]


def several(folder: Path, rows: Rows) -> Sequence[str]:
    (folder / "b.json").write_bytes(json_bytes(rows[:4]))
    (folder / "more").mkdir()
    (folder / "more/1.json").write_bytes(json_bytes(rows[4:5]))
    (folder / "more/2.json").write_bytes(json_bytes(rows[5:], "json-data"))
    return ["--data", str(folder / "b.json"), "--data", str(folder / "more/*.json")]


def clone(folder: Path, rows: Rows) -> Sequence[str]:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "data").mkdir()
    write_parquet(folder / "data/train-00000-of-00002.parquet", rows[:8])
    write_parquet(folder / "data/train-00001-of-00002.parquet", rows[8:])
    write_parquet(folder / "data/test-00000-of-00001.parquet", rows[:1])
    return ["--data", f"{folder}:train"]


FIELDS = ["--text-field", "body.text", "--domain-field", "meta.domain", "--id-field", "meta.id"]
WAYS = {
    "nested": Way(nested, one("a.json", json_bytes), [*FIELDS, "--keep-fields", "meta.year"], "out.json"),
    "semicolons in utf-16": Way(
        same, one("a.csv", lambda rows: csv_bytes(rows, ";").decode().encode("utf-16")), ["--delimiter", ";"], "out.csv"
    ),
    "cp1252": Way(
        same,
        one("a.tsv", lambda rows: csv_bytes(rows, "\t").decode().encode("cp1252")),
        ["--encoding", "cp1252"],
        "out.tsv",
    ),
    "feather": Way(same, feather, (), "out.feather"),
    "several": Way(same, several, (), "out.json"),
    "clone": Way(same, clone, (), "out.parquet"),
    "sharegpt": Way(turns, one("a.json", lambda rows: json_bytes(rows, "json-objects")), (), "out.json"),
    "prompts of messages": Way(prompted, one("a.jsonl", jsonl_bytes)),
}


@pytest.mark.parametrize("name", WAYS)
def test_whole_way(lab: Lab, name: str, tmp_path: Path) -> None:
    way, data = WAYS[name], tmp_path / "data"
    data.mkdir()
    model = lab.model(tmp_path / "model", change=lambda model, tokenizer: setattr(tokenizer, "chat_template", TEMPLATE))
    rows = way.rows([{**row, "text": row["text"] + " – süß"} for row in lab.sample_rows(COUNT)])
    source = way.write(data, rows)
    build = ["build", "--checkpoint", str(model), "--span-rows", "4", "--name", "part", "--quiet", *way.options]

    def built(store: str, *source: str, **order: Any) -> Any:
        return lab.run(*build, "--store", tmp_path / store, *source, **order)

    whole = built("whole", *source)
    assert whole.code == 0, whole.err
    fault = {"call": "name", "path": r"commits/00000002\.json$", "when": "before", "number": 1, "act": "kill"}
    assert built("store", *source, fault=fault).code == -9
    resumed = built("store", *source)
    assert resumed.code == 0, resumed.err
    assert lab.tree(tmp_path / "store") == lab.tree(tmp_path / "whole")
    assert lab.run("verify", "--store", tmp_path / "store").code == 0

    (tmp_path / "same.jsonl").write_bytes(jsonl_bytes(rows))
    reading = [word for word in way.options if word not in ("--delimiter", ";", "--encoding", "cp1252")]
    lines = lab.run(*build[:8], *reading, "--store", tmp_path / "lines", "--data", tmp_path / "same.jsonl")
    assert lines.code == 0, lines.err
    parts = [ghoststore.Store.open(tmp_path / store).part() for store in ("store", "lines")]
    assert len({part.manifest["corpus"]["fingerprint"] for part in parts}) == 1
    vectors = [part.read_rows("vectors", range(COUNT)) for part in parts]
    assert np.array_equal(*vectors)

    val = way.write(_new(tmp_path / "val"), rows[:2])
    asked = ["--store", tmp_path / "store", "--val-set", val[1], "--device", "cpu", *_val_options(way.options)]
    query = lab.run("query", *asked, "--top-k", COUNT, "--json")
    assert query.code == 0, query.err
    hits = query.json["results"][0]["hits"]
    texts = {sample.source_row: sample.preview() for sample in Corpus.open(rows, _fields(parts[0])).samples()}
    assert {hit["source_row"]: hit["text"] for hit in hits} == texts
    selected = lab.run("select", *asked, "--count", "3", "--out", tmp_path / way.out)
    assert selected.code == 0, selected.err
    listed = (tmp_path / f"{way.out}.report.rows.jsonl").read_text().splitlines()
    chosen = [json.loads(line)["source_row"] for line in listed]
    assert chosen == sorted(chosen)
    again = Corpus.open(tmp_path / way.out, _fields(parts[0], "encoding"))  # text files are written in UTF-8
    assert [sample.preview() for sample in again.samples()] == [texts[row] for row in chosen]
    if way.out.endswith("json"):
        assert json.loads((tmp_path / way.out).read_text()) == [rows[row] for row in chosen]
    if name == "nested":
        condition = lab.run("query", *asked, "--where", '"meta.year" >= 2010', "--json")
        assert {hit["source_row"] for hit in condition.json["results"][0]["hits"]} == set(range(10, COUNT))


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _val_options(options: Sequence[str]) -> list[str]:
    """Those of a build that a query takes, too."""
    return [word for word in options if word not in ("--keep-fields", "meta.year")]


def _fields(part: Any, *without: str) -> ResolvedFields:
    """The fields of a part, but for how to read its files (``without``, or all of that)."""
    left_out = without or ("encoding", "delimiter")
    stored = part.manifest["corpus"]["fields"]
    return ResolvedFields.from_json({name: value for name, value in stored.items() if name not in left_out})
