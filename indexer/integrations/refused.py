"""Trainers, and settings of theirs, whose samples a callback cannot score: they are refused before work."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerState, TrainingArguments

from ghoststore.errors import UsageError

OWN_LOOP = (
    "score it in a loop of your own: GradDotProdEngine with `val_losses` of that loss, one for each sample, and "
    "watch(loss, batch=batch)"
)


def refuse_arguments(args: TrainingArguments, state: TrainerState) -> None:
    """UsageError for settings of the Trainer under which samples cannot be scored, or not by one run."""
    refused = {
        "label_smoothing_factor": (args.label_smoothing_factor, "the model's own loss is not the one that is trained"),
        "torch_compile by regions": (
            args.torch_compile and _by_regions(),
            "accelerate puts a copy in place of the model; leave ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION out",
        ),
        "deepspeed": (args.deepspeed, "it splits the parameters; use DDP (torchrun)"),
        "fsdp": (args.fsdp, "it splits the parameters; use DDP (torchrun)"),
        "auto_find_batch_size": (args.auto_find_batch_size, "a run has one batch size; give it"),
        "n_gpu > 1": (args.n_gpu > 1, "nn.DataParallel splits batches behind the Trainer's back; use DDP (torchrun)"),
    }
    for name, (value, reason) in refused.items():
        if value:
            raise UsageError(f"TrainingArguments.{name} cannot be used with GhostStoreCallback: {reason}")
    if state.is_hyper_param_search:
        raise UsageError("a hyperparameter search is many trainings, and a run is one: score the one that you choose")


def refuse_trainer(trainer: Any, args: TrainingArguments, *, choosing: bool) -> None:
    """UsageError for a trainer of TRL that trains on another loss than that of next tokens, or on all of a batch where
    samples are chosen.
    """
    kinds = {kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.partition(".")[0] == "trl"}
    if not kinds:
        return
    name = type(trainer).__name__
    if "SFTTrainer" not in kinds:
        raise UsageError(
            f"{name} cannot be scored by GhostStoreCallback: its loss is none of next tokens, one for each sample (it "
            f"is of pairs, rewards or a teacher). SFTTrainer can; or {OWN_LOOP}"
        )
    if choosing:
        raise UsageError(
            f"`choosing` cannot be used with {name}: it divides the loss of the chosen samples by the targets of all. "
            "Choose with transformers' Trainer (its model divides by those of the chosen), or with `ghoststore train`"
        )
    loss_type = getattr(args, "loss_type", "nll")
    if loss_type != "nll":
        raise UsageError(
            f"SFTConfig.loss_type={loss_type!r} cannot be used with GhostStoreCallback: it weighs each token by its "
            f"probability. Train with loss_type='nll', or {OWN_LOOP}"
        )
    if getattr(trainer, "aux_loss_enabled", False):
        raise UsageError(
            f"{name} adds the router's auxiliary loss, one of the whole batch, of which no sample has a share: train "
            "without it, SFTConfig(router_aux_loss_coef=0.0)"
        )
    if args.torch_compile:
        raise UsageError(
            f"TrainingArguments.torch_compile cannot be used with {name} and GhostStoreCallback: its head is fused "
            "with the loss, and a compiled graph does not show what goes into it. Leave torch_compile out"
        )


def _by_regions() -> bool:
    """Whether accelerate compiles the blocks of a model, each by itself."""
    given = os.environ.get("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "").lower()
    return given in ("1", "y", "yes", "t", "true", "on")
