"""GhostStoreCallback with transformers' own Trainer: weights as without it, scores as batch-of-one autograd says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ghoststore import GhostStoreCallback, GradProjLoraEngine, ProjectionConfig
from ghoststore.errors import BusyError, CheckpointError, MismatchError, StorageError, UsageError
from indexer.encode.losses import next_token_losses
from indexer.integrations.callback import PENDING
from query.demo.tokenizer import train_tokenizer
from tests.support.loops import (
    ROWS,
    VAL_BATCH,
    batch_of,
    close_to,
    exact_scores,
    identical,
    in_ranks,
    roughly,
    run_of,
    same_arrays,
    steps_of,
    weights_of,
)
from tests.support.models import bert_masked, gpt2, llama

STEPS = 21
"""Of 14 rows in batches of 4: five epochs and a bit; the last batch of each has 2."""


class StopAt(TrainerCallback):
    """Training stops after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def hooks_of(model: Any) -> list[str]:
    """Our own hooks; checkpointing has one of transformers'."""
    kinds = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    found = [hook.__module__ for pair in kinds for hooks in pair for hook in hooks.values()]
    return [module for module in found if module.startswith("indexer")]


def dataset(*, sample: bool = True, start: int = 0) -> Dataset:
    rows: dict[str, Any] = {
        "input_ids": [ids.tolist() for ids, _ in ROWS],
        "labels": [labels.tolist() for _, labels in ROWS],
    }
    if sample:
        rows["sample"] = list(range(start, start + len(ROWS)))
    return Dataset.from_dict(rows)


def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pads ids and labels on the right; passes ``sample`` on."""
    length = max(len(row["input_ids"]) for row in features)
    mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in features]
    batch = {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in features]),
        "labels": torch.tensor([row["labels"] + [-100] * (length - len(row["labels"])) for row in features]),
        "attention_mask": torch.tensor(mask),
    }
    if "sample" in features[0]:
        batch["sample"] = torch.tensor([row["sample"] for row in features])
    return batch


class Watcher(TrainerCallback):
    """What every step's weights were, before it; and the learning rate that it was made with."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.evaluations: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del self.weights[state.global_step :], self.rates[state.global_step :]
        self.weights.append(weights_of(kwargs["model"]))
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self.evaluations.append(metrics["eval_loss"])


def callback_of(store: Path, **settings: Any) -> GhostStoreCallback:
    given = {"val_data": VAL_BATCH, "samples": len(ROWS), "dot_prod_save_interval": 4, **settings}
    return GhostStoreCallback(store=store, **given)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 50,
        "optim": "adamw_torch",
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder / "out"), **{**given, **settings})


def trainer_of(
    folder: Path, callbacks: list[Any], *, model: Any = None, trainer: type = Trainer, **settings: Any
) -> Any:
    own = {key: settings.pop(key) for key in ("compute_loss_func", "data_collator") if key in settings}
    rows = settings.pop("rows", None) or dataset()
    evaluation = settings.pop("eval_rows", dataset() if "eval_strategy" in settings else None)
    torch.manual_seed(0)
    return trainer(
        model=model or gpt2(),
        args=arguments(folder, **settings),
        train_dataset=rows,
        eval_dataset=evaluation,
        callbacks=callbacks,
        **{"data_collator": collate, **own},
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "accumulation of a ragged epoch": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 3},
    "clipping": {"max_grad_norm": 0.05},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True},
    "by epoch": {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 6},
}


@pytest.fixture(scope="module")
def weights_without(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, Tensor], list[float]]]:
    def of(setting: str) -> tuple[dict[str, Tensor], list[float]]:
        watcher = Watcher()
        trainer = trainer_of(
            tmp_path_factory.mktemp("plain"),
            [watcher],
            rows=dataset(sample=False),
            **SETTINGS[setting],
            eval_rows=dataset(sample=False),
        )
        trainer.train()
        return weights_of(trainer.model), watcher.evaluations

    return of


@pytest.mark.thin(2)
@pytest.mark.parametrize("setting", SETTINGS)
def test_training_stays_what_it_is_and_scores_are_exact(
    setting: str, weights_without: Callable[..., Any], tmp_path: Path
) -> None:
    watcher, callback = Watcher(), callback_of(tmp_path / "store")
    model = gpt2().train()  # with dropout, which scoring must not disturb
    trainer = trainer_of(tmp_path, [watcher, callback], model=model, **SETTINGS[setting])
    trainer.train()
    weights, evaluations = weights_without(setting)
    assert identical(weights_of(model), weights)
    assert watcher.evaluations == evaluations
    assert bool(evaluations) == ("eval_strategy" in SETTINGS[setting])
    assert not hooks_of(model)
    run = run_of(tmp_path / "store", "trainer")
    assert run.complete
    assert run.steps == len(watcher.weights) >= 20
    np.testing.assert_array_equal(run.read_committed("learning_rate"), watcher.rates)
    sizes = set()
    for _step, places, scores in steps_of(run):
        assert np.isfinite(scores).all()
        sizes.add(len(places))
    assert len(sizes) > 1  # a smaller last batch


SCORED = {name: value for name, value in SETTINGS.items() if name not in ("clipping", "reentrant", "by epoch")}


@pytest.mark.thin(2)
@pytest.mark.parametrize("setting", SCORED)
def test_scores_are_those_of_batch_of_one_autograd(setting: str, tmp_path: Path) -> None:
    watcher, callback = Watcher(), callback_of(tmp_path / "store")
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    trainer_of(tmp_path, [watcher, callback], model=model, **{**SCORED[setting], "max_steps": 8}).train()
    run, twin = run_of(tmp_path / "store", "trainer"), gpt2()
    losses, tokens = run.read_committed("train_loss"), run.read_committed("tokens")
    seconds, scoring = run.read_committed("seconds"), run.read_committed("score_seconds")
    assert (scoring > 0).all()
    assert (seconds > scoring).all()
    for step, places, scores in steps_of(run):
        twin.load_state_dict(watcher.weights[step])
        expected = exact_scores(twin, places.tolist())
        if setting == "bf16":
            roughly(scores, expected, 0.05)
        else:
            close_to(scores, expected, 2e-5)
        ids, labels, _ = batch_of(places.tolist())
        with torch.no_grad():
            loss = float(twin(input_ids=ids, labels=labels).loss)  # over all targets of the step
        assert losses[step] == pytest.approx(loss, rel=3e-2 if setting == "bf16" else 1e-5)
        assert tokens[step] == sum(len(ROWS[place][0]) for place in places)


def test_uneven_micro_batches_and_num_items_in_batch(tmp_path: Path) -> None:
    """The Trainer divides the sum over targets by the targets of the whole step, and says so to the model."""
    items: list[int] = []

    class Asking(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            items.append(int(kwargs["num_items_in_batch"]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    watcher, callback = Watcher(), callback_of(tmp_path / "store")
    model = llama()
    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "max_steps": 3}
    trainer_of(tmp_path, [watcher, callback], model=model, trainer=Asking, **settings).train()
    twin = llama()
    for step, places, scores in steps_of(run_of(tmp_path / "store", "trainer")):
        targets = [int((ROWS[place][1][1:] != -100).sum()) for place in places]
        assert len(set(targets)) > 1
        assert items[4 * step] == sum(targets)
        twin.load_state_dict(watcher.weights[step])
        close_to(scores, exact_scores(twin, places.tolist(), llama), 2e-5)


def test_a_model_that_is_told_nothing_of_the_step(tmp_path: Path) -> None:
    """Without num_items_in_batch each micro-batch has its own mean, divided by their number."""
    watcher, callback = Watcher(), callback_of(tmp_path / "store")
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model.accepts_loss_kwargs = False
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 3}
    trainer_of(tmp_path, [watcher, callback], model=model, **settings).train()
    twin = gpt2()
    for step, places, scores in steps_of(run_of(tmp_path / "store", "trainer")):
        twin.load_state_dict(watcher.weights[step])
        close_to(scores, exact_scores(twin, places.tolist()), 2e-5)


def test_the_collator_of_transformers(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a cat sleeps", "the dog runs over the stone"] * 5, 300)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = ["a cat", "the dog runs", "over the warm stone a cat sleeps", "sleeps", "the stone runs"]
    rows = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})
    rows = rows.add_column("sample", [3, 1, 4, 0, 2])
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=24, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    callback = callback_of(tmp_path / "store", samples=5, domains=["x", None, "y", "x", "y"])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    settings = {"data_collator": collator, "rows": rows, "max_steps": 4, "per_device_train_batch_size": 2}
    trainer_of(tmp_path, [callback], model=transformers.GPT2LMHeadModel(config), **settings).train()
    run = run_of(tmp_path / "store", "trainer")
    assert sorted(np.concatenate([places for step, places, _ in steps_of(run) if step < 3]).tolist()) == [0, 1, 2, 3, 4]
    assert run.domains == ["x", "y"]


def test_projected_gradients_and_scores_by_layer(tmp_path: Path) -> None:
    projection = ProjectionConfig(layers=("mlp",), rank_total=16, seed=2)
    watcher = Watcher()
    callback = callback_of(tmp_path / "store", projection=projection, per_layer=True)
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    trainer_of(tmp_path, [watcher, callback], model=model, max_steps=4).train()
    run, twin = run_of(tmp_path / "store", "trainer"), gpt2()
    vectors, blocks = run.read_committed("vector")[:, 0], run.read_committed("block_score")[:, 0]
    for step, places, scores in steps_of(run):
        twin.load_state_dict(watcher.weights[step])
        ids, labels, _ = batch_of(places.tolist())
        with GradProjLoraEngine(twin, projection) as engine:
            engine.prepare(len(ids))
            expected = engine.collect(next_token_losses(twin(input_ids=ids).logits, labels)[0])
        found = torch.from_numpy(vectors[step, : len(places)])
        assert float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-5
        np.testing.assert_allclose(blocks[step, : len(places)].sum(-1), scores, rtol=1e-4, atol=1e-5)
    assert run.manifest["scoring"]["method"] == "GradProjLora"


# Resuming.


@pytest.mark.thin(2)
@pytest.mark.kill
@pytest.mark.parametrize("setting", ["fp32", "accumulation", "refresh"])
@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_resuming_from_a_checkpoint(setting: str, killed: bool, tmp_path: Path) -> None:
    extra = {"accumulation": {"gradient_accumulation_steps": 2}}.get(setting, {})
    own = {"refresh": {"val_refresh_interval": 3}}.get(setting, {})
    saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 13, **extra}

    whole = trainer_of(tmp_path / "whole", [callback_of(tmp_path / "whole" / "store", **own)], **saving)
    whole.train()

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    callback = callback_of(tmp_path / "store", **own)
    first = trainer_of(tmp_path, [callback, Kill() if killed else StopAt(5)], **saving)
    if killed:
        with pytest.raises(KeyboardInterrupt):
            first.train()
        callback.close()
    else:
        first.train()
    checkpoint = tmp_path / "out" / "checkpoint-5"
    assert (checkpoint / PENDING).is_file()
    assert run_of(tmp_path / "store", "trainer").steps == 4
    second = trainer_of(tmp_path, [callback_of(tmp_path / "store", **own)], **saving)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert identical(weights_of(second.model), weights_of(whole.model))
    same_arrays(run_of(tmp_path / "store", "trainer"), run_of(tmp_path / "whole" / "store", "trainer"))


def interrupted(folder: Path) -> Path:
    """A training that stopped after step 5, and its checkpoint."""
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 9}
    trainer_of(folder, [callback_of(folder / "store"), StopAt(5)], **settings).train()
    return folder / "out" / "checkpoint-5"


@pytest.mark.slow
def test_a_checkpoint_that_was_moved(tmp_path: Path) -> None:
    checkpoint = tmp_path / "moved"
    shutil.move(interrupted(tmp_path), checkpoint)
    with pytest.raises(UsageError, match=r"lacks steps 4 to 4.*checkpoint-5"):
        trainer_of(tmp_path, [callback_of(tmp_path / "store")], max_steps=9).train(resume_from_checkpoint=checkpoint)
    callback = callback_of(tmp_path / "store", resume_from_checkpoint=checkpoint)
    trainer_of(tmp_path, [callback], max_steps=9).train(resume_from_checkpoint=checkpoint)
    assert run_of(tmp_path / "store", "trainer").complete


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    checkpoint = interrupted(tmp_path)
    (checkpoint / PENDING).write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        trainer_of(tmp_path, [callback_of(tmp_path / "store")], max_steps=9).train(resume_from_checkpoint=checkpoint)


def test_training_that_stops_early_has_every_step_in_the_store(tmp_path: Path) -> None:
    trainer_of(tmp_path, [callback_of(tmp_path / "store"), StopAt(6)]).train()
    found = {step: len(places) for step, places, _ in steps_of(run_of(tmp_path / "store", "trainer"))}
    assert [found[step] > 0 for step in range(8)] == [True] * 6 + [False] * 2


@pytest.mark.slow
def test_training_a_second_time_is_another_run(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [callback_of(tmp_path / "store")], max_steps=4)
    trainer.train()
    with pytest.raises(UsageError, match="scored a training already"):
        trainer.train()
    assert not hooks_of(trainer.model)
    other = trainer_of(tmp_path, [callback_of(tmp_path / "store")], model=trainer.model, max_steps=4)
    with pytest.warns(RuntimeWarning, match="step 0 is in the run already, with other scores"):
        other.train()
    shuffled = trainer_of(tmp_path, [callback := callback_of(tmp_path / "store")], max_steps=4, seed=4)
    with pytest.raises(MismatchError, match="another training"):
        shuffled.train()
    callback.close()
    assert not hooks_of(shuffled.model)


# Errors.


@pytest.mark.slow
def test_an_error_in_training_and_close(tmp_path: Path) -> None:
    class Fail(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyError("mine")

    callback = callback_of(tmp_path / "store")
    trainer = trainer_of(tmp_path, [callback, Fail()])
    with pytest.raises(KeyError, match="mine"):
        trainer.train()
    with pytest.raises(BusyError):
        trainer_of(tmp_path, [callback_of(tmp_path / "store")]).train()
    callback.close()
    callback.close()
    assert not hooks_of(trainer.model)
    trainer_of(tmp_path, [callback_of(tmp_path / "store")]).train()
    assert run_of(tmp_path / "store", "trainer").complete


class OtherLoss(Trainer):
    """A loss of its own, from the model's logits."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        return outputs.logits.square().mean()


class Half(torch.nn.Module):
    """A model that makes something else of its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt2()

    def forward(self, **batch: Any) -> Any:
        output = self.inner(**batch)
        return {"loss": output.loss / 2, "logits": output.logits}


class Lossless(Half):
    def forward(self, **batch: Any) -> Any:
        return {"logits": self.inner(**batch).logits}


def losses_of(model: Any, batch: Any) -> Tensor:
    return next_token_losses(model(**batch)["logits"], batch["labels"])[0]


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return next_token_losses(outputs.logits, labels)[0].mean()


def classified() -> Any:
    return Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "labels": [0, 1, 0, 1], "sample": [0, 1, 2, 3]})


def classifier() -> Any:
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return BertForSequenceClassification(config)


def stack(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.tensor([row[key] for row in features]) for key in features[0]}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no sample": ({"rows": dataset(sample=False)}, "no 'sample': add that column"),
    "columns removed": ({"remove_unused_columns": True}, "remove_unused_columns=False"),
    "out of range": ({"rows": dataset(start=5)}, "there are 14 samples"),
    "smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor cannot be used"),
    "compiled": ({"torch_compile": True}, "torch_compile cannot be used"),
    "batch size": ({"auto_find_batch_size": True}, "auto_find_batch_size cannot be used"),
    "a loss function": ({"compute_loss_func": mean_loss}, "compute_loss_func"),
    "another loss": ({"trainer": OtherLoss}, "trains on another one"),
    "half the loss": ({"model": Half}, "not the mean next-token loss"),
    "masked": ({"model": bert_masked}, "not the mean next-token loss"),
    "classes": ({"model": classifier, "rows": classified(), "data_collator": stack}, "no 'labels' of tokens"),
}


@pytest.mark.thin(4)
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_scored_is_refused(case: str, tmp_path: Path) -> None:
    settings, message = REFUSED[case]
    settings = dict(settings)
    if "model" in settings:
        settings["model"] = settings["model"]()
    callback = callback_of(tmp_path / "store", val_losses=losses_of if case == "half the loss" else None)
    trainer = trainer_of(tmp_path, [callback], max_steps=2, **settings)
    before = weights_of(trainer.model)
    with pytest.raises(UsageError, match=message):
        trainer.train()
    callback.close()
    assert identical(weights_of(trainer.model), before)
    assert not hooks_of(trainer.model)


def test_a_model_without_a_loss(tmp_path: Path) -> None:
    callback = callback_of(tmp_path / "store", val_losses=losses_of)
    trainer = trainer_of(tmp_path, [callback], model=Lossless(), max_steps=2)
    with pytest.raises(UsageError, match="returned no loss"):
        trainer.train()
    callback.close()


def test_settings_of_the_callback(tmp_path: Path) -> None:
    for settings, message in (
        ({"val_data": None}, "val set"),
        ({"dot_prod_save_interval": 0}, "dot_prod_save_interval"),
        ({"samples": "train"}, "not the string"),
        ({"samples": 0}, "no training samples"),
        ({"domains": ["a"]}, "1 domains for 14 samples"),
        ({"domains": "abcdefghijklmn"}, "not the string"),
    ):
        with pytest.raises(UsageError, match=message):
            callback_of(tmp_path / "store", **settings)
    callback = callback_of(tmp_path / "store", projection=ProjectionConfig(), per_layer=True)
    with pytest.raises(UsageError, match="per_layer"):
        trainer_of(tmp_path, [callback]).train()


@pytest.mark.thin(1)
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_store_that_cannot_be_written(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ghoststore.store.run.run import RunWriter

    def refuse(self: Any, *args: Any) -> None:
        raise StorageError("no space")

    monkeypatch.setattr(RunWriter, "append", refuse)
    notes: list[str] = []
    callback = callback_of(tmp_path / "store", on_store_error=policy, note=notes.append)
    trainer = trainer_of(tmp_path, [callback], max_steps=6)
    if policy == "stop":
        with pytest.raises(StorageError, match="no space"):
            trainer.train()
        callback.close()
    else:
        trainer.train()
        assert len(notes) == 1
        assert "no space" in notes[0]
    assert bool(notes) == (policy == "continue")


# Ranks.


def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():  # as torchrun sets them
        monkeypatch.setenv(name, value)

    def work(rank: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found = []
        for scored in (True, False):
            watcher = Watcher()
            callbacks = [watcher, callback_of(tmp_path / "store")] if scored else [watcher]
            settings = {"max_steps": 6, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
            if scored:
                settings |= {"save_strategy": "steps", "save_steps": 3}
            model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            rows = dataset(sample=scored)
            trainer_of(tmp_path, callbacks, model=model, rows=rows, ddp_backend="gloo", **settings).train()
            found.append(weights_of(model))
            if scored and rank == 0:
                torch.save(watcher.weights, tmp_path / "weights")
        assert identical(*found)

    in_ranks(2, work, tmp_path)
    run, twin = run_of(tmp_path / "store", "trainer"), gpt2()
    assert run.complete
    assert run.layout.ranks == 2
    weights = torch.load(tmp_path / "weights")
    sample, score, losses = (run.read_committed(name) for name in ("sample", "score", "train_loss"))
    for step in range(run.steps):
        twin.load_state_dict(weights[step])
        places = sample[step].flatten()
        there = places >= 0
        close_to(score[step].flatten()[there], exact_scores(twin, places[there].tolist()), 2e-5)
        ids, labels, _ = batch_of(places[there].tolist())
        with torch.no_grad():
            assert losses[step] == pytest.approx(float(twin(input_ids=ids, labels=labels).loss), rel=1e-5)
