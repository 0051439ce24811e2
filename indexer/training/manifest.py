"""The manifest of a training run. Its sections are those of ``docs/format.md``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from ghoststore.checkpoint.config_identity import agreed_config
from ghoststore.checkpoint.same_model import start_section
from ghoststore.settings.train import TrainConfig
from ghoststore.software import versions_of
from ghoststore.store.base.manifest import Manifest
from ghoststore.store.run.run import RunLayout
from ghoststore.tokens.shards import TokenShards
from indexer.training.data import TrainingRows
from indexer.training.inputs import Start
from indexer.training.scorer import Scorer
from indexer.training.validation import ValSet


def parameter_count(model: torch.nn.Module) -> int:
    """Numbers in the weights; a tied one counts once."""
    return sum(p.numel() for p in model.parameters())


def run_manifest(
    config: TrainConfig,
    *,
    start: Start,
    model: Any,
    shards: TokenShards,
    rows: TrainingRows,
    val: ValSet | None,
    scorer: Scorer | None,
    domains: tuple[str, ...],
    steps: int,
    ranks: int,
    max_length: int,
    checkpoint_interval: int,
    source: Mapping[str, str | None],
    stored: Mapping[str, Any] | None = None,
) -> Manifest:
    """The manifest of a run of ``steps`` steps over ``rows``. ``source`` says where its inputs lie,
    ``stored`` what the checkpoint says from which it goes on.
    """
    asked, scoring = config.optimization, config.scoring
    layout = RunLayout(
        steps=steps,
        ranks=ranks,
        batch=asked.batch_size * asked.gradient_accumulation_steps,
        span_steps=config.dot_prod_save_interval,
        rows=len(rows),
        groups=tuple(scorer.groups) if scorer else (),
        blocks=tuple(scorer.blocks) if scorer else (),
    )
    method = scorer.engine.method if scorer else None
    known = {} if stored is None else stored["model"]
    return {
        "model": {
            "architecture": type(model).__name__,
            "name": config.architecture,
            "config": agreed_config(known.get("config"), model.config, training=True),
            "checkpoint": start_section(start.checkpoint, known.get("checkpoint")),
            "parameters": parameter_count(model),
        },
        "tokenizer": shards.tokenizer_identity,
        "corpus": {
            "fingerprint": shards.corpus_fingerprint,
            "samples": shards.samples,
            "domains": shards.domains or None,
            "only_domains": sorted(domains) or None,
            "repeated_ids": rows.repeated_ids(),
            "fields": shards.source["fields"],
        },
        "val": {
            "fingerprint": None if val is None else val.fingerprint,
            "rows": 0 if val is None else len(val.rows),
            "domains": [] if val is None else val.domains,
        },
        "training": {
            **asdict(asked),
            "max_steps": steps,
            "seed": config.seed,
            "dropout": config.dropout,
            "max_length": max_length,
            "overlong": config.overlong,
            "model_dtype": config.model_dtype,
            "train_dtype": config.arithmetic,
            "eval_interval": config.eval_interval,
            "loss": "next-token cross-entropy, mean over all targets of a step",
        },
        "scoring": {
            **asdict(scoring),
            "exclude_layers": list(scoring.exclude_layers),
            "checkpoint_interval": checkpoint_interval,
            "projection": method.projection.hash if method is not None and hasattr(method, "projection") else None,
        },
        "storage": layout.to_json(),
        "source": {**source, "corpus": shards.source["data"], "form": shards.source["form"]},
        "software": versions_of("ghoststore", "torch", "transformers", "tokenizers", "numpy", "zarr"),
        "compute": {
            "device": torch.device(next(model.parameters()).device).type,
            "attn_implementation": getattr(model.config, "_attn_implementation", None),
            "threads": torch.get_num_threads(),
            "gradient_checkpointing": config.gradient_checkpointing,
        },
    }
