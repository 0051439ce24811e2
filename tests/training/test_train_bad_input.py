"""What a user can get wrong, and what can go wrong by itself: one clear line, nothing written that is not true."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ghoststore
from ghoststore.errors import DivergedError, GhostStoreError, LayerError, MismatchError, UsageError
from ghoststore.settings.train import TrainConfig
from ghoststore.store import Store
from indexer.training.state import checkpoints, save_state

if TYPE_CHECKING:
    from tests.support.trainings import Gym

Options = dict[str, Any]
NEITHER = r"give `architecture` or `model_config` to train from scratch, or `checkpoint`"

REFUSED: dict[str, tuple[Options, str]] = {
    "no-store": ({"store": None}, r"GradDotProd` needs `val_set` and `store`; `method=Regular` trains without"),
    "name-without-store": ({"method": "Regular", "store": None}, r"`name` is the name of a run: it needs `store`"),
    "no-val-set": ({"val_set": None}, r"GradDotProd` needs `val_set` and `store`"),
    "no-model": ({"model": None}, NEITHER),
    "two-models": ({"architecture": "GPT2-Tiny"}, NEITHER),
    "unknown-architecture": (
        {"model": None, "architecture": "GPT3", "tokenizer": "tiny"},
        r"'GPT3' is unknown; known: GPT2-Tiny, GPT2-Small",
    ),
    "no-tokenizer": ({"model": None, "architecture": "GPT2-Tiny"}, r"give `tokenizer`: a new model has none"),
    "too-long": ({"max_length": 33}, r"`max_length=33` is more than the 32 positions"),
    "too-short": ({"max_length": 1}, r"`max_length` must be at least 2, not 1"),
    "overlong": ({"max_length": 4, "overlong": "error"}, r"`max_length` is 4 and `overlong` is error"),
    "domain": ({"domains": ("sea",)}, r"has no domain 'sea'; it has: (sky, earth|earth, sky)"),
    "batch": ({"batch_size": 0}, r"`batch_size` must be at least 1, not 0"),
    "steps": ({"max_steps": 0}, r"`max_steps` must be at least 1, not 0"),
    "samples": ({"max_samples": 0}, r"`max_samples` must be at least 1, not 0"),
    "val-samples": ({"max_val_samples": -1}, r"`max_val_samples` must be at least 1, not -1"),
    "learning-rate": ({"learning_rate": float("nan")}, r"`learning_rate` must be above 0 and at most 1e30, not nan"),
    "infinite-learning-rate": ({"learning_rate": float("inf")}, r"`learning_rate` must be above 0 .*, not inf"),
    "clipping": ({"max_grad_norm": -1.0}, r"`max_grad_norm` must be at least 0, not -1"),
    "beta": ({"adam_beta2": 1.0}, r"`adam_beta2` must be at least 0 and below 1, not 1"),
    "floor": ({"min_learning_rate_ratio": 1.5}, r"`min_learning_rate_ratio` must be between 0 and 1, not 1.5"),
    "seed": ({"seed": -1}, r"`seed` must be between 0 and 2\*\*63 - 1, not -1"),
    "keep": ({"keep_checkpoints": 0}, r"`keep_checkpoints` must be at least 1, not 0"),
    "dropout": ({"dropout": 0.1}, r"`dropout` belongs to `architecture`: a checkpoint has its own"),
    "float16-parameters": ({"model_dtype": "float16"}, r"keep float32 parameters and give `train_dtype=float16`"),
    "wider-arithmetic": (
        {"model_dtype": "bfloat16", "train_dtype": "float32"},
        r"`train_dtype=float32` with `model_dtype=bfloat16`",
    ),
    "dtype": ({"train_dtype": "float8"}, r"`train_dtype` 'float8' is unknown; known: float32, bfloat16, float16"),
    "per-layer-sketch": ({"score": "sketched", "per_layer": True}, r"`per_layer`: a global sketch has no scores by"),
    "route-of-a-sketch": (
        {"score": "sketched", "route": "gram"},
        r"`route` belongs to `score=exact`: leave out one or the other",
    ),
    "projection": ({"projection": ghoststore.ProjectionConfig()}, r"projection options belong to `score=sketched`"),
    "layers": ({"exclude_layers": ("mpl",)}, r"layer pattern 'mpl' matches no module"),
    "all-layers": ({"exclude_layers": ("*",)}, r"every trainable parameter is excluded|matches no module"),
    "both-configurations": ({"config": TrainConfig()}, r"give config or single options, not both"),
    "name": ({"name": "../run"}, r"'../run'"),
    "eval-without-val": ({"eval_only": True, "val_set": None}, r"`eval_only` needs `checkpoint` and `val_set`"),
    "eval-of-a-new-model": (
        {"eval_only": True, "model": None, "architecture": "GPT2-Tiny", "tokenizer": "tiny"},
        r"`eval_only` needs `checkpoint` and `val_set`",
    ),
    "two-inputs": ({"data": "-", "val_set": "-"}, r"`data` and `val_set` cannot both be standard input"),
    "no-data": ({"data": "nowhere.jsonl"}, r"nowhere\.jsonl"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(gym: Gym, name: str, tmp_path: Path) -> None:
    """Before anything is trained; there is no run and no checkpoint."""
    options, message = REFUSED[name]
    given = {**options, "tokenizer": gym.models[options["tokenizer"]]} if "tokenizer" in options else options
    with pytest.raises((UsageError, LayerError), match=message) as caught:
        gym.fresh(tmp_path, **{"max_steps": 2, **given})
    assert caught.value.exit_code == 2
    assert not checkpoints(tmp_path / "out")
    assert not (tmp_path / "store").exists() or Store.open(tmp_path / "store").run_names() == []


@pytest.mark.parametrize(("name", "nearest"), [("bach_size", "batch_size"), ("scoring", "score")])
def test_an_unknown_keyword_names_the_nearest(gym: Gym, name: str, nearest: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"train.. has no keyword '{name}'; the nearest is '{nearest}'"):
        gym.fresh(tmp_path, max_steps=2, **{name: None})
    with pytest.raises(TypeError, match=f"TrainConfig.of.. has no keyword '{name}'"):
        TrainConfig.of(**{name: None})


def test_from_the_command_line(gym: Gym, tmp_path: Path) -> None:
    """Exit code 2, the message alone on stderr, nothing on stdout."""
    for words, message in (
        (("--checkpoint", gym.data["plain"]), "is a file; give the folder"),
        (("--proj-kind", "rademacher"), "projection options belong to --score sketched"),
        (("--method", "Irregular"), "Irregular"),
        (("--device", "cuda"), "sees no CUDA device"),
        (("--keep-checkpoints", "some"), "neither a number nor all"),
    ):
        if "cuda" in words and torch.cuda.is_available():
            continue
        outcome = gym.run(tmp_path, *words)
        assert (outcome.code, outcome.out) == (2, ""), outcome.err
        assert message in outcome.err
        assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"no row of the val set .* can be used: it is empty|has no rows"),
        (
            [{"text": ""}, {"text": "a"}],
            r"no row of the val set .* can be used: 1 empty, 1 too_short \(one token alone",
        ),
        ([{"body": "the cat"}], r"body|text"),
    ],
)
def test_val_sets_that_cannot_be_used(gym: Gym, rows: list[Any], message: str, tmp_path: Path) -> None:
    val_set = gym.lab.write(tmp_path / "val.jsonl", rows)
    with pytest.raises(UsageError, match=message):
        gym.fresh(tmp_path, val_set=val_set, max_steps=2)


def test_val_samples_without_a_finite_loss(gym: Gym, tmp_path: Path) -> None:
    """They are named by their ids: the order of the val batches is not that of the val set."""

    def overflow(model: Any, tokenizer: Any) -> None:
        with torch.no_grad():
            model.transformer.wte.weight[tokenizer("z")["input_ids"][0]] = 1e30

    checkpoint = gym.lab.model(tmp_path / "model", change=overflow)
    rows = gym.lab.sample_rows(4, seed=3)
    val_set = gym.lab.write(tmp_path / "val.jsonl", [rows[0], {**rows[1], "id": "bad", "text": "zz"}, *rows[2:]])
    options = {"val_set": val_set, "val_batch_size": 4, "max_steps": 2}
    with pytest.raises(UsageError, match=r"^the loss of val sample\(s\) 'bad' is not finite; leave them out"):
        gym.fresh(tmp_path, model=None, checkpoint=checkpoint, **options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], r"has no rows"), ([{"text": ""}, {"text": ""}], r"has no row to train on: all are empty, too short or")],
)
def test_corpora_that_cannot_be_used(gym: Gym, rows: list[Any], message: str, tmp_path: Path) -> None:
    data = gym.lab.write(tmp_path / "data.jsonl", rows)
    with pytest.raises(UsageError, match=message):
        gym.fresh(tmp_path, data=data, max_steps=2)


def test_what_is_left_out_is_said(gym: Gym, tmp_path: Path) -> None:
    holes = [{"id": f"hole-{text}", "text": text, "domain": "sky"} for text in ("", "a")]
    data = gym.lab.write(tmp_path / "data.jsonl", [*gym.lab.rows, *holes])
    val_set = gym.lab.write(tmp_path / "val.jsonl", [*gym.lab.sample_rows(3), holes[0]])
    outcome = gym.run(tmp_path, "--data", data, "--val-set", val_set, "--max-steps", "2")
    assert outcome.code == 0, outcome.err
    assert outcome.err.strip().splitlines() == [
        "note: val rows left out: 1 empty; 3 are used",
        "note: 2 of 29 rows have no target and are left out",
    ]


def test_shards_of_another_tokenizer(gym: Gym, tmp_path: Path) -> None:
    other = gym.lab.model(tmp_path / "other", change=lambda model, tokenizer: tokenizer.add_tokens(["<other>"]))
    ghoststore.tokenize(data=gym.data["plain"], tokenizer=other, out=tmp_path / "shards")
    with pytest.raises(MismatchError, match="are of another tokenizer than that in ") as refused:
        gym.fresh(tmp_path, data=tmp_path / "shards", max_steps=2)
    assert "tokenizer.added_tokens.290: stored {'content': '<other>'" in str(refused.value)
    assert re.search(r"tokenizer\.fingerprint: stored 'sha256:\w+', found 'sha256:", str(refused.value))
    with pytest.raises(UsageError, match="`max_samples` belongs to a corpus; token shards are taken whole"):
        gym.fresh(tmp_path, data=tmp_path / "shards", max_steps=2, max_samples=3)


# Training that leaves the range of numbers.


@pytest.mark.parametrize("options", [{"method": "Regular"}, {}], ids=["Regular", "GradDotProd"])
def test_a_loss_that_is_no_number(gym: Gym, options: Options, tmp_path: Path) -> None:
    """Training stops and names the step; no checkpoint has such weights, no score is such a number."""
    every = {"checkpoint_interval": 1, "dot_prod_save_interval": 1, "max_steps": 8, "learning_rate": 1e30, **options}
    with pytest.raises(DivergedError, match=r"^step 2: the (val )?loss") as caught:
        gym.fresh(tmp_path, **every)
    assert "try a lower `learning_rate`" in str(caught.value)
    (checkpoint,) = checkpoints(tmp_path / "out")
    assert all(bool(torch.isfinite(w).all()) for w in load_file(checkpoint / "model.safetensors").values())
    run = Store.open(tmp_path / "store").run("run")
    assert run.steps == 1
    assert np.isfinite(run.read_committed("train_loss")).all()
    with pytest.raises(GhostStoreError, match=r"step 2|not finite"):  # the same command gets no further
        gym.fresh(tmp_path, **every)


def test_weights_that_are_no_numbers(gym: Gym, tmp_path: Path) -> None:
    """However they came about, no checkpoint holds them."""
    model = AutoModelForCausalLM.from_pretrained(gym.models["tiny"])
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = torch.nan
    with pytest.raises(DivergedError, match=r"^step 4: parameter 'transformer\.ln_f\.bias' is not finite any more"):
        save_state(
            tmp_path,
            step=4,
            model=model,
            tokenizer=None,
            optimizer=torch.optim.AdamW(model.parameters()),
            identity={},
            pending={},
            scaler={},
        )
    assert not list(tmp_path.iterdir())


def test_a_gradient_that_is_no_number(gym: Gym, tmp_path: Path) -> None:
    """The loss is still finite: a norm whose gradient is not."""
    model = Path(shutil.copytree(gym.models["tiny"], tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["transformer.h.0.mlp.c_proj.weight"] *= 1e-30
    weights["transformer.h.0.mlp.c_fc.weight"] *= 1e37
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DivergedError, match=r"^step 1: the norm of the gradient is (inf|nan)"):
        gym.fresh(tmp_path, model=None, checkpoint=model, method="Regular", max_steps=3, max_grad_norm=0.0)
    assert not checkpoints(tmp_path / "out")


def test_exit_code_of_divergence(gym: Gym, tmp_path: Path) -> None:
    outcome = gym.run(tmp_path, "--learning-rate", "1e30")
    assert (outcome.code, outcome.out) == (1, "")
    assert re.fullmatch(r"Error: step 2: the loss is (nan|inf)\. Nothing of this step is stored; .*\n", outcome.err)


# Options that are used.


def test_trackers_that_are_not_installed(gym: Gym, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="`wandb` needs Weights & Biases: pip install wandb"):
        gym.fresh(tmp_path, wandb="project", max_steps=2)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="`tensorboard` needs TensorBoard: pip install tensorboard"):
        gym.fresh(tmp_path, tensorboard=tmp_path / "logs", max_steps=2)
    assert list(tmp_path.iterdir()) == []


def test_json_and_table(gym: Gym, tmp_path: Path) -> None:
    outcome = gym.run(tmp_path, "--json")
    report = json.loads(outcome.out)
    assert (report["steps"], report["run"], report["rows"]) == (12, "run", 27)
    assert report["checkpoint"] == str(tmp_path / "out" / "checkpoint-12")
    assert 0 < report["score_share"] < 1
    table = gym.run(tmp_path).out
    assert "12, 12 of them before" in table
    assert re.search(r"val loss\s+\d\.\d+ nats a token", table)
