"""Fidelity against a brute-force computation, its limits, what is kept of it, and what cannot be measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

import ghoststore
import query.exact.products
from ghoststore import ProjectionConfig
from ghoststore.errors import CheckpointError, CorpusError, LayerError, MismatchError, UsageError
from ghoststore.progress import Silent
from query.fidelity.sample import SampleSpec
from tests.support.notes import Notes
from tests.support.parts import unbuild, vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

PARTS = {
    "full": {"projection": ProjectionConfig(precondition="none", layers=("all",), rank_total="full")},
    "layers": {"projection": ProjectionConfig(precondition="none", rank_total="full")},
    "rank": {"projection": ProjectionConfig(precondition="none", rank_total=64)},
    "low": {"projection": ProjectionConfig(precondition="none", rank_total=4)},
    "onebit": {"projection": ProjectionConfig(precondition="none", rank_total=64), "proj_dtype": "onebit"},
    "sketched": {"projection": ProjectionConfig(precondition="none", rank_total=64, compress=48)},
}
ROWS, VALS = 40, 8


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part a projection of the same 60 rows, of which two cannot be used."""
    folder = tmp_path_factory.mktemp("fidelity")
    rows: list[dict[str, Any]] = lab.sample_rows(60, 1)
    rows[7]["text"], rows[31]["text"] = "", None
    data = lab.write(folder / "train.jsonl", rows)
    lab.write(folder / "val.jsonl", lab.sample_rows(12, 3))
    shutil.copytree(lab.checkpoint, folder / "model")
    for name, settings in PARTS.items():
        ghoststore.build(
            checkpoint=folder / "model",
            data=data,
            store=folder / "store",
            name=name,
            span_rows=16,
            device="cpu",
            **({"proj_dtype": "float32"} | settings),
        )
    return folder / "store"


@pytest.fixture
def own(store: Path, tmp_path: Path) -> Path:
    """A copy of the store that may be changed, without what was measured."""
    return Path(shutil.copytree(store, tmp_path / "store", ignore=shutil.ignore_patterns("fidelity")))


def measure(store: Path, part: str, **settings: Any) -> ghoststore.FidelityReport:
    settings = {"rows": ROWS, "val_samples": VALS, "device": "cpu"} | settings
    return ghoststore.fidelity(store=store, part=part, **settings)


def brute_force(store: Path, name: str, metric: str) -> dict[str, np.ndarray]:
    """(Q, R) scores: stored, by exact gradients of the layers, and of all parameters. By transformers and autograd."""
    part = ghoststore.Store.open(store).part(name)
    ranked, vals = SampleSpec(rows=ROWS, val_samples=VALS).choose(part, Silent())
    assert not set(ranked) & set(vals)
    texts = [json.loads(line)["text"] for line in (store.parent / "train.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(store.parent / "model").eval().double()
    tokenizer = AutoTokenizer.from_pretrained(store.parent / "model")
    covered = {name for layer in part.manifest["layers"] for name in layer["parameters"]}
    gradients: dict[str, list[np.ndarray]] = {"layers": [], "all": []}
    for row in [*vals, *ranked]:
        ids = torch.tensor([tokenizer(texts[row])["input_ids"]])
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found = {name: p.grad.flatten().numpy().copy() for name, p in model.named_parameters()}
        gradients["layers"].append(np.concatenate([found[name] for name in sorted(covered)]))
        gradients["all"].append(np.concatenate(list(found.values())))
    vectors = vectors_of(part).astype(np.float64)
    exact_vals = vectors_of(ghoststore.Store.open(store).part(name if name != "onebit" else "rank"), 0, 60)
    scores = {"stored": (exact_vals[vals].astype(np.float64), vectors[ranked])}
    scores |= {key: (np.stack(all_[: len(vals)]), np.stack(all_[len(vals) :])) for key, all_ in gradients.items()}
    if metric == "cosine":
        scores = {
            key: tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in pair) for key, pair in scores.items()
        }
    return {key: queries @ rows.T for key, (queries, rows) in scores.items()}


@pytest.mark.thin(1)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("part", ["rank", "onebit", "sketched"])
def test_equals_brute_force(store: Path, part: str, metric: Any) -> None:
    scores = brute_force(store, part, metric)
    report = measure(store, part, metric=metric)
    assert (report.rows, report.val_samples, report.kept) == (ROWS, VALS, True)
    for key, found in (("layers", report.layers), ("all", report.all)):
        assert found is not None
        pairs = list(zip(scores["stored"], scores[key], strict=True))
        assert found.spearman.value == pytest.approx(np.mean([spearmanr(*pair).statistic for pair in pairs]), abs=1e-3)
        same = np.sign(scores["stored"]) == np.sign(scores[key])
        assert found.sign.value == pytest.approx(same.mean(), abs=1e-6)
        shared = [len(set(np.argsort(-a)[:10]) & set(np.argsort(-b)[:10])) / 10 for a, b in pairs]
        assert found.recall.value == pytest.approx(np.mean(shared), abs=0.02)
        error = np.sqrt(np.square(scores["stored"] - scores[key]).mean() / np.square(scores[key]).mean())
        assert found.relative_error.value == pytest.approx(error, rel=1e-4)
        for one in (found.spearman, found.sign, found.recall, found.relative_error):
            assert one.low <= one.value <= one.high
            assert one.low < one.high or one.value in (0, 1)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_full_rank_of_all_layers_is_exact(store: Path, metric: Any) -> None:
    report = measure(store, "full", metric=metric)
    for found in (report.layers, report.all):
        assert found is not None
        assert found.spearman.value > 1 - 1e-5
        assert found.recall.value == 1
        assert found.relative_error.value < 1e-5
    assert report.coverage == 1


def test_projection_and_layers_each_cost_something(store: Path) -> None:
    found = {name: measure(store, name) for name in ("layers", "rank", "low")}
    of_layers = [found[name].layers.spearman.value for name in ("layers", "rank", "low")]
    assert of_layers[0] > 1 - 1e-5
    assert of_layers == sorted(of_layers, reverse=True)
    assert of_layers[1] > of_layers[2]
    errors = [found[name].layers.relative_error.value for name in ("layers", "rank", "low")]
    assert errors[0] < 1e-5 < errors[1] < errors[2]
    everything = found["layers"].all
    assert everything is not None
    assert everything.spearman.value < 0.999, "embeddings, norms and head are not among mlp and attn"


def test_memory_bound_changes_nothing(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two val gradients at a time: four passes over the rows, the same numbers."""
    whole = measure(own, "rank", metric="dot")
    checkpoint = ghoststore.Store.open(own).part("rank").manifest["source"]["checkpoint"]
    numbers = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(checkpoint).parameters())
    monkeypatch.setattr(query.exact.products, "MEMORY", 2 * 4 * numbers)
    notes = Notes()
    again = measure(own, "rank", metric="dot", progress=notes)
    assert any("computed 4 times" in note for note in notes.said)
    for mine, theirs in ((again.layers, whole.layers), (again.all, whole.all)):
        assert mine is not None
        assert theirs is not None
        assert mine.relative_error.value == pytest.approx(theirs.relative_error.value, rel=1e-5)
        assert mine.recall == theirs.recall


@pytest.mark.slow
def test_a_val_set_and_layers_of_plain_blocks(own: Path, store: Path) -> None:
    val_set = store.parent / "val.jsonl"
    report = measure(own, "layers", val_set=val_set, layers=["c_fc"], metric="dot")
    assert report.val_samples == VALS
    assert report.layers.relative_error.value < 1e-5
    assert not report.kept
    assert not (own / "parts" / "layers" / "fidelity").exists()
    more = measure(own, "rank", val_set=val_set, val_samples=50, rows=100)
    assert (more.val_samples, more.rows) == (12, 58)
    assert more.kept
    assert more.val_set == str(val_set)
    with pytest.raises(UsageError, match="one sketch of all layers"):
        measure(own, "sketched", layers=["c_fc"])


def test_seed_chooses_rows(store: Path) -> None:
    part = ghoststore.Store.open(store).part("rank")
    drawn = [SampleSpec(rows=20, val_samples=5, seed=seed).choose(part, Silent()) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0][0], drawn[1][0])
    assert not np.array_equal(drawn[0][0], drawn[2][0])
    assert not {7, 31} & {int(row) for pair in drawn for rows in pair for row in rows}


@pytest.mark.slow
def test_scaled_by_an_optimizer_state(lab: Lab, store: Path, tmp_path: Path) -> None:
    """The reference is scaled as the part is: full rank agrees exactly. All parameters have no scales."""
    model = AutoModelForCausalLM.from_pretrained(store.parent / "model")
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in model.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * torch.rand(1, generator=generator)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    ghoststore.build(
        checkpoint=store.parent / "model",
        data=store.parent / "train.jsonl",
        store=tmp_path / "store",
        device="cpu",
        name="scaled",
        projection=ProjectionConfig(precondition="none", rank_total="full"),
        proj_dtype="float32",
        optimizer_state=tmp_path,
    )
    report = measure(tmp_path / "store", "scaled", metric="dot")
    assert report.layers.relative_error.value < 1e-5
    assert report.layers.spearman.value > 1 - 1e-5
    assert report.all is None
    shown = lab.run("fidelity", "--store", tmp_path / "store", "--rows", "20", "--val-samples", "3", "--quiet")
    assert shown.code == 0, shown.err
    expected = "against all parameters: not known, the part is in a metric of its layers alone"
    assert f"{expected} (scaled by the optimizer state given at build)" in shown.out
    for name, precondition in (("plain", "none"), ("learned", "kronecker")):
        built = lab.run(
            "build",
            "--checkpoint",
            store.parent / "model",
            "--data",
            store.parent / "train.jsonl",
            "--store",
            tmp_path / "own",
            "--name",
            name,
            "--proj-precondition",
            precondition,
            "--device",
            "cpu",
            "--quiet",
        )
        assert built.code == 0, built.err
        words = ("--store", tmp_path / "own", "--part", name, "--rows", "20", "--val-samples", "3", "--quiet")
        shown = lab.run("fidelity", *words)
        assert shown.code == 0, shown.err
        assert (f"{expected} (preconditioned by the Kronecker factors learned at build)" in shown.out) == (
            name == "learned"
        )
        assert "optimizer" not in shown.out


def ask(store: Path, **settings: Any) -> Any:
    return ghoststore.query(store=store, part="rank", val_set=store / "val.jsonl", text=False, device="cpu", **settings)


@pytest.mark.slow
def test_kept_and_shown(lab: Lab, own: Path, store: Path) -> None:
    shutil.copy(store.parent / "val.jsonl", own / "val.jsonl")
    assert ask(own).settings["fidelity"] is None
    outcome = lab.run("fidelity", "--store", own, "--part", "rank", "--rows", ROWS, "--val-samples", VALS, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["kept"]
    shown = ask(own).settings["fidelity"]
    assert (shown["state"], shown["rows"], shown["rows_covered"]) == ("current", ROWS, 60)
    assert shown["layers"] == outcome.json["layers"]
    (kept,) = ghoststore.info(own, part="rank").parts[0].fidelity
    assert kept == shown
    line = f"Spearman {shown['layers']['spearman']['value']:.2f} to exact gradients of the layers"
    for command in (["info"], ["query", "--val-set", own / "val.jsonl", "--no-text"]):
        told = lab.run(*command, "--store", own, "--part", "rank")
        assert told.code == 0, told.err
        assert line in told.out
        assert f"{ROWS} rows × {VALS} val samples by cosine" in told.out
    assert ask(own, metric="dot").settings["fidelity"] is None
    assert ask(own, layers=["c_fc"]).settings["fidelity"] is None
    assert ask(own, precondition="second-moment", damping=1.0).settings["fidelity"] is None
    measure(own, "rank", metric="dot")
    assert ask(own, metric="dot").settings["fidelity"]["metric"] == "dot"
    assert ghoststore.verify(own).sound


def test_stale_is_shown_and_said(lab: Lab, own: Path) -> None:
    put_back = unbuild(ghoststore.Store.open(own).part("rank"), 3)
    measure(own, "rank", rows=20)
    (current,) = ghoststore.info(own, part="rank").parts[0].fidelity
    assert current["state"] == "current"
    put_back()
    (stale,) = ghoststore.info(own, part="rank").parts[0].fidelity
    assert (stale["state"], stale["rows_covered"]) == ("stale", 48)
    shown = lab.run("info", "--store", own, "--part", "rank")
    assert "stale: it was measured when 48 rows were committed; 60 are now" in shown.out


def test_damage_is_told_and_mended(lab: Lab, own: Path, store: Path) -> None:
    shutil.copy(store.parent / "val.jsonl", own / "val.jsonl")
    measure(own, "rank")
    path = own / "parts" / "rank" / "fidelity" / "cosine.json"
    path.write_text(path.read_text().replace('"rows": 40', '"rows": 41'))
    (damaged,) = ghoststore.info(own, part="rank").parts[0].fidelity
    assert damaged["state"] == "damaged"
    assert "damaged" in lab.run("info", "--store", own, "--part", "rank").out
    told = lab.run("query", "--store", own, "--part", "rank", "--val-set", own / "val.jsonl", "--json")
    assert told.json["settings"]["fidelity"] is None
    assert "note: the measured fidelity is not shown" in told.err
    measure(own, "rank")
    assert ask(own).settings["fidelity"]["state"] == "current"


def test_of_another_part_is_not_shown(own: Path) -> None:
    measure(own, "rank")
    shutil.copytree(own / "parts" / "rank" / "fidelity", own / "parts" / "low" / "fidelity", dirs_exist_ok=True)
    assert ghoststore.info(own, part="low").parts[0].fidelity == []


def test_read_only_store_measures_and_says_so(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ghoststore.store.base.records.replace", refuse)
    assert not measure(own, "rank").kept


@pytest.mark.slow
def test_what_is_gone_is_said(lab: Lab, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(lab.checkpoint, tmp_path / "model"))
    corpus = Path(shutil.copy(lab.corpus, tmp_path / "corpus.jsonl"))
    ghoststore.build(checkpoint=checkpoint, data=corpus, store=tmp_path / "store", name="part", device="cpu")
    checkpoint.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="fidelity of part 'part' cannot be measured without its checkpoint"):
        measure(tmp_path / "store", "part", rows=15)
    assert measure(tmp_path / "store", "part", rows=15, val_samples=4, checkpoint=tmp_path / "moved").rows == 15
    other = lab.model(tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match="other weights"):
        measure(tmp_path / "store", "part", rows=15, checkpoint=other)
    kept = corpus.read_text()
    corpus.write_text(kept.replace("cat", "cow"))
    with pytest.raises(MismatchError, match="has changed"):
        measure(tmp_path / "store", "part", rows=15, checkpoint=tmp_path / "moved")
    corpus.unlink()
    with pytest.raises(CorpusError, match="fidelity of part 'part' cannot be measured without its corpus"):
        measure(tmp_path / "store", "part", rows=15, checkpoint=tmp_path / "moved")


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "euclid"}, "`metric` 'euclid' is unknown"),
        ({"rows": 5}, "`rows` must be at least 11"),
        ({"val_samples": 0}, "`val_samples` must be at least 1"),
        ({"seed": -1}, "`seed` must be 0 or more"),
        ({"fields": ghoststore.Fields(text="body")}, "belong to `val_set`"),
        ({"layers": ["nothing"]}, "matches no layer"),
    ],
)
def test_refused(store: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, LayerError), match=message):
        measure(store, "rank", **settings)


def test_too_few_rows(lab: Lab, tmp_path: Path) -> None:
    data = lab.write(tmp_path / "few.jsonl", lab.sample_rows(9))
    ghoststore.build(checkpoint=lab.checkpoint, data=data, store=tmp_path / "store", name="part", device="cpu")
    with pytest.raises(UsageError, match="has 9 usable rows: too few"):
        measure(tmp_path / "store", "part")
