"""The linear datamodeling score: its arithmetic, the trainings behind it, and going on where they were interrupted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoConfig, AutoModelForCausalLM

import ghoststore
from ghoststore.checkpoint.load import find_checkpoint, load_model
from ghoststore.cli.evaluate import _words
from ghoststore.corpus import Fields
from ghoststore.errors import CorruptError, MismatchError, UsageError
from indexer.training.retrain import Recipe, Retrainer, Retraining
from query.common.rank_correlation import mean_ranks, spearman
from query.evaluate.lds import Lds, half, lds, lds_difference

if TYPE_CHECKING:
    from tests.conftest import Lab

SAMPLES, VAL = 40, 6


def test_spearman_is_scipys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, (8, 12)).astype(float), rng.standard_normal((8, 12))
    for mine, a, b in zip(spearman(x, y), x, y, strict=True):
        assert mine == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(np.ones((1, 5)), rng.standard_normal((1, 5)))[0] == 0.0
    assert mean_ranks(np.array([[3.0, 1.0, 3.0]])).tolist() == [[2.5, 1.0, 2.5]]


def test_halves_are_halves_and_follow_from_the_seed() -> None:
    kept = np.stack([half(3, number, 11) for number in range(50)])
    assert set(kept.sum(1)) == {5}
    assert len({row.tobytes() for row in kept}) > 40
    assert np.array_equal(kept[7], half(3, 7, 11))
    assert not np.array_equal(half(3, 7, 11), half(4, 7, 11))


@pytest.mark.slow
def test_a_linear_truth_is_found_and_noise_is_not() -> None:
    """Losses that are minus the sum of hidden effects: their scores have 1, the opposite -1, others about 0."""
    rng = np.random.default_rng(0)
    effects = rng.standard_normal((20, 60))
    kept = np.stack([half(0, number, 60) for number in range(40)])
    losses = -(effects @ kept.T)
    perfect = lds(effects, kept, losses)
    assert (perfect.value, perfect.low, perfect.high, perfect.targets) == pytest.approx((1.0, 1.0, 1.0, 20))
    assert lds(-effects, kept, losses).value == pytest.approx(-1.0)
    noise = lds(rng.standard_normal((20, 60)), kept, losses)
    assert noise.low < 0 < noise.high
    half_right = lds(effects + 2 * rng.standard_normal((20, 60)), kept, losses)
    assert noise.high < half_right.low < half_right.value < 0.7
    assert lds(effects, kept, losses) == perfect, "the interval follows from a seed"
    with pytest.raises(ValueError, match="at least 3"):
        lds(effects, kept[:2], losses[:, :2])


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two parts and a training run, and a val set of two domains."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = lab.write(folder / "train.jsonl", lab.sample_rows(SAMPLES, 1))
    val = lab.write(folder / "val.jsonl", lab.sample_rows(VAL, 3))
    for name in ("one", "two"):
        ghoststore.build(
            checkpoint=lab.checkpoint, data=data, store=folder / "store", name=name, span_rows=16, device="cpu"
        )
    ghoststore.train(
        data=data,
        val_set=val,
        checkpoint=lab.checkpoint,
        output_dir=folder / "run",
        store=folder / "store",
        name="run",
        max_steps=4,
        batch_size=4,
        val_groups=True,
        overlong="truncate",
        device="cpu",
    )
    return folder


def evaluate(folder: Path, out: Path, **settings: Any) -> Any:
    wanted: dict[str, Any] = {
        "part": "one",
        "halves": 4,
        "max_steps": 3,
        "batch_size": 4,
        "workers": 1,
        "device": "cpu",
    } | settings
    return ghoststore.evaluate(store=folder / "store", val_set=folder / "val.jsonl", out=out, **wanted)


def job_of(checkpoint: Path, folder: Path, out: Path, recipe: Recipe) -> Retraining:
    return Retraining(
        model_folder=str(checkpoint),
        tokenizer_folder=str(checkpoint),
        shards=str(out / "tokens"),
        val_set=str(folder / "val.jsonl"),
        fields=Fields(),
        max_val_samples=None,
        max_length=32,
        recipe=recipe,
        device="cpu",
    )


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    """An evaluation of four trainings: copy it before changing it."""
    evaluate(folder, folder / "out", methods=["dot"])
    return folder / "out"


@pytest.mark.slow
def test_a_retraining_is_what_train_does(lab: Lab, folder: Path, done: Path, tmp_path: Path) -> None:
    """On all samples, from the same new weights: the same losses as those of a checkpoint of ``ghoststore train``."""
    retrainer = Retrainer(job_of(lab.checkpoint, folder, done, Recipe(max_steps=5, batch_size=4, seed=2)))
    found = retrainer.val_losses(np.ones(SAMPLES, dtype=bool))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(lab.checkpoint)).save_pretrained(tmp_path / "new")
    for file in lab.checkpoint.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "new")
    report = ghoststore.train(
        data=done / "tokens",
        checkpoint=tmp_path / "new",
        output_dir=tmp_path / "run",
        method="Regular",
        max_steps=5,
        batch_size=4,
        seed=2,
        learning_rate=3e-3,
        weight_decay=0.01,
        adam_beta2=0.99,
        overlong="truncate",
        device="cpu",
    )
    expected = retrainer.val.losses(load_model(find_checkpoint(report.checkpoint)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    fewer = retrainer.val_losses(half(0, 0, SAMPLES))
    assert np.abs(fewer - found).max() > 1e-4
    assert np.array_equal(fewer, retrainer.val_losses(half(0, 0, SAMPLES)))


@pytest.mark.slow
def test_every_method(folder: Path, done: Path, tmp_path: Path) -> None:
    """Scores by hand, from queries, against what the evaluation says."""
    out = shutil.copytree(done, tmp_path / "out")
    report = evaluate(folder, out, part=["one", "two"], part_weights="equal", run="run")
    by_method = {one.method: one for one in report.lds}
    assert list(by_method) == [
        "dot",
        "dot+bm25",
        "cosine",
        "preconditioned-dot",
        "preconditioned-cosine",
        "checkpoints-dot",
        "checkpoints-cosine",
        "bm25",
        "tf-idf",
        "random",
        "training-time (run)",
    ]
    assert by_method["checkpoints-cosine"].samples == by_method["cosine"].samples, "both parts are of one checkpoint"
    kept = np.stack([half(0, number, SAMPLES) for number in range(4)])
    losses = np.stack(
        [json.loads(file.read_text())["val_loss"] for file in sorted((out / "trainings").iterdir())], axis=1
    )
    assert losses.shape == (VAL, 4)
    found = ghoststore.query(
        store=folder / "store",
        part="one",
        val_set=folder / "val.jsonl",
        each=True,
        metric="dot",
        top_k=SAMPLES,
        device="cpu",
    )
    scores = np.zeros((VAL, SAMPLES))
    for place, result in enumerate(found.results):
        for hit in result.hits:
            scores[place, hit.source_row] = hit.score
    assert by_method["dot"].samples == lds(scores, kept, losses)
    groups = {"earth": [1, 3, 5], "sky": [0, 2, 4]}
    assert report.settings["groups"] == dict.fromkeys(groups, 3)
    means = [np.stack([numbers[places].mean(0) for places in groups.values()]) for numbers in (scores, losses)]
    assert by_method["dot"].groups == lds(means[0], kept, means[1])
    assert by_method["training-time (run)"].samples is None
    assert report.settings["weight"] == "unit"
    rated = evaluate(folder, out, methods=["random"], run="run", weight="learning-rate")
    assert rated.settings["weight"] == "learning-rate"
    for weight, one in (("unit", by_method["training-time (run)"]), ("learning-rate", rated.lds[-1])):
        worth = np.zeros((2, SAMPLES))
        for place, group in enumerate(groups):
            told = ghoststore.scores(store=folder / "store", group=group, weight=weight, top_k=SAMPLES, text=False)
            for hit in told.hits:
                worth[place, hit.source_row] = hit.value
        assert one.groups == lds(worth, kept, means[1])


def test_words_and_gradients(folder: Path, done: Path, tmp_path: Path) -> None:
    """BM25 alone, and blended as a query blends it; a weight that is none is refused before any training."""
    out = shutil.copytree(done, tmp_path / "out")
    report = evaluate(folder, out, methods=["dot", "bm25"], lexical=0.3)
    by_method = {one.method: one.samples for one in report.lds}
    assert list(by_method) == ["dot", "dot+bm25", "bm25"]
    kept = np.stack([half(0, number, SAMPLES) for number in range(4)])
    losses = np.stack(
        [json.loads(file.read_text())["val_loss"] for file in sorted((out / "trainings").iterdir())], axis=1
    )
    options: dict[str, Any] = {"store": folder / "store", "part": "one", "val_set": folder / "val.jsonl"}
    found = ghoststore.query(**options, each=True, metric="dot", lexical=0.3, top_k=SAMPLES, device="cpu")
    blend, words = np.zeros((VAL, SAMPLES)), np.zeros((VAL, SAMPLES))
    for place, result in enumerate(found.results):
        for hit in result.hits:
            blend[place, hit.source_row], words[place, hit.source_row] = hit.score, hit.bm25
    assert by_method["dot+bm25"] == lds(blend, kept, losses)
    assert by_method["bm25"] == lds(words, kept, losses)
    (added,) = (one.words_add for one in report.lds if one.words_add is not None)
    assert added.value == pytest.approx(by_method["dot+bm25"].value - by_method["dot"].value)
    assert added.low <= added.value <= added.high
    with pytest.raises(UsageError, match="`lexical` must be between 0"):
        evaluate(folder, tmp_path / "none", lexical=2.0)
    assert not (tmp_path / "none" / "trainings").exists()


def test_words_by_default(folder: Path, done: Path, tmp_path: Path) -> None:
    """Beside the method by which a query ranks, at the weight that the option names; 0 leaves them out."""
    out = shutil.copytree(done, tmp_path / "out")
    methods = ["cosine", "dot"]
    report = evaluate(folder, out, methods=methods)
    assert [one.method for one in report.lds] == ["cosine", "dot", "dot+bm25"]
    assert report.settings["lexical"] == 0.1
    same = evaluate(folder, out, methods=["dot"], lexical=0.1)
    assert same.lds == report.lds[1:]
    none = evaluate(folder, out, methods=methods, lexical=0)
    assert none.lds == report.lds[:2]
    assert none.settings["lexical"] is None
    assert evaluate(folder, out, methods=["cosine"]).settings["lexical"] is None  # no method has words


@pytest.mark.parametrize(
    ("low", "high", "advice"),
    [(0.01, 0.03, "ask with `ghoststore query --lexical 0.1`"), (-0.03, -0.01, "ask without"), (-0.1, 0.1, "chance")],
)
def test_what_words_add_in_words(low: float, high: float, advice: str) -> None:
    assert advice in _words(Lds(value=(low + high) / 2, low=low, high=high, targets=1), 0.1)


def test_a_difference_is_paired() -> None:
    """Of the same scores it is nothing, in every resample; of others what both have, though each is uncertain."""
    rng = np.random.default_rng(0)
    effects = rng.standard_normal((20, 60))
    kept = np.stack([half(0, number, 60) for number in range(40)])
    losses = -(effects @ kept.T) + 20 * rng.standard_normal((20, 40))
    noisy = effects + 0.2 * rng.standard_normal((20, 60))
    one, other, none = lds(effects, kept, losses), lds(noisy, kept, losses), lds_difference(noisy, noisy, kept, losses)
    assert (none.value, none.low, none.high, none.targets) == (0.0, 0.0, 0.0, 20)
    less = lds_difference(effects, noisy, kept, losses)
    assert less.value == pytest.approx(one.value - other.value)
    assert less.low <= less.value <= less.high
    assert less.high - less.low < one.high - one.low


@pytest.mark.slow
def test_nothing_is_trained_twice(folder: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    (out / "trainings" / "half-00002.json").unlink()
    trained: list[np.ndarray] = []
    original = Retrainer.val_losses

    def count(self: Retrainer, kept: np.ndarray) -> np.ndarray:
        trained.append(kept)
        return original(self, kept)

    monkeypatch.setattr(Retrainer, "val_losses", count)
    evaluate(folder, out, methods=["random"])
    assert [row.tolist() for row in trained] == [half(0, 2, SAMPLES).tolist()]
    before = {path.name: path.read_bytes() for path in (done / "trainings").iterdir()}
    assert {path.name: path.read_bytes() for path in (out / "trainings").iterdir()} == before
    evaluate(folder, out, methods=["cosine"], halves=5)
    assert len(trained) == 2


@pytest.mark.slow
def test_workers_find_the_same(folder: Path, done: Path, tmp_path: Path) -> None:
    """Of a script that does not guard itself against being imported by them."""
    options = {"store": folder / "store", "val_set": folder / "val.jsonl", "out": tmp_path / "out"}
    given = ", ".join(f"{name}={str(value)!r}" for name, value in options.items())
    given += ", part='one', halves=4, max_steps=3, batch_size=4, device='cpu', methods=['random'], workers=2"
    script = tmp_path / "script.py"
    script.write_text(f"print('begun')\nimport ghoststore\nghoststore.evaluate({given})\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(ghoststore.__file__).parents[1])}
    shown = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["begun"]
    for path in sorted((done / "trainings").iterdir()):
        mine, theirs = (json.loads((at / "trainings" / path.name).read_text()) for at in (tmp_path / "out", done))
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5)


@pytest.mark.slow
def test_removal(lab: Lab, folder: Path, tmp_path: Path) -> None:
    """The masks by hand, the losses those of trainings on them, resumed like any other."""
    settings: dict[str, Any] = {
        "tests": ["removal"],
        "methods": ["dot", "random"],
        "lexical": 0,
        "drop": 0.2,
        "repeats": 2,
    }
    report = evaluate(folder, tmp_path / "out", **settings)
    (one,) = report.removal
    assert (one.method, report.lds, report.tail_patch) == ("dot", [], [])
    files = sorted(path.name for path in (tmp_path / "out" / "trainings").iterdir())
    assert files == ["without-dot-8.json", "without-random-8-0.json", "without-random-8-1.json"]
    losses = [np.array(json.loads((tmp_path / "out" / "trainings" / name).read_text())["val_loss"]) for name in files]
    found = ghoststore.query(
        store=folder / "store",
        part="one",
        val_set=folder / "val.jsonl",
        each=True,
        metric="dot",
        top_k=SAMPLES,
        device="cpu",
    )
    total = np.zeros(SAMPLES)
    for result in found.results:
        for hit in result.hits:
            total[hit.source_row] += hit.score
    kept = np.ones(SAMPLES, dtype=bool)
    kept[np.argsort(-total)[:8]] = False
    task = Retrainer(job_of(lab.checkpoint, folder, tmp_path / "out", Recipe(max_steps=3, batch_size=4)))
    np.testing.assert_allclose(losses[0], task.val_losses(kept))
    random = np.stack(losses[1:])
    assert one.loss == pytest.approx(losses[0].mean())
    assert one.change == pytest.approx(losses[0].mean() - random.mean())
    assert one.deviation == pytest.approx(random.mean(1).std(ddof=1))
    assert one.groups["sky"] == pytest.approx((losses[0] - random.mean(0))[[0, 2, 4]].mean())
    assert evaluate(folder, tmp_path / "out", **settings).removal == report.removal


@pytest.mark.slow
def test_tail_patch(lab: Lab, folder: Path, tmp_path: Path) -> None:
    """One step by hand: the gradient of the mean loss of the best samples, of a thousandth of the weights' length."""
    report = evaluate(folder, tmp_path / "out", tests=["tail-patch"], methods=["cosine"], top_k=3, repeats=2)
    (one,) = report.tail_patch
    retrainer = Retrainer(job_of(lab.checkpoint, folder, tmp_path / "out", Recipe()))
    found = ghoststore.query(
        store=folder / "store",
        part="one",
        val_set=folder / "val.jsonl",
        each=True,
        metric="cosine",
        top_k=SAMPLES,
        device="cpu",
    )
    scores = np.zeros((VAL, SAMPLES))
    for place, result in enumerate(found.results):
        for hit in result.hits:
            scores[place, hit.source_row] = hit.score
    for name, places in {"earth": [1, 3, 5], "sky": [0, 2, 4]}.items():
        model = load_model(find_checkpoint(lab.checkpoint))
        before = retrainer.val.losses(model, places).mean()
        best = np.argsort(-scores[places].mean(0), kind="stable")[:3]
        losses = []
        for sample in best:
            ids = torch.from_numpy(retrainer.shards.tokens_of(int(sample), 0, 32).astype(np.int64))[None]
            losses.append(model(input_ids=ids, labels=ids).loss)
        torch.stack(losses).mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad * (1e-3 * weights.norm() / gradients.norm())
        gain = before - retrainer.val.losses(model, places).mean()
        assert one.groups[name] == pytest.approx(gain, rel=1e-3, abs=1e-6)
    assert one.gain == pytest.approx(np.mean(list(one.groups.values())))
    assert one.gain > one.random
    assert one.deviation is not None
    assert not (tmp_path / "out" / "trainings").exists()


@pytest.mark.slow
def test_refused(lab: Lab, folder: Path, done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    with pytest.raises(MismatchError, match=r"half-00000\.json is of another evaluation"):
        evaluate(folder, out, max_steps=4)
    (out / "trainings" / "half-00001.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"half-00001\.json is damaged"):
        evaluate(folder, out)
    for settings, message in [
        ({"tests": ["loo"]}, "`tests` 'loo' is unknown"),
        ({"tests": []}, "at least one of lds"),
        ({"drop": 1.0}, "`drop` must be"),
        ({"top_k": 0}, "`top_k` must be at least 1"),
        ({"repeats": 0}, "`repeats` must be at least 1"),
        ({"methods": ["trak"]}, "'trak' is unknown"),
        ({"halves": 2}, "`halves` must be at least 3"),
        ({"workers": 0}, "`workers` must be at least 1"),
        ({"max_steps": 0}, "`max_steps` must be at least 1"),
        ({"learning_rate": -1.0}, "`learning_rate`"),
        ({"weight": "loss-fall"}, "`weight=loss-fall` is what a step .* give `run`"),
    ]:
        with pytest.raises(UsageError, match=message):
            evaluate(folder, tmp_path / "new", **settings)
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    store = moved / "store"
    lab.write(moved / "train.jsonl", lab.sample_rows(SAMPLES, 9))
    ghoststore.build(
        checkpoint=lab.checkpoint, data=moved / "train.jsonl", store=store, name="three", device="cpu", span_rows=16
    )
    lab.write(moved / "train.jsonl", lab.sample_rows(SAMPLES, 8))
    with pytest.raises(MismatchError, match="has changed"):
        ghoststore.evaluate(
            store=store, part="three", val_set=moved / "val.jsonl", out=tmp_path / "changed", device="cpu"
        )


def test_command(lab: Lab, folder: Path, done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    common = [
        "evaluate",
        "--store",
        folder / "store",
        "--part",
        "one",
        "--val-set",
        folder / "val.jsonl",
        "--out",
        out,
        "--halves",
        "4",
        "--max-steps",
        "3",
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--quiet",
        "--method",
        "cosine",
    ]
    outcome = lab.run(*common)
    assert outcome.code == 0, outcome.err
    assert "cosine" in outcome.out
    assert "LDS over 4 trainings" in outcome.out
    assert "words" not in outcome.out  # a query of this part ranks by the product
    with_words = lab.run(*common, "--method", "dot").out
    assert "What words at 0.1 add to each val sample" in with_words
    assert "dot+bm25" in with_words
    assert lab.run(*common, "--json").json["lds"][0]["method"] == "cosine"
