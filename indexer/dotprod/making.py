"""Makes the method of scoring from the settings of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import nn

from ghoststore.errors import UsageError
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.settings.train import Route, ScoreLayers, ScoreMetric
from indexer.dotprod.exact import ExactMethod
from indexer.dotprod.keeping import KeepingMethod
from indexer.dotprod.ledger import survey
from indexer.dotprod.method import Method
from indexer.dotprod.metric import AdamMetric
from indexer.dotprod.sketched import SketchedMethod
from indexer.projection.matrices import Projection
from indexer.projection.selection import block_linears


def metric_for(score_metric: ScoreMetric, optimizer: torch.optim.Optimizer | None) -> AdamMetric | None:
    """The metric of the score; None for plain dot products. UsageError for an optimizer without such a metric."""
    if score_metric not in get_args(ScoreMetric):
        raise UsageError(f"`score_metric` {score_metric!r} is unknown; known: {', '.join(get_args(ScoreMetric))}")
    return AdamMetric(optimizer) if score_metric == "adam" else None


def method_for(
    model: nn.Module,
    projection: ProjectionConfig | Projection | None,
    keep: ProjectionConfig | Projection | None,
    *,
    exclude_layers: Sequence[str],
    score_layers: ScoreLayers | None,
    metric: AdamMetric | None,
    route: Route,
    pairs: bool,
    check: bool,
) -> Method:
    """Make the method: sketched through ``projection`` if that is given, else exact.

    With ``keep`` the exact method also gives vectors through that projection. A configuration of a projection is drawn
    for the model.

    UsageError for settings that do not go together, LayerError if ``model`` cannot be scored in this way.
    """
    if score_layers not in (None, *get_args(ScoreLayers)):
        raise UsageError(f"`score_layers` {score_layers!r} is unknown; known: {', '.join(get_args(ScoreLayers))}")
    if projection is None:
        only = block_linears(model) if score_layers == "blocks" else None
        ledger = survey(model, exclude_layers, only=only)
        exact = ExactMethod(ledger, route=route, pairs=pairs, metric=metric, check=check)
        if keep is None:
            return exact
        return KeepingMethod(exact, SketchedMethod(model, _drawn(model, keep), check=check))
    if keep is not None:
        raise UsageError("`projection` gives vectors already, and `keep` is for exact scores: give one of them")
    if pairs or exclude_layers or score_layers is not None or route != "auto":
        raise UsageError(
            "`pairs`, `route`, `exclude_layers` and `score_layers` belong to the exact score; the projection names "
            "the layers it sketches"
        )
    return SketchedMethod(model, _drawn(model, projection), metric=metric, check=check)


def _drawn(model: nn.Module, projection: ProjectionConfig | Projection) -> Projection:
    return Projection.for_model(model, projection) if isinstance(projection, ProjectionConfig) else projection
