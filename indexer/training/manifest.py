"""The manifest of a training run. Its sections are those of ``docs/format.md``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from ghoststore.checkpoint.config_identity import agreed_config
from ghoststore.checkpoint.same_model import start_section
from ghoststore.settings.train import TrainConfig
from ghoststore.store.base.manifest import Manifest
from ghoststore.store.base.own import is_own, remember
from ghoststore.store.run.layout import RunLayout
from ghoststore.store.run.run import Run
from ghoststore.tokens.shards import TokenShards
from indexer.dotprod import GradDotProdEngine
from indexer.session.kept_gradients import gradient_layout, kept_section
from indexer.session.run_plan import parameter_count, projection_hash, run_manifest
from indexer.training.architectures import config_name
from indexer.training.inputs import Inputs

IDENTITY = ("model", "tokenizer", "corpus", "val", "training", "scoring", "storage")
"""Sections that a checkpoint must agree with."""


def training_layout(
    config: TrainConfig,
    inputs: Inputs,
    engine: GradDotProdEngine | None,
    ranks: int,
    stored: Mapping[str, Any] | None,
) -> RunLayout:
    """The arrays of the run. ``engine`` is None where samples are not scored; ``stored`` is what the checkpoint says
    from which training goes on.
    """
    scoring = config.scoring
    groups = inputs.val.domains if inputs.val is not None and engine is not None and scoring.val_groups else ()
    layout = RunLayout.saving(
        config.dot_prod_save_interval,
        steps=inputs.steps,
        ranks=ranks,
        batch=config.drawn(ranks),
        rows=len(inputs.rows),
        groups=tuple(groups),
        blocks=tuple(engine.method.blocks) if engine is not None and scoring.per_layer else (),
        weights=config.choosing.candidates is not None,
        gradients=None if engine is None else gradient_layout(engine, scoring.keep_gradients, scoring.proj_dtype),
    )
    return layout if stored is None else layout.in_spans_of(stored["storage"])


def training_manifest(
    config: TrainConfig,
    inputs: Inputs,
    layout: RunLayout,
    *,
    engine: GradDotProdEngine | None,
    checkpoint_interval: int,
    source: Mapping[str, str | None],
    stored: Mapping[str, Any] | None,
) -> Manifest:
    """The manifest of a training. ``source`` says where its inputs lie, ``stored`` what the checkpoint says from which
    it goes on.
    """
    model, val, shards = inputs.model, inputs.val, inputs.rows.shards
    stored_model = {} if stored is None else stored["model"]
    sections = {
        "model": {
            "architecture": type(model).__name__,
            "name": config.architecture if config.model_config is None else config_name(config.model_config),
            "config": agreed_config(stored_model.get("config"), model.config, training=True),
            "checkpoint": start_section(inputs.start.checkpoint, stored_model.get("checkpoint")),
            "parameters": parameter_count(model),
        },
        "tokenizer": {**shards.tokenizer_identity, "template_date": shards.template_date},
        "corpus": {
            "fingerprint": shards.corpus_fingerprint,
            "samples": shards.samples,
            "domains": shards.domains or None,
            "only_domains": sorted(inputs.domains) or None,
            "repeated_ids": inputs.rows.repeated_ids(),
            "fields": shards.source["fields"],
        },
        "val": {
            "fingerprint": None if val is None else val.fingerprint,
            "rows": 0 if val is None else len(val.rows),
            "domains": [] if val is None else val.domains,
        },
        "training": {
            **asdict(config.optimization),
            "max_steps": inputs.steps,
            "seed": config.seed,
            "dropout": config.dropout,
            "max_length": inputs.max_length,
            "overlong": config.overlong,
            "model_dtype": config.model_dtype,
            "train_dtype": config.arithmetic,
            "eval_interval": config.eval_interval,
            "loss": "next-token cross-entropy, mean over all targets of a step",
        },
        "scoring": {
            **_scoring(config, inputs.steps),
            "exclude_layers": list(config.scoring.exclude_layers),
            "checkpoint_interval": checkpoint_interval,
            "projection": projection_hash(engine),
            **kept_section(engine, layout),
        },
        "source": {**source, "corpus": shards.source["data"], "form": shards.source["form"]},
        "compute": {
            "device": next(model.parameters()).device.type,
            "attn_implementation": getattr(model.config, "_attn_implementation", None),
            "threads": torch.get_num_threads(),
            "gradient_checkpointing": config.gradient_checkpointing,
        },
    }
    return run_manifest(sections, layout, "transformers", "tokenizers")


def _scoring(config: TrainConfig, steps: int) -> dict[str, Any]:
    """The options of scoring. Those that are newer than format 1 are left out at their defaults, so that older runs go
    on.
    """
    section = {
        **asdict(config.scoring),
        "score": config.score,
        "val_refresh_interval": config.val_refresh_interval,
    }
    del section["score_layers"]
    if config.scoring.score_metric == "sgd":
        del section["score_metric"]
    if config.score_layers == "blocks":
        section["score_layers"] = "blocks"
    if config.choosing.candidates is not None:
        section["choosing"] = {
            **config.choosing.to_json(contrast=config.contrast),
            "choosing_begins_at": config.choosing.begins_at(steps),
        }
    return section


def remember_corpus(run: Run, shards: TokenShards) -> str | None:
    """Remember that the corpus that ``run`` names is one that this user tokenized, if it is: it is the token shards
    that name it, which may come from anywhere. What is wrong, in words, where that cannot be.
    """
    if not is_own(shards.manifest):
        return None
    return remember(run.manifest, {**run.manifest["source"], "corpus": shards.source["data"]}, run.path)
