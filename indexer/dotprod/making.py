"""The way to score that an engine was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from torch import nn

from ghoststore.errors import UsageError
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.settings.train import Route, ScoreLayers
from indexer.dotprod.exact import ExactMethod
from indexer.dotprod.ledger import survey
from indexer.dotprod.sketched import SketchedMethod
from indexer.projection.matrices import Projection
from indexer.projection.selection import block_linears


def exact_method(
    model: nn.Module,
    *,
    exclude_layers: Sequence[str],
    score_layers: ScoreLayers | None,
    route: Route,
    pairs: bool,
    check: bool,
) -> ExactMethod:
    """Over the parameters of ``model`` that are to be scored. UsageError or LayerError if they cannot be."""
    if score_layers not in (None, *get_args(ScoreLayers)):
        raise UsageError(f"score_layers {score_layers!r} is unknown; known: {', '.join(get_args(ScoreLayers))}")
    only = block_linears(model) if score_layers == "blocks" else None
    return ExactMethod(survey(model, exclude_layers, only=only), route=route, pairs=pairs, check=check)


def sketched_method(model: nn.Module, projection: ProjectionConfig | Projection, *, check: bool) -> SketchedMethod:
    """Through ``projection``, drawn for ``model`` where it is a configuration."""
    if isinstance(projection, ProjectionConfig):
        projection = Projection.for_model(model, projection)
    return SketchedMethod(model, projection, check=check)
