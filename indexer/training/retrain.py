"""Small models trained from new weights on some of the samples of a corpus, and their val losses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from ghoststore.checkpoint.load import load_tokenizer
from ghoststore.corpus import Fields, Source
from ghoststore.errors import UsageError
from ghoststore.progress import Silent
from ghoststore.settings.train import TrainConfig
from ghoststore.tokens.shards import TokenShards
from indexer.encode.modes import reseed
from indexer.encode.tokens import Tokenizer
from indexer.session.ranks import Ranks
from indexer.session.session import ScoringSession
from indexer.training.data import Order, TrainingRows
from indexer.training.inputs import read_val
from indexer.training.loop import Trainer, make_optimizer
from indexer.training.validation import ValSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How each model is trained: from new weights of the same architecture, AdamW, warm-up and half a cosine."""

    max_steps: int = 200
    batch_size: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    adam_beta2: float = 0.99
    seed: int = 0

    def config(self) -> TrainConfig:
        """The settings of every training: all begin from the same weights. UsageError for bad ones."""
        return TrainConfig.of(
            **asdict(self),
            method="Regular",
            overlong="truncate",
            max_length=None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Retraining:
    """Everything that all trainings share. Sent to worker processes."""

    model_folder: str
    """Its ``config.json`` is the architecture; its weights are not used."""
    tokenizer_folder: str
    shards: str
    """Token shards of the whole corpus."""
    val_set: Source
    fields: Fields
    max_val_samples: int | None
    max_length: int
    recipe: Recipe
    device: str


class Retrainer:
    """Trains one model after another: corpus and val set are read once."""

    def __init__(self, job: Retraining) -> None:
        self.job = job
        self.shards = TokenShards.open(job.shards)
        self.val: ValSet = read_val(
            job.val_set,
            job.fields,
            self._tokenizer(),
            job.max_length,
            max_samples=job.max_val_samples,
            seed=0,
            progress=Silent(),
        )
        self.rows = TrainingRows.cut(self.shards, job.max_length, "truncate")

    def _tokenizer(self) -> Tokenizer:
        vocabulary = getattr(self._config().get_text_config(), "vocab_size", None)
        tokenizer = load_tokenizer(Path(self.job.tokenizer_folder))
        date = self.shards.template_date
        return Tokenizer(tokenizer, vocabulary=vocabulary, of_part=True, template_date=date, takes_ids=True)

    def _config(self) -> Any:
        return AutoConfig.from_pretrained(self.job.model_folder, local_files_only=True, trust_remote_code=False)

    def val_losses(self, samples: NDArray[np.bool_]) -> NDArray[np.float64]:
        """(V,): the mean loss of each val sample after training on those of the corpus that are True in ``samples``.

        The same for the same arguments on the same machine. UsageError if no such sample has a target.
        """
        rows = self.rows.only(samples)
        config = self.job.recipe.config()
        model = self._new_model(config.seed)
        trainer = Trainer(
            model=model,
            optimizer=make_optimizer(model, config.optimization),
            rows=rows,
            order=Order(rows, seed=config.seed, step_rows=config.optimization.batch_size),
            config=config,
            ranks=Ranks(),
            device=self.job.device,
            steps=self.job.recipe.max_steps,
            session=ScoringSession(),
            val_schedule=None,
            scaler=None,
        )
        with trainer.running():
            for step in range(trainer.steps):
                trainer.step(step)
        return self.val.losses(model)

    def _new_model(self, seed: int) -> Any:
        config = self._config()
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
        with torch.random.fork_rng(devices=[]):
            reseed(seed)
            try:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            except ValueError as error:
                raise UsageError(f"a new model of {self.job.model_folder} cannot be made: {error}") from error
        model.loss_type = "ForCausalLM"
        return model.to(self.job.device)
