"""What stands behind a sample and a ranking, as JSON: exports, runs, near-duplicates, rows near a row."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

import ghoststore
from tests.support.score_runs import whole

if TYPE_CHECKING:
    from tests.conftest import Lab

pytest.importorskip("starlette", reason="the explorer needs starlette")
pytest.importorskip("uvicorn", reason="the explorer needs uvicorn")

from ghoststore.server.choosing import OFFERED, OWN
from ghoststore.settings.question import parse_quota

VAL = [{"text": "the old dog runs"}]
LONG = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part whose last rows are near-duplicates of one another, with a field that only the corpus has."""
    folder = tmp_path_factory.mktemp("views")
    texts = [LONG, f"{LONG} eleven", "one two three four"]
    odd = [{"id": f"odd {place}", "text": text, "domain": "odd"} for place, text in enumerate(texts)]
    rows = [row | {"note": f"é {place}"} for place, row in enumerate([*lab.sample_rows(20), *odd])]
    rows.append({"id": "empty", "text": "", "domain": "odd", "note": "no vector"})
    corpus = lab.write(folder / "corpus.jsonl", rows)
    ghoststore.build(checkpoint=lab.checkpoint, data=corpus, store=folder / "store", name="part")
    return folder / "store"


@pytest.fixture(scope="module")
def explorer(store: Path) -> Iterator[ghoststore.Explorer]:
    with ghoststore.serve(store) as explorer:
        yield explorer


def ask(explorer: ghoststore.Explorer, path: str, body: Any = None) -> Any:
    """The JSON of an answer, or (status, message)."""
    headers = {"Authorization": f"Bearer {explorer.token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(f"http://127.0.0.1:{explorer.port}/api/{path}", data, headers)) as answer:
            return json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


CHOICES: list[dict[str, Any]] = [
    {"fraction": 0.3},
    {"count": 5, "order": "score", "metric": "cosine", "where": "n_tokens > 5"},
    {"count": 6, "quotas": "equal"},
    {"count": 6, "quotas": {"sky": 2, "earth": 0.5}},
    {"token_budget": 60, "quotas": "proportional", "leaks": "keep"},
    {"count": 6, "quota": ["sky=1", "earth=0.5"]},
    {"count": 4, "diversity": "mmr", "phrase": "8:11"},
    {"count": 4, "diversity": "greats", "diversity_weight": 0.5, "candidates": 9},
    {"fraction": 0.2, "form": "parquet"},
]


@pytest.mark.thin(4)
@pytest.mark.parametrize("options", CHOICES, ids=[" ".join(options) for options in CHOICES])
def test_files_are_those_that_select_writes(
    explorer: ghoststore.Explorer, store: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    answer = ask(explorer, "select", {"val_set": VAL, **options})
    wanted = dict(options)
    if "quota" in wanted:
        wanted["quotas"] = dict(parse_quota(word) for word in wanted.pop("quota"))
    name = f"chosen.{wanted.pop('form', 'jsonl')}"
    report = ghoststore.select(store=store, val_set=VAL, out=tmp_path / name, **wanted)
    files = {file["name"]: base64.b64decode(file["base64"]) for file in answer["files"]}
    assert files == {
        name: (tmp_path / name).read_bytes(),
        Path(report.rows_file).name: Path(report.rows_file).read_bytes(),
    }
    assert answer["report"]["samples"] == report.samples
    assert {key: answer["report"][key] for key in ("out", "domains", "leaks", "short")} == {
        **{key: report.to_json()[key] for key in ("domains", "leaks", "short")},
        "out": name,
    }
    assert str(tmp_path.parent) not in json.dumps(answer["report"]["rows_file"])


def test_the_dataset_card(
    explorer: ghoststore.Explorer, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is that of `select` in the folder of the rows: of the server's own folder it says nothing."""
    options: dict[str, Any] = {"count": 5, "quotas": {"sky": 0.5}, "diversity": "mmr", "card": True}
    answer = ask(explorer, "select", {"val_set": VAL, **options})
    monkeypatch.chdir(tmp_path)
    report = ghoststore.select(store=store, val_set=VAL, out="chosen.jsonl", **options)
    assert report.card == "README.md"
    files = {file["name"]: base64.b64decode(file["base64"]) for file in answer["files"]}
    assert files == {name: (tmp_path / name).read_bytes() for name in files}
    assert list(files) == ["chosen.jsonl", "chosen.jsonl.report.rows.jsonl", "README.md"]
    assert answer["report"]["card"] == "README.md"
    assert b" --out chosen.jsonl " in files["README.md"]


def test_rows_by_hand(explorer: ghoststore.Explorer) -> None:
    answer = ask(explorer, "select", {"val_set": VAL, "source_rows": [7, 3, 21, 7]})
    rows, entries = (base64.b64decode(file["base64"]).decode().splitlines() for file in answer["files"])
    assert [json.loads(line)["note"] for line in rows] == ["é 3", "é 7", "é 21"]
    assert [json.loads(line)["source_row"] for line in entries] == [3, 7, 21]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"count": 5, "quota": ["sky=1.0", "odd=0"], "diversity": "facility-location"},
        {"source_rows": [7, 3, 21]},
    ],
)
def test_the_command_line_of_a_choice(explorer: ghoststore.Explorer, tmp_path: Path, options: dict[str, Any]) -> None:
    answer = ask(explorer, "select", {"val_set": VAL, **options})
    command = answer["explorer"]["command"].replace("| ghoststore ", f"| {sys.executable} -m ghoststore ")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True)
    for file in answer["files"]:
        assert (tmp_path / file["name"]).read_bytes() == base64.b64decode(file["base64"])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"count": 3, "out": "/tmp/x"}, "no keyword 'out'"),
    ({"count": 3, "report": "/tmp/x.json"}, "no keyword 'report'"),
    ({"count": 3, "quota": "sky=2"}, '`quota` is a list such as ["code=0.3", "sky=100"]'),
    ({"count": 3, "quota": ["sky"]}, "`quota`: 'sky': expected DOMAIN=SHARE or DOMAIN=SAMPLES"),
    ({"count": 3, "quota": ["sky=1", "sky=2"]}, "`quota`: 'sky' has two quotas"),
    ({"count": 3, "quota": ["sky=1"], "quotas": "equal"}, "`quota` names domains, `quotas` takes them all"),
    ({"token_budget": 90, "quota": ["sky=1"]}, "is a number of samples: with `token_budget` give a share"),
    ({"source_rows": [1], "quota": ["sky=1"]}, "so does `quotas`"),
    ({"count": 3, "data": "/etc/passwd"}, "no keyword 'data'"),
    ({"count": 3, "val_set": "/etc/passwd"}, "is a list of texts"),
    ({"count": 3, "form": "../x"}, "`form` is one of jsonl, parquet"),
    ({"count": 3, "part": ["a"]}, "name of one part"),
    ({"source_rows": [1], "count": 3}, "so does `count`"),
    ({"source_rows": ["1) OR (1=1"]}, "a list of rows of the corpus"),
    ({"source_rows": [True]}, "a list of rows of the corpus"),
    ({"source_rows": []}, "a list of rows of the corpus"),
    ({"source_rows": [900]}, "part 'part' has no vector of 1 of 1 rows, the first is row 900 of the corpus"),
    ({"source_rows": [3, 24, 23, 900]}, "no vector of 3 of 4 rows, the first is row 23 of the corpus"),
    ({}, "fraction"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_choosing_is_refused(explorer: ghoststore.Explorer, options: dict[str, Any], message: str) -> None:
    status, said = ask(explorer, "select", {"val_set": VAL, **options})
    assert status == 400, said
    assert message in said


def test_the_model_is_loaded_again_after_choosing(explorer: ghoststore.Explorer) -> None:
    question = {"val_set": VAL, "top_k": 3}
    before = ask(explorer, "query", question)["results"]
    ask(explorer, "select", {"val_set": VAL, "count": 3})
    assert ask(explorer, "query", question)["results"] == before


@pytest.mark.slow
def test_the_command_line_of_near_duplicates(explorer: ghoststore.Explorer, tmp_path: Path) -> None:
    found = ask(explorer, "sample/part/20/duplicates")
    line = found["command"].replace("| ghoststore ", f"| {sys.executable} -m ghoststore ")
    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True, capture_output=True)
    report = json.loads((tmp_path / "nearest.jsonl.report.json").read_text())
    assert {leak["source_row"]: leak["overlap"] for leak in report["leaks"]["rows"]} == {20: 1.0, 21: 1.0}


def test_near_duplicates(explorer: ghoststore.Explorer) -> None:
    found = ask(explorer, "sample/part/20/duplicates")
    assert found["rows"] == [{"id": "odd 1", "source_row": 21, "overlap": 1.0}]
    assert ask(explorer, "sample/part/21/duplicates")["rows"] == [{"id": "odd 0", "source_row": 20, "overlap": 0.75}]
    assert ask(explorer, "sample/part/22/duplicates")["found"] == 0
    assert ask(explorer, "sample/part/900/duplicates") == (404, "part 'part' has no row of the corpus's row 900")
    assert ask(explorer, "sample/part/x/duplicates")[0] == 404


def test_rows_near_a_row(explorer: ghoststore.Explorer, store: Path) -> None:
    answer = ask(explorer, "query", {"near": 4, "metric": "cosine", "top_k": 3})
    beside = answer.pop("explorer")
    assert answer == ghoststore.query(store=store, near=4, metric="cosine", top_k=3).to_json()
    assert beside["command"] == f"ghoststore query --store {store} --part part --metric cosine --top-k 3 --near 4"
    for options in ({"near": 4}, {"val_set": VAL, "phrase": "4:7"}, {"val_set": VAL, "histogram": True, "each": True}):
        there = ghoststore.query(server=explorer.url, top_k=3, **options)
        here = ghoststore.query(store=store, top_k=3, **options)
        assert there.results == here.results
    assert ask(explorer, "query", {"near": 4, "val_set": VAL})[0] == 400
    assert ask(explorer, "query", {"near": "4"})[0] == 400


def test_where_it_was_trained_on(lab: Lab, tmp_path: Path) -> None:
    rows = [row | {"id": f"s{place}"} for place, row in enumerate(lab.sample_rows(3))] + [{"id": "no", "text": "a dog"}]
    corpus = lab.write(tmp_path / "corpus.jsonl", [{"domain": "sky", **row} for row in rows])
    ghoststore.build(checkpoint=lab.checkpoint, data=corpus, store=tmp_path / "store", name="part")
    whole(tmp_path / "store", "a_run")
    with ghoststore.serve(tmp_path / "store") as explorer:
        (run,) = ask(explorer, "sample/part/0/runs")["runs"]
        (other,) = ask(explorer, "sample/part/3/runs")["runs"]
    found = ghoststore.scores(store=tmp_path / "store", run="a_run", sample="s0").to_json()
    expected = json.loads(json.dumps(found))
    assert {key: run[key] for key in ("settings", "summary", "history")} == {
        key: expected[key] for key in ("settings", "summary", "history")
    }
    assert len(run["history"]) > 10
    assert "has no sample with the id 'no'" in other["problem"]
    line = run["command"].replace("ghoststore", f"{sys.executable} -m ghoststore", 1) + " --json --quiet"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["history"] == run["history"]


def test_a_row_or_a_part_that_is_none_is_said_alike_by_all_addresses(explorer: ghoststore.Explorer) -> None:
    for behind in ("", "/runs", "/duplicates"):
        assert ask(explorer, f"sample/part/900{behind}")[0] == 404
        assert ask(explorer, f"sample/nonesuch/0{behind}")[0] == 400


@pytest.mark.parametrize("path", ["select", "sample/part/0/runs", "sample/part/0/duplicates"])
def test_nothing_without_the_token(explorer: ghoststore.Explorer, path: str) -> None:
    body = b"{}" if path == "select" else None
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(f"http://127.0.0.1:{explorer.port}/api/{path}", body, {"Content-Type": "application/json"}))
    assert refused.value.code == 401


def test_the_document_names_them(explorer: ghoststore.Explorer) -> None:
    request = Request(
        f"http://127.0.0.1:{explorer.port}/openapi.json", headers={"Authorization": f"Bearer {explorer.token}"}
    )
    with urlopen(request) as answer:
        paths = json.load(answer)["paths"]
    schema = paths["/api/select"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == {*OFFERED, *OWN}
    assert {"/api/sample/{part}/{row}/runs", "/api/sample/{part}/{row}/duplicates"} < set(paths)
