"""The run of a user's loop: what the manager and the Trainer callback know of it before its first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghoststore.checkpoint.config_identity import config_identity
from ghoststore.corpus.repeated import RepeatedIds
from ghoststore.errors import UsageError
from ghoststore.settings.train import KEPT_DTYPE, OnStoreError, ScoreLayers, ScoreMetric
from ghoststore.store.base.manifest import Manifest
from ghoststore.store.run.layout import RunLayout
from indexer.dotprod import GradDotProdEngine
from indexer.dotprod.sketched import SketchedMethod
from indexer.integrations.config import GhostConfig
from indexer.session.choosing import Choosing
from indexer.session.kept_gradients import gradient_layout, kept_section
from indexer.session.ranks import Ranks
from indexer.session.run_plan import RunPlan, parameter_count, projection_hash, run_manifest
from indexer.session.samples import Samples, val_fingerprint
from indexer.session.session import ScoringSession, warn


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopRun:
    """The settings of a loop that its run is made of."""

    store: str | Path | None
    """None: nothing is stored."""
    name: str
    samples: Samples | None
    """Needed with a store."""
    steps: int
    batch: int
    """Samples of one rank's step, over all its micro-batches."""
    save_interval: int
    val_refresh_interval: int
    exclude_layers: tuple[str, ...]
    per_layer: bool
    on_store_error: OnStoreError
    score_metric: ScoreMetric
    score_layers: ScoreLayers | None = None
    choosing: Choosing | None = None
    keep_gradients: int | None = None
    """Steps of which one keeps its projected gradients; None: sketched scores keep those of every step, as float32."""
    proj_dtype: str = KEPT_DTYPE

    @classmethod
    def of(cls, config: GhostConfig, samples: Samples | None) -> LoopRun:
        """That of a manager with ``config``."""
        return cls(
            store=config.store,
            name=config.name,
            samples=samples,
            steps=config.max_steps or 1,
            batch=(config.batch_size or 1) * config.gradient_accumulation_steps,
            save_interval=config.dot_prod_save_interval,
            val_refresh_interval=config.val_refresh_interval,
            exclude_layers=tuple(config.exclude_layers),
            per_layer=config.per_layer,
            on_store_error=config.on_store_error,
            score_layers=config.scored_layers,
            score_metric=config.score_metric,
            choosing=config.choosing,
            keep_gradients=config.keep_gradients,
            proj_dtype=config.proj_dtype,
        )

    def session(
        self, engine: GradDotProdEngine, ranks: Ranks, note: Callable[[str], None] | None = None
    ) -> ScoringSession:
        """The session that writes it. UsageError for scores by layer where layers have none."""
        plan = None if self.store is None else self._plan(self.store, engine, ranks)
        return ScoringSession(engine, plan, ranks, note=note or warn)

    def _plan(self, store: str | Path, engine: GradDotProdEngine, ranks: Ranks) -> RunPlan:
        samples, method = self.samples, engine.method
        assert samples is not None
        if self.per_layer and not (method.blocks and engine.val_batches):
            raise UsageError(
                "`per_layer`: layers have no scores of their own under a global sketch, nor without val data; give "
                "plain blocks (`proj_rank_total` of GhostConfig, `rank_total` of a ProjectionConfig), and `val_data`"
            )
        every_step = isinstance(method, SketchedMethod) and self.keep_gradients is None
        projection = method.projection if every_step else None
        layout = RunLayout.saving(
            self.save_interval,
            steps=self.steps,
            ranks=ranks.count,
            batch=self.batch,
            rows=len(samples.ids),
            blocks=tuple(method.blocks) if self.per_layer else (),
            dimension=None if projection is None else projection.plan.dimension,
            gradients=gradient_layout(engine, self.keep_gradients, self.proj_dtype),
            weights=self.choosing is not None,
        )
        config = getattr(engine.model, "config", None)
        config = config if hasattr(config, "to_diff_dict") else None  # of transformers; other libraries have their own
        manifest = self._manifest(samples, layout, engine, config)
        return RunPlan(
            store=store,
            name=self.name,
            layout=layout,
            manifest=manifest,
            rows=samples,
            on_store_error=self.on_store_error,
            config=config,
        )

    def _manifest(self, samples: Samples, layout: RunLayout, engine: GradDotProdEngine, config: Any) -> Manifest:
        sketched = isinstance(engine.method, SketchedMethod)
        model = engine.model
        sections = {
            "model": {
                "architecture": type(model).__name__,
                "parameters": parameter_count(model),
                "trainable": parameter_count(model, trainable=True),
                "config": None if config is None else config_identity(config, training=True),
            },
            "tokenizer": {"fingerprint": None},
            "corpus": {
                "fingerprint": samples.fingerprint(),
                "samples": len(samples.ids),
                "domains": samples.domain_names or None,
                "repeated_ids": RepeatedIds.of(samples.ids),
            },
            "val": {"fingerprint": val_fingerprint(engine.val_batches), "rows": engine.val_samples},
            "training": {"batch": self.batch, "max_steps": self.steps},
            "scoring": {
                "method": "GradProjLora" if sketched else "GradDotProd",
                "score": "sketched" if sketched else "exact",
                "projection": projection_hash(engine),
                "val_refresh_interval": self.val_refresh_interval,
                "exclude_layers": list(self.exclude_layers),
                **({"score_layers": "blocks"} if self.score_layers == "blocks" else {}),
                **({} if self.score_metric == "sgd" else {"score_metric": self.score_metric}),
                **({} if self.choosing is None else {"choosing": self.choosing.to_json()}),
                **kept_section(engine, layout),
            },
            "source": {"data": None},
            "compute": {"device": next(model.parameters()).device.type},
        }
        return run_manifest(sections, layout)
