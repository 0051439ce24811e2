"""Layer types with known formulas for per-sample gradients. Each has a file of its own, whose import registers it."""

from indexer.layers.base import (
    LAYER_TYPES,
    Axis,
    LayerType,
    Sides,
    layer_type_by_name,
    layer_type_of,
    register,
)
from indexer.layers.conv1d import Conv1DLayer
from indexer.layers.embedding import EmbeddingLayer
from indexer.layers.linear import LinearLayer
from indexer.layers.norm import LayerNormLayer, RMSNormLayer
from indexer.layers.replayed import ReplayedLayer

__all__ = [
    "LAYER_TYPES",
    "Axis",
    "Conv1DLayer",
    "EmbeddingLayer",
    "LayerNormLayer",
    "LayerType",
    "LinearLayer",
    "RMSNormLayer",
    "ReplayedLayer",
    "Sides",
    "layer_type_by_name",
    "layer_type_of",
    "register",
]
