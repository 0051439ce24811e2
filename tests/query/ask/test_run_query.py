"""``ghoststore query --run``: the gradients that a training keeps, against slow sums, against a part and exact
gradients at the same weights, and while the training is at work.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import UsageError
from ghoststore.store import Run, Store
from query.common.rank_correlation import spearman
from tests.support.kept_runs import PLAIN, K, ask, at_checkpoint, scores, train
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab


def run_of(folder: Path, name: str = "moving") -> Run:
    return Store.open(folder / "store").run(name)


def kept(run: Run, array: str) -> np.ndarray:
    """(K, …, D) float64: codes times the scales of their blocks."""
    codes, scale = (run.read_committed(name).astype(np.float64) for name in (array, f"{array}_scale"))
    layout = run.layout.gradients
    assert layout is not None
    for group, (_, start, stop) in enumerate(layout.groups):
        codes[..., start:stop] *= scale[..., group, None]
    return codes


def by_hand(run: Run, metric: str, weight: str, steps: range, query: np.ndarray | None) -> dict[int, float]:
    """Sums over visits, with each step's own val gradient where there is no ``query``."""
    gradient, val = kept(run, "gradient"), kept(run, "val_gradient")
    sums: dict[int, float] = defaultdict(float)
    every = run.layout.gradients.every  # type: ignore[union-attr]
    source = run.rows.read("source_row", 0, run.layout.rows)
    for step in steps:
        if step % every:
            continue
        q = val[step // every] if query is None else query
        rows = gradient[step // every][0]
        dots = rows @ q
        if metric == "cosine":
            dots /= np.linalg.norm(rows, axis=1) * np.linalg.norm(q)
        factor = run.read_committed("learning_rate")[step] if weight == "learning-rate" else 1 / np.abs(dots).mean()
        for place, row in enumerate(run.read_committed("sample")[step, 0]):
            sums[int(source[row])] += factor * dots[place]
    return dict(sums)


@pytest.mark.parametrize("weight", ["learning-rate", "unit"])
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_each_steps_own_val_gradient(folder: Path, metric: str, weight: str) -> None:
    for options, steps in (({}, range(12)), ({"last": 5}, range(7, 12)), ({"step_window": "3:9"}, range(3, 9))):
        result = ask(folder, metric=metric, weight=weight, **options)
        assert scores(result) == pytest.approx(by_hand(run_of(folder), metric, weight, steps, None), rel=1e-9)
        assert [one.query for one in result.results] == ["own"]
        assert result.settings["kept_steps"] == len([step for step in steps if step % 2 == 0])
        assert result.settings["steps"] == [steps.start, steps.stop]
    seen = np.unique(run_of(folder).read_committed("sample")[::2], return_counts=True)
    assert {hit.source_row: hit.times for hit in ask(folder).results[0].hits} == dict(
        zip(*map(list, seen), strict=True)
    )


@pytest.mark.slow
def test_a_second_val_set_is_subtracted(lab: Lab, folder: Path) -> None:
    """With weights that do not depend on the question, scores by dot are a difference."""
    far = lab.write(folder / "far.jsonl", lab.sample_rows(4, 9))
    given: dict[str, Any] = {**at_checkpoint(folder), "weight": "learning-rate", "metric": "dot"}
    near, away = scores(ask(folder, **given)), scores(ask(folder, **{**given, "val_set": far}))
    both = ask(folder, **given, minus=far)
    size = max(map(abs, near.values()))
    assert scores(both) == pytest.approx({row: near[row] - away[row] for row in near}, abs=1e-5 * size)
    assert both.settings["minus_rows"] == 4
    groups = ask(folder, **given, minus=far, group_field="domain", combine="max")
    assert [one.query for one in groups.results] == ["combined", "earth", "sky"]
    for settings in ({"minus": far}, {"minus": far, "checkpoint": folder / "moving/checkpoint-6"}):
        with pytest.raises(UsageError, match="is for a val set: give `val_set`"):
            ask(folder, **settings)


@pytest.mark.slow
def test_samples_that_match_a_condition(folder: Path, tmp_path: Path) -> None:
    """Of a query, a selection and an export; scores are what they were."""
    sql = "domain = 'sky' AND source_row > 5"
    everything, found = ask(folder, bottom_k=K), ask(folder, bottom_k=K, where=sql)
    expected = {row: score for row, score in scores(everything).items() if row % 2 == 0 and row > 5}
    assert scores(found) == expected
    assert [hit.source_row for hit in found.results[0].bottom] == sorted(expected, key=lambda row: expected[row])
    assert found.settings["where"] == sql
    assert found.settings["rows_matching"] == len([row for row in range(27) if row % 2 == 0 and row > 5])
    report = ghoststore.select(
        store=folder / "store", run="moving", out=tmp_path / "best.jsonl", fraction=1.0, where=sql, device="cpu"
    )
    assert report.samples == len(expected)
    ghoststore.export(store=folder / "store", run="moving", out=tmp_path / "some.npy", where=sql)
    lines = [json.loads(line) for line in (tmp_path / "some.npy.rows.jsonl").read_text().splitlines()]
    assert {line["source_row"] for line in lines} == set(expected)
    with pytest.raises(UsageError, match="run 'moving' has no column 'text'"):
        ask(folder, where="text = 'a'")


@pytest.mark.slow
def test_a_val_set_at_a_checkpoint(folder: Path, lab: Lab, tmp_path: Path) -> None:
    """The query is the vector of a build at that checkpoint, with the run's projection."""
    checkpoint = folder / "moving" / "checkpoint-6"
    ghoststore.build(
        checkpoint=checkpoint,
        data=folder / "val.jsonl",
        store=tmp_path / "s",
        name="val",
        projection=PLAIN,
        proj_dtype="float32",
        device="cpu",
    )
    vectors = vectors_of(Store.open(tmp_path / "s").part()).astype(np.float64)
    whole = ask(folder, metric="dot", **at_checkpoint(folder))
    wanted = by_hand(run_of(folder), "dot", "unit", range(12), vectors.mean(0))
    assert scores(whole) == pytest.approx(wanted, rel=1e-3, abs=1e-5 * max(map(abs, wanted.values())))
    each = ask(folder, metric="dot", each=True, **at_checkpoint(folder))
    assert [(one.query, one.val_row) for one in each.results] == [(f"v{i}", i) for i in range(5)]
    for place in range(5):
        wanted = by_hand(run_of(folder), "dot", "unit", range(12), vectors[place])
        assert scores(each, place) == pytest.approx(wanted, rel=1e-3, abs=1e-5 * max(map(abs, wanted.values())))
    groups = ask(folder, group_field="domain", combine="max", **at_checkpoint(folder))
    assert [one.query for one in groups.results] == ["combined", "earth", "sky"]
    largest = {row: max(scores(groups, 1)[row], scores(groups, 2)[row]) for row in scores(groups)}
    assert scores(groups) == pytest.approx(largest)
    rated: dict[str, Any] = {"metric": "dot", "weight": "learning-rate", **at_checkpoint(folder)}
    whole = ask(folder, **rated)
    wanted = by_hand(run_of(folder), "dot", "learning-rate", range(12), vectors.mean(0))
    assert scores(whole) == pytest.approx(wanted, rel=1e-3, abs=1e-5 * max(map(abs, wanted.values())))
    layers, others = ask(folder, **rated, layers=("mlp",)), ask(folder, **rated, exclude_layers=("mlp",))
    for row, score in scores(whole).items():  # with `unit` each is scaled by its own mean
        assert scores(layers)[row] + scores(others)[row] == pytest.approx(score, abs=1e-9)


@pytest.fixture(scope="module")
def exact(folder: Path, lab: Lab) -> tuple[np.ndarray, np.ndarray]:
    """(27, N) and (5, N): the gradients themselves, of the rows and of the val samples."""
    whole = ProjectionConfig(rank_total="full", precondition="none")
    vectors = []
    for name, data in (("rows", lab.corpus), ("val", folder / "val.jsonl")):
        store = folder / "exact"
        ghoststore.build(
            checkpoint=lab.checkpoint,
            data=data,
            store=store,
            name=name,
            projection=whole,
            proj_dtype="float32",
            device="cpu",
        )
        vectors.append(vectors_of(Store.open(store).part(name)).astype(np.float64))
    return vectors[0], vectors[1]


@pytest.mark.slow
def test_as_faithful_as_a_part(folder: Path, lab: Lab, exact: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    """Where the weights stand still, each row's gradient is that of a part at these weights: the run ranks them as such
    a part does, and both as exact gradients do, as far as the projection lets them.
    """
    ghoststore.build(
        checkpoint=lab.checkpoint,
        data=lab.corpus,
        store=tmp_path / "s",
        name="part",
        projection=PLAIN,
        proj_dtype="int8",
        device="cpu",
    )
    for metric in ("dot", "cosine"):
        result = ask(
            folder, "still", metric=metric, weight="learning-rate", each=True, **at_checkpoint(folder, "still", 9)
        )
        part = ghoststore.query(
            store=tmp_path / "s", val_set=folder / "val.jsonl", metric=metric, each=True, top_k=K, text=False
        )
        run_QR, part_QR = (
            np.array([[scores(r, q)[row] for row in range(27)] for q in range(5)]) for r in (result, part)
        )
        assert np.abs(run_QR / 1e-9 - part_QR).max() < 0.01 * np.abs(part_QR).max()
        rows, val = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in exact) if metric == "cosine" else exact
        exact_QR = val @ rows.T
        faithful = [spearman(scores_QR, exact_QR).mean() for scores_QR in (run_QR, part_QR)]
        assert faithful[0] > faithful[1] - 0.01
        assert faithful[1] > 0.5


@pytest.mark.slow
def test_while_the_training_is_at_work(folder: Path, lab: Lab, tmp_path: Path) -> None:
    """What is committed answers at once, out of journal and chunks alike; and the answer is the same in the end."""
    words = ["train", "--data", lab.corpus, "--val-set", folder / "val.jsonl", "--checkpoint", lab.checkpoint]
    words += ["--store", tmp_path / "store", "--output-dir", tmp_path / "out", "--name", "live", "--device", "cpu"]
    words += ["--batch-size", 4, "--max-steps", 12, "--dot-prod-save-interval", 2, "--keep-gradients", 2]
    words += ["--proj-rank-total", 16, "--checkpoint-interval", 6, "--learning-rate", 5e-3, "--quiet"]
    fault = {"call": "fsync", "path": r"journal/00000000\.log$", "number": 6, "when": "before", "act": "stop"}
    pid = lab.start(*map(str, words), fault=fault)
    lab.stopped(pid)
    questions: list[dict[str, Any]] = [
        {"weight": "learning-rate"},
        {"weight": "unit", "metric": "dot"},
        {"weight": "loss-fall"},
        {"val_set": folder / "val.jsonl", "checkpoint": lab.checkpoint, "each": True},
    ]
    live = [ask(tmp_path, "live", **question) for question in questions]
    stop = live[0].settings["steps"][1]
    assert 4 <= stop < 12
    os.kill(pid, signal.SIGCONT)
    outcome = lab.wait(pid)
    assert outcome.code == 0, outcome.err
    assert run_of(tmp_path, "live").complete
    for question, before in zip(questions, live, strict=True):
        after = ask(tmp_path, "live", step_window=f"0:{stop}", **question)
        assert [one.hits for one in after.results] == [one.hits for one in before.results]
        assert len(scores(ask(tmp_path, "live", **question))) > 0


@pytest.mark.slow
def test_a_run_that_keeps_every_step_as_float32(lab: Lab, folder: Path, tmp_path: Path) -> None:
    """GhostEngineManager(method="GradProjLora") without ``keep_gradients``: no val gradients, and no tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(lab.checkpoint)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    config = {"method": "GradProjLora", "store": tmp_path / "store", "name": "loop", "max_steps": 9, "batch_size": 3}
    config |= {"samples": [row["id"] for row in lab.rows], "proj_rank_total": 256}
    with ghoststore.GhostEngineManager(config, model, optimizer) as manager:
        for step in range(9):
            texts = [tokenizer(row["text"])["input_ids"] for row in lab.rows[3 * step : 3 * step + 3]]
            width = max(map(len, texts))
            ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
            labels = torch.tensor([text + [-100] * (width - len(text)) for text in texts])
            manager.attach_train_batch(ids, labels, step, torch.arange(3 * step, 3 * step + 3))
            X, Y = manager.prepare_forward_input(ids, labels)
            model(input_ids=X, labels=Y, attention_mask=(Y != -100).long()).loss.backward()
            manager.prepare_gradients()
            optimizer.step()
            manager.aggregate_and_log()
            optimizer.zero_grad()
    asked = {"val_set": folder / "val.jsonl", "checkpoint": lab.checkpoint, "metric": "dot", "weight": "learning-rate"}
    found, still = (scores(ask(at, name, **asked)) for at, name in ((tmp_path, "loop"), (folder, "still")))
    assert found == pytest.approx(still, rel=0.02, abs=0.02 * max(map(abs, still.values())))
    with pytest.raises(UsageError, match="keeps no val gradients beside its samples'"):
        ask(tmp_path, "loop")
    assert ghoststore.info(tmp_path / "store").runs[0].gradients["dtype"] == "float32"  # type: ignore[index]


def test_hits_have_texts_and_files(folder: Path, lab: Lab, tmp_path: Path) -> None:
    result = ask(folder, text=True, top_k=3, bottom_k=2)
    for hit in result.results[0].hits:
        assert (hit.id, hit.text, hit.domain) == tuple(
            lab.rows[hit.source_row][name] for name in ("id", "text", "domain")
        )
    assert len(result.results[0].bottom) == 2
    said = lab.run("query", "--store", folder / "store", "--run", "moving", "--top-k", "3", "--json")
    assert said.json["results"][0]["hits"] == json.loads(json.dumps(result.to_json()))["results"][0]["hits"]
    shown = lab.run("query", "--store", folder / "store", "--run", "moving", "--last", "4", "--quiet")
    assert shown.code == 0, shown.err
    assert "times" in shown.out
    result.write(tmp_path / "hits.csv")
    assert (tmp_path / "hits.csv").read_text().splitlines()[0].endswith("window_start,times,last_step")


def test_a_phrase_of_the_val_set(folder: Path) -> None:
    """What stands after it is nothing to a causal model: it is the completion of a prompt."""
    text, words = "the old dog runs to the sea", " runs"
    start = text.index(words)
    stop = start + len(words)
    given: dict[str, Any] = {"metric": "dot", "checkpoint": folder / "moving/checkpoint-6"}
    found = ask(folder, val_set=[{"text": text}], phrase=f"{start}:{stop}", **given)
    completed = scores(ask(folder, val_set=[{"prompt": text[:start], "completion": words}], **given))
    assert scores(found) == pytest.approx(completed, abs=1e-4 * max(map(abs, completed.values())))
    assert scores(found) != scores(ask(folder, val_set=[{"text": text}], **given))
    assert found.settings["phrase"] == f"{start}:{stop}"


def test_select_takes_the_best_of_a_run(folder: Path, lab: Lab, tmp_path: Path) -> None:
    ranking = list(scores(ask(folder, weight="unit", last=8)))
    made = ghoststore.select(
        store=folder / "store", run="moving", weight="unit", last=8, count=5, order="score", out=tmp_path / "best.jsonl"
    )
    rows = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert rows == [lab.rows[row] for row in ranking[:5]]
    assert (made.settings["run"], made.settings["ranking"], made.available) == ("moving", "own", len(ranking))
    ghoststore.select(
        store=folder / "store", run="moving", count=3, out=tmp_path / "two.jsonl", **at_checkpoint(folder)
    )
    of_slice = {"step_window": slice(2, 10), "count": 3, "card": True}
    card = ghoststore.select(store=folder / "store", run="moving", out=tmp_path / "carded", **of_slice).card
    text = Path(str(card)).read_text()
    assert "| run | moving |" in text
    assert "No val set was given" in text
    (line,) = [line for line in text.splitlines() if line.startswith("ghoststore select")]
    again = shlex.split(line.replace("carded", "again").replace(" --card", ""))[1:]
    assert lab.run(*again).code == 0
    chosen = [(tmp_path / f"{name}.rows.jsonl").read_bytes() for name in ("carded.report", "again.report")]
    assert chosen[0] == chosen[1]
    assert len((tmp_path / "two.jsonl").read_text().splitlines()) == 3
    for options, words in (
        ({"diversity": "mmr"}, "compares samples at one checkpoint"),
        ({"leaks": "error"}, "looks for near-duplicates of the val set"),
    ):
        with pytest.raises(UsageError, match=words):
            ghoststore.select(store=folder / "store", run="moving", count=3, out=tmp_path / "no.jsonl", **options)


@pytest.mark.thin(1)
@pytest.mark.parametrize("form", [".parquet", ".npy", ".safetensors"])
def test_export_writes_the_gradients(folder: Path, form: str, tmp_path: Path) -> None:
    run, out = run_of(folder), tmp_path / f"gradients{form}"
    report = ghoststore.export(store=folder / "store", run="moving", out=out)
    wanted = kept(run, "gradient").reshape(24, -1).astype(np.float32)
    assert (report.run, report.part, report.rows) == ("moving", None, 24)
    if form == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(out)
        found = np.array(table["vector"].to_pylist(), dtype=np.float32)
        steps, samples = table["step"].to_pylist(), table["row"].to_pylist()
    else:
        from safetensors.numpy import load_file

        found = np.load(out) if form == ".npy" else load_file(out)["vectors"]
        lines = [json.loads(line) for line in (tmp_path / f"{out.name}.rows.jsonl").read_text().splitlines()]
        steps, samples = [line["step"] for line in lines], [line["row"] for line in lines]
    np.testing.assert_array_equal(found, wanted)
    assert steps == [step for step in range(0, 12, 2) for _ in range(4)]
    assert samples == run.read_committed("sample")[::2].ravel().tolist()


@pytest.mark.thin(1)
@pytest.mark.parametrize("form", [".parquet", ".npy"])
def test_export_says_what_was_trained_on(lab: Lab, folder: Path, form: str, tmp_path: Path) -> None:
    """Of a run that chose, each candidate with its weight; where a step trains on all, there is no such field."""
    shutil.copy(folder / "val.jsonl", tmp_path)
    train(lab, tmp_path, "chose", max_steps=3, candidates=6, keep=2, keep_gradients=1)
    run, out = Store.open(tmp_path / "store").run("chose"), tmp_path / f"gradients{form}"
    ghoststore.export(store=tmp_path / "store", run="chose", out=out)
    weights = run.read_committed("weight").ravel().tolist()
    assert weights.count(1) == 6
    assert [row["weight"] for row in rows_of(out)] == weights
    plain = tmp_path / f"plain{form}"
    ghoststore.export(store=folder / "store", run="moving", out=plain)
    assert all("weight" not in row for row in rows_of(plain))


def rows_of(exported: Path) -> list[dict[str, Any]]:
    """The fields of an export."""
    if exported.suffix == ".parquet":
        import pyarrow.parquet

        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(exported).to_pylist()
        return rows
    return [json.loads(line) for line in (exported.parent / f"{exported.name}.rows.jsonl").read_text().splitlines()]
