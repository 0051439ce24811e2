"""A step that chooses among candidates is a plain step on those it chose, and says in the run which they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import ghoststore
from ghoststore.errors import MismatchError, UsageError
from ghoststore.settings.train import TrainConfig
from ghoststore.store.run.visits import stream_visits
from indexer.training.data import Order, TrainingRows
from tests.support.chosen import chosen_of, trained_plainly
from tests.support.models import llama
from tests.support.train_oracle import Oracle, gradient_of, loss_of, model_at
from tests.support.trainings import apart, same_bits

if TYPE_CHECKING:
    from tests.support.trainings import Gym, Trained

Options = dict[str, Any]
STEPS = {
    "max_steps": 8,
    "batch_size": 4,
    "candidates": 12,
    "eval_interval": 4,
    "choosing_begins_at": 0,
    "score": "exact",
}


def checkpoint_of(gym: Gym, name: str) -> Path:
    """Beside those of the gym: one whose head is not tied, and one of another family; made once."""
    if name in gym.models:
        return gym.models[name]
    folder = gym.folder / "choosing" / name
    if name == "untied" and not folder.exists():
        gym.lab.model(folder, layers=2, seed=1, tie_word_embeddings=False)
    if name == "llama" and not folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(gym.models["tiny"])
        llama(vocab_size=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def choosing(gym: Gym, model: str = "tiny", **options: Any) -> Trained:
    return gym.train(model=None, checkpoint=checkpoint_of(gym, model), **{**STEPS, **options})


CASES: dict[str, tuple[str, int, Options]] = {
    # The model, the micro-batches of an update, and options.
    "tied": ("tiny", 1, {"keep": 4}),
    "untied": ("untied", 1, {"keep": 4, "policy": "bottom-k"}),
    "llama": ("llama", 1, {"keep": 4}),
    "micro-batches": ("two", 4, {"keep": 8, "batch_size": 2, "policy": "random"}),
    "bfloat16": ("two", 1, {"keep": 4, "model_dtype": "bfloat16"}),
    "autocast-bfloat16": ("two", 2, {"keep": 4, "batch_size": 2, "train_dtype": "bfloat16"}),
    "autocast-float16": ("two", 1, {"keep": 4, "train_dtype": "float16"}),
    "dropout": ("dropout", 2, {"keep": 4, "batch_size": 2, "val_refresh_interval": 3}),
    "checkpointing": ("dropout", 1, {"keep": 4, "gradient_checkpointing": True}),
    "threshold": ("two", 1, {"policy": "threshold", "threshold": 0.05, "batch_size": 12}),
    "sketched": ("two", 1, {"keep": 4, "score": "sketched", "contrast": False}),
    "default": ("two", 1, {"keep": 4, "score": None}),
    "adam": ("two", 1, {"keep": 4, "score_metric": "adam"}),
    "greats": ("two", 1, {"keep": 4, "batch_size": 12, "policy": "greats"}),
    "contrast": ("two", 1, {"keep": 4, "batch_size": 12, "contrast": True}),
    "contrast-sketched": ("two", 1, {"keep": 4, "contrast": True, "score": "sketched"}),
    "from-step-4": ("two", 1, {"keep": 4, "choosing_begins_at": 4}),
}


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_plain_steps_on_the_chosen(gym: Gym, name: str) -> None:
    """Bit for bit: of the model, and so of the optimizer."""
    model, micro_batches, options = CASES[name]
    trained = choosing(gym, model, **options)
    arrays = trained.arrays()
    rows = chosen_of(arrays)
    if "keep" in options:
        assert [len(of_step) for of_step in rows] == [options["keep"]] * 8
    else:
        assert len({len(of_step) for of_step in rows}) > 1
    plain = {k: v for k, v in {**STEPS, **options}.items() if k in ("batch_size", "model_dtype", "train_dtype")}
    plain |= {"learning_rate": 5e-3}
    if name == "checkpointing":
        plain["gradient_checkpointing"] = False  # the same bits without
    expected = trained_plainly(checkpoint_of(gym, model), trained, rows, micro_batches, **plain)
    assert same_bits(trained.weights(), expected) == []


FLOAT32, FLOAT16, BFLOAT16 = (1e-4, 1e-4), (0.01, 0.05), (0.05, 0.3)
"""How near scores, losses and norms are; and how near the weights, as a share of what training moved."""
ONE_PASS: dict[str, tuple[str, tuple[float, float], Options]] = {
    "tied": ("two", FLOAT32, {"keep": 4}),
    "untied": ("untied", FLOAT32, {"keep": 4, "batch_size": 5}),
    "llama": ("llama", FLOAT32, {"keep": 4, "score_layers": "all"}),
    "reweight": ("two", FLOAT32, {"policy": "reweight", "batch_size": 12}),
    "autocast-bfloat16": ("two", BFLOAT16, {"keep": 4, "train_dtype": "bfloat16"}),
    "autocast-float16": ("two", FLOAT16, {"keep": 4, "train_dtype": "float16"}),
    "default": ("two", FLOAT32, {"keep": 4, "score": None}),
    "contrast": ("untied", FLOAT32, {"policy": "reweight", "batch_size": 12, "contrast": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_PASS)
def test_one_pass_is_two_up_to_rounding(gym: Gym, name: str) -> None:
    """The same choices, and weights that differ as rounding makes them.

    Two candidates whose scores are as near as autocast rounds may change places: on some processors these do. The step
    is the last whose candidates are scored by the same weights, and it is compared before the choice.
    """
    model, (near, of_weights), options = ONE_PASS[name]
    one, two = (
        choosing(gym, model, choosing_passes=passes, learning_rate=1e-3, max_steps=6, **options)
        for passes in ("one", "two")
    )
    arrays, expected = one.arrays(), two.arrays()
    for array in ("sample", "learning_rate"):
        np.testing.assert_array_equal(arrays[array], expected[array])
    other = np.argwhere((arrays["weight"] != 0) != (expected["weight"] != 0))
    same = int(other[0, 0]) if len(other) else 6
    compared = {"score": same + 1, "loss": same + 1} | dict.fromkeys(("weight", "train_loss", "grad_norm"), same)
    for array, steps in compared.items():
        given, wanted = (np.nan_to_num(each[array][:steps], posinf=0) for each in (arrays, expected))
        np.testing.assert_allclose(given, wanted, rtol=near, atol=near)
    if same == 6:
        np.testing.assert_array_equal(arrays["tokens"], expected["tokens"])
        assert apart(one.checkpoint(), two.checkpoint(), checkpoint_of(gym, model)) < of_weights
    else:
        assert near > FLOAT32[0]
        of_step = expected["score"][same, 0]
        changed = of_step[other[other[:, 0] == same][:, 2]]
        assert np.ptp(changed) < 2 * near * np.abs(of_step).max()


def test_the_run_says_what_was_chosen(gym: Gym) -> None:
    """Candidates in the seeded order; the highest scores have weight 1; losses and tokens are what they are."""
    trained = choosing(gym, keep=4, val_groups=True, per_layer=True)
    arrays, run = trained.arrays(), trained.run
    assert arrays["weight"].shape == arrays["score"].shape == (8, 1, 12)
    assert run.layout.batch == 12
    shards = ghoststore.TokenShards.open(trained.output / "tokens")
    table = TrainingRows.cut(shards, run.manifest["training"]["max_length"], "window")
    order = Order(table, seed=0, step_rows=12, apart=True)
    for step in range(8):
        score, weight, sample = (arrays[name][step, 0] for name in ("score", "weight", "sample"))
        assert len(set(sample.tolist())) == 12  # step 2 reaches over the end of the first epoch
        np.testing.assert_array_equal(sample, order.rows_of(step))
        highest = np.sort(np.argsort(-score, kind="stable")[:4])
        np.testing.assert_array_equal(np.flatnonzero(weight), highest)
        assert set(weight) == {0.0, 1.0}
        assert arrays["tokens"][step] == table.length[sample[highest]].sum()
        counts = table.target_counts(sample[highest])
        mean = (arrays["loss"][step, 0, highest] * counts).sum() / counts.sum()
        np.testing.assert_allclose(arrays["train_loss"][step], mean, rtol=1e-5)
    np.testing.assert_allclose(arrays["block_score"].sum(-1), arrays["score"], rtol=1e-4, atol=1e-5)
    said = run.manifest["scoring"]["choosing"]
    assert (said["policy"], said["candidates"], said["keep"], said["choosing_passes"]) == ("top-k", 12, 4, "two")


@pytest.mark.slow
def test_scores_are_those_of_a_training_on_all(gym: Gym) -> None:
    """Of the first step, whose weights are the same: candidates are scored as a train batch is, over the blocks."""
    trained = choosing(gym, keep=4)
    assert trained.run.manifest["scoring"]["score_layers"] == "blocks"
    chosen = trained.arrays()
    options = {"max_steps": 8, "batch_size": 12, "eval_interval": 4, "score_layers": "blocks"}
    plain = gym.train(model=None, checkpoint=gym.models["tiny"], **options).arrays()
    np.testing.assert_array_equal(chosen["sample"][:2], plain["sample"][:2])  # of the first epoch of 27 rows
    for name in ("score", "loss"):
        np.testing.assert_allclose(chosen[name][0], plain[name][0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_without_candidates_a_run_has_no_weights(gym: Gym) -> None:
    trained = gym.train()
    assert "weights" not in trained.run.manifest["storage"]
    assert "choosing" not in trained.run.manifest["scoring"]
    assert "weight" not in trained.arrays()


@pytest.mark.parametrize(
    ("given", "begins"), [pytest.param(4, 4, marks=pytest.mark.slow), (None, 2)], ids=["at a step", "by default"]
)
def test_before_choosing_begins_the_first_are_taken(gym: Gym, given: int | None, begins: int) -> None:
    """By default that is a quarter of the steps."""
    arrays = choosing(gym, "two", keep=4, choosing_begins_at=given).arrays()
    assert (np.isfinite(arrays["score"])).all()
    first = np.array([1.0] * 4 + [0.0] * 8)
    np.testing.assert_array_equal(arrays["weight"][:begins, 0], np.tile(first, (begins, 1)))
    assert (arrays["weight"][begins:, 0] != first).any()


@pytest.mark.slow
def test_in_the_metric_of_adam_the_first_step_has_nothing_to_choose_by(gym: Gym) -> None:
    """There is no second moment yet: the first are taken, and scores are NaN. Then they are those of Adam's steps."""
    trained = choosing(gym, "two", keep=4, score_metric="adam")
    arrays = trained.arrays()
    assert np.isnan(arrays["score"][0]).all()
    assert arrays["weight"][0, 0].tolist() == [1.0] * 4 + [0.0] * 8
    assert np.isfinite(arrays["score"][1:]).all()
    assert trained.run.manifest["scoring"]["score_metric"] == "adam"
    plain = choosing(gym, "two", keep=4).arrays()
    assert "score_metric" not in choosing(gym, "two", keep=4).run.manifest["scoring"]
    assert not np.array_equal(arrays["weight"][1:], plain["weight"][1:])


@pytest.mark.slow
def test_random_is_another_draw_at_every_step_and_seed(gym: Gym) -> None:
    one, other = (choosing(gym, keep=6, policy="random", seed=seed).arrays()["weight"] for seed in (0, 1))
    assert len({tuple(weight[0]) for weight in one}) > 4
    assert not np.array_equal(one, other)
    assert (one.sum((1, 2)) == 6).all()


@pytest.mark.slow
def test_reweighted_steps_are_those_of_the_weighted_loss(gym: Gym) -> None:
    """Weights are 12 times the softmax of the scores over their deviation; train_loss is the weighted mean."""
    trained = choosing(gym, policy="reweight", temperature=2.0, batch_size=5)
    arrays = trained.arrays()
    score = arrays["score"].astype(np.float64)[:, 0]
    powers = np.exp((score - score.max(1, keepdims=True)) / (2 * score.std(1, keepdims=True)))
    expected = 12 * powers / powers.sum(1, keepdims=True)
    np.testing.assert_allclose(arrays["weight"][:, 0], expected, rtol=1e-6)
    counts = arrays_of_targets(trained)
    mean = (arrays["loss"][:, 0] * counts * expected).sum(1) / (counts * expected).sum(1)
    np.testing.assert_allclose(arrays["train_loss"], mean, rtol=1e-5)


def arrays_of_targets(trained: Trained) -> np.ndarray:
    """(steps, candidates): targets of each candidate."""
    shards = ghoststore.TokenShards.open(trained.output / "tokens")
    table = TrainingRows.cut(shards, trained.run.manifest["training"]["max_length"], "window")
    return np.stack([table.target_counts(sample[0]) for sample in trained.arrays()["sample"]])


def by_loss(candidates: ghoststore.Candidates) -> Any:
    """A policy of the user's own: twice the weight for the candidate of the highest loss, none for the rest of half."""
    assert len(candidates) == 12
    assert candidates.step >= 0
    assert candidates.generator.random() < 1
    weights = (candidates.losses >= np.median(candidates.losses)).astype(float)
    weights[np.argmax(candidates.losses)] = 2.0
    return weights.tolist()


@pytest.mark.slow
def test_a_policy_of_the_users_own(gym: Gym) -> None:
    trained = choosing(gym, policy=by_loss)
    arrays = trained.arrays()
    for loss, weight in zip(arrays["loss"][:, 0], arrays["weight"][:, 0], strict=True):
        assert weight[np.argmax(loss)] == 2.0
        np.testing.assert_array_equal(weight > 0, loss >= np.median(loss))
    assert trained.run.manifest["scoring"]["choosing"]["policy"] == f"{__name__}.by_loss"


@pytest.mark.slow
@pytest.mark.parametrize("weight", [1e37, 1e-44])
def test_the_size_of_weights_does_not_matter(gym: Gym, tmp_path: Path, weight: float) -> None:
    given = {"model": None, "checkpoint": gym.models["tiny"], **STEPS}
    runs = [gym.fresh(tmp_path / str(w), **given, policy=lambda c, w=w: [w] * len(c)) for w in (1.0, weight)]
    for name, values in runs[0].weights().items():
        torch.testing.assert_close(runs[1].weights()[name], values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(runs[1].arrays()["train_loss"], runs[0].arrays()["train_loss"], rtol=1e-5)


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0], "weights of shape (1,) for 12 candidates of step 0"),
        ([0.0] * 12, "no candidate of step 0 a weight above 0"),
        ([1.0] * 11 + [-1.0], "weights below 0, infinite or NaN for step 0"),
        ([1.0] * 11 + [float("nan")], "weights below 0, infinite or NaN for step 0"),
        ("all", "expected weights"),
    ],
)
def test_weights_that_cannot_be(gym: Gym, tmp_path: Path, weights: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        gym.fresh(tmp_path, model=None, checkpoint=gym.models["tiny"], **STEPS, policy=lambda candidates: weights)
    assert words in str(caught.value)


def test_contrast_is_the_score_less_the_product_with_the_mean_gradient(gym: Gym) -> None:
    """Exact, over the linears of the blocks, against autograd in float64, at the first step and one between."""
    trained = choosing(gym, keep=4, batch_size=12, contrast=True, checkpoint_interval=4, keep_checkpoints=None)
    arrays = trained.arrays()
    oracle = Oracle(gym, trained, "plain", 32)
    for step in (0, 4):
        model = model_at(trained.checkpoint(step) if step else gym.models["tiny"])
        names = [name for name, _ in model.named_parameters() if ".attn.c_" in name or ".mlp.c_" in name]
        rows = [gradient_of(model, loss_of(model, *oracle.rows[row])) for row in arrays["sample"][step, 0]]
        gradients_BN = torch.stack([torch.cat([row[name].flatten() for name in names]) for row in rows])
        contrast_B = arrays["score"][step, 0] - (gradients_BN @ gradients_BN.mean(0)).numpy()
        highest = np.sort(np.argsort(-contrast_B, kind="stable")[:4])
        np.testing.assert_array_equal(np.flatnonzero(arrays["weight"][step, 0]), highest)
    by_score = np.sort(np.argsort(-arrays["score"][:, 0], kind="stable")[:, :4])
    assert (np.stack([np.flatnonzero(weight) for weight in arrays["weight"][:, 0]]) != by_score).any()
    assert trained.run.manifest["scoring"]["choosing"]["contrast"] is True


def test_contrast_of_sketched_scores_is_over_all_micro_batches(gym: Gym) -> None:
    """By the vectors that the run keeps, of three micro-batches a step; it is the default of candidates."""
    trained = choosing(gym, keep=4, score=None, keep_gradients=1, proj_dtype="float32")
    assert trained.run.manifest["scoring"]["score"] == "sketched"
    assert trained.run.manifest["scoring"]["choosing"]["contrast"] is True
    arrays = trained.arrays()
    for visits in stream_visits(trained.run, trained.run.ranges, val=True):
        assert visits.val is not None
        for place, step in enumerate(visits.steps):
            vectors_BD = visits.vectors[visits.of_step == place].astype(np.float64)
            contrast_B = vectors_BD @ (visits.val[place] - vectors_BD.mean(0))
            highest = np.sort(np.argsort(-contrast_B, kind="stable")[:4])
            np.testing.assert_array_equal(np.flatnonzero(arrays["weight"][step, 0]), highest)


def test_projection_options_ask_for_sketched_scores_of_candidates(gym: Gym, tmp_path: Path) -> None:
    """Which layers are left out is then said of them, as the errors about layers advise."""
    words = ("--candidates", "8", "--keep", "4", "--proj-layers", "mlp", "--exclude-layers", "c_fc")
    outcome = gym.run(tmp_path, *words, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["plan"]["layers"] == ["transformer.h.0.mlp.c_proj"]


def test_a_run_without_contrast_does_not_name_it(gym: Gym) -> None:
    """Runs from before it came do not: they must go on."""
    trained = choosing(gym, keep=4)
    for said in (trained.run.manifest["scoring"]["choosing"], ghoststore.Choosing(keep=4).to_json()):
        assert said["keep"] == 4
        assert "contrast" not in said
    assert ghoststore.Choosing(keep=4, contrast=True).to_json()["contrast"] is True


@pytest.mark.parametrize(
    ("options", "score", "contrast"),
    [
        ({}, "sketched", True),
        ({"policy": "bottom-k"}, "sketched", True),
        ({"policy": "random"}, "sketched", False),
        ({"policy": "threshold", "threshold": 0.0}, "sketched", False),
        ({"policy": "greats"}, "exact", False),
        ({"contrast": False}, "sketched", False),
        ({"score": "exact"}, "exact", False),
        ({"score": "exact", "contrast": True}, "exact", True),
        ({"score_metric": "adam"}, "sketched", False),
        ({"per_layer": True}, "exact", False),
        ({"route": "direct"}, "exact", False),
        ({"score_layers": "all"}, "exact", False),
        ({"exclude_layers": ("*.c_fc",)}, "exact", False),
    ],
    ids=str,
)
def test_scores_of_candidates_where_nothing_is_said(options: Options, score: str, contrast: bool) -> None:
    """Sketched ones and contrast, as measured; exact ones where something is given that they alone have."""
    config = TrainConfig.of(**{"candidates": 8, "keep": 4, "batch_size": 8, **options})
    assert (config.score, config.contrast) == (score, contrast)
    assert config.val_refresh_interval == 1
    assert (TrainConfig.of().score, TrainConfig.of().val_refresh_interval) == ("exact", 10)


REFUSED: dict[str, tuple[Options, str]] = {
    "keep-without-candidates": ({"keep": 4}, "`keep=4` is about choosing among candidates: give `candidates`, too"),
    "policy-without-candidates": ({"policy": "random"}, "give `candidates`"),
    "no-keep": ({"candidates": 8}, "`policy=top-k` chooses so many candidates: give `keep`"),
    "keep-too-large": ({"candidates": 8, "keep": 9}, "`keep=9` is more than `candidates=8`"),
    "no-threshold": ({"candidates": 8, "policy": "threshold"}, "chooses all from a score on: give it as `threshold`"),
    "threshold-of-another": ({"candidates": 8, "keep": 4, "threshold": 0.5}, "belongs to `policy=threshold`"),
    "temperature-of-another": ({"candidates": 8, "keep": 4, "temperature": 1.0}, "belongs to `policy=reweight`"),
    "temperature-0": ({"candidates": 8, "policy": "reweight", "temperature": 0.0}, "must be above 0"),
    "greats-in-parts": ({"candidates": 8, "keep": 4, "policy": "greats"}, "give `batch_size=8`, not 3"),
    "greats-sketched": (
        {"candidates": 8, "keep": 4, "batch_size": 8, "policy": "greats", "score": "sketched"},
        "`policy=greats` takes products of whole gradients",
    ),
    "contrast-in-parts": (
        {"candidates": 8, "keep": 4, "contrast": True, "score": "exact"},
        "scored together: give `batch_size=8`, not 3, or `score=sketched`",
    ),
    "contrast-adam": (
        {"candidates": 8, "keep": 4, "batch_size": 8, "contrast": True, "score_metric": "adam"},
        "`contrast` takes plain products",
    ),
    "contrast-random": (
        {"candidates": 8, "keep": 4, "contrast": True, "policy": "random"},
        "`policy=random` does not choose by scores alone",
    ),
    "contrast-without-candidates": ({"contrast": True}, "give `candidates`"),
    "candidates-of-a-fraction": ({"candidates": 8.0, "keep": 4}, "`candidates` is a whole number, not 8.0"),
    "candidates-in-words": ({"candidates": "8", "keep": 4}, "`candidates` is a whole number, not '8'"),
    "keep-true": ({"candidates": 8, "keep": True}, "`keep` is a whole number, not True"),
    "begins-at-half": ({"candidates": 8, "keep": 4, "choosing_begins_at": 0.5}, "is a whole number, not 0.5"),
    "threshold-in-words": ({"candidates": 8, "policy": "threshold", "threshold": "1"}, "is a number, not '1'"),
    "contrast-in-words": ({"candidates": 8, "keep": 4, "contrast": "no"}, "`contrast` is True or False, not 'no'"),
    "unknown": ({"candidates": 8, "policy": "best"}, "`policy` 'best' is unknown; known: top-k, "),
    "regular": ({"candidates": 8, "keep": 4, "method": "Regular"}, "`method=Regular` gives none"),
    "no-function": ({"candidates": 8, "policy": 3}, "a name or a function of the candidates, not int"),
    "metric-of-regular": ({"method": "Regular", "score_metric": "adam"}, "belong to `method=GradDotProd`"),
    "metric-by-gram": ({"score_metric": "adam", "route": "gram"}, "`score_metric=adam` takes the direct route"),
    "accumulation": (
        {"candidates": 8, "keep": 4, "gradient_accumulation_steps": 2},
        "`gradient_accumulation_steps=2` does not go with `candidates`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_go_together(gym: Gym, tmp_path: Path, name: str) -> None:
    options, words = REFUSED[name]
    with pytest.raises(UsageError) as caught:
        gym.fresh(tmp_path, **options)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_numbers_of_numpy() -> None:
    """They are those of Python in the manifest."""
    given = {"candidates": np.int64(8), "keep": np.int32(4), "choosing_begins_at": np.int64(2)}
    config = TrainConfig.of(**given, policy="threshold", threshold=np.float32(0.5)).choosing
    assert json.loads(json.dumps(config.to_json(contrast=False)))["candidates"] == 8
    assert ghoststore.Choosing(keep=np.int64(2), seed=np.int64(3)).to_json()["seed"] == 3
    with pytest.raises(UsageError, match=r"`keep` is a whole number, not 2\.5"):
        ghoststore.Choosing(keep=2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 4, "choosing_begins_at": 8}, "the training has 8 steps, so nothing would be chosen"),
        ({"keep": 4, "candidates": 100}, "`candidates=100` is more than the 27 rows with a target"),
    ],
)
def test_what_is_known_once_the_rows_are(gym: Gym, tmp_path: Path, options: Options, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        gym.fresh(tmp_path, model=None, checkpoint=gym.models["tiny"], **{**STEPS, **options})
    assert words in str(caught.value)
    assert not (tmp_path / "store" / "runs").exists()


@pytest.mark.slow
def test_a_run_that_chooses_otherwise_is_refused(gym: Gym) -> None:
    trained = choosing(gym, keep=4)
    where = {"output_dir": trained.output, "store": trained.store}
    with pytest.raises(MismatchError, match=r"scoring\.choosing\.keep: stored 4, asked for 3"):
        gym.fresh(trained.output, model=None, checkpoint=gym.models["tiny"], **STEPS, **where, keep=3)


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["two", "one"])
def test_candidates_keep_their_gradients(gym: Gym, passes: str) -> None:
    """Those that were not chosen, too: what is searched is what there was to choose from. Nothing else changes."""
    options = {"keep": 4, "choosing_passes": passes}
    kept, plain = choosing(gym, "two", keep_gradients=2, **options), choosing(gym, "two", **options)
    assert same_bits(kept.weights(), plain.weights()) == []
    arrays = kept.arrays()
    for name, values in plain.arrays().items():
        np.testing.assert_array_equal(arrays[name], values, err_msg=name)
    gradient = kept.run.read_committed("gradient")
    assert gradient.shape[:3] == (4, 1, 12)
    assert (gradient != 0).any(-1).all()
