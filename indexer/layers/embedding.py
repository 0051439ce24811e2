"""torch.nn.Embedding: a Linear with a one-hot input, so that P_in x is a column of P_in.

n_in is the vocabulary (or the number of positions), n_out the width. The gradient matrix is the transpose of the stored
weight's gradient. Some classes multiply the output with a number of their own (Gemma, BioGPT, XGLM: ``embed_scale``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ghoststore.errors import LayerError
from indexer.layers.base import (
    Axis,
    LayerType,
    Sides,
    computes,
    flatten_positions,
    has_plain_weight,
    outer_sum,
    project,
    register,
    runs_forward_of,
)
from indexer.layers.factors import Factors, Outer, add_rows


@register
class EmbeddingLayer(LayerType):
    name = "embedding"
    transposed = True
    is_lookup = True

    def handles(self, module: nn.Module) -> bool:
        if runs_forward_of(module, nn.Embedding):
            return True
        if not isinstance(module, nn.Embedding) or not has_plain_weight(module) or _scale(module) is None:
            return False
        places = [0, len(module.weight) - 1, module.padding_idx or 0]
        return computes(module, self, torch.tensor([places], device=module.weight.device))

    def axes(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Embedding)
        return module.embedding_dim, module.num_embeddings

    def check(self, module: nn.Module, name: str) -> None:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            raise LayerError(f"layer {name!r} has max_norm={module.max_norm}: its forward changes its weights")
        if module.scale_grad_by_freq:
            raise LayerError(
                f"layer {name!r} has scale_grad_by_freq: a sample's gradient would depend on its batch mates"
            )

    def outputs(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        rows, scale = torch.nn.functional.embedding(x, module.get_parameter("weight")), _scale_of(module)
        return [rows if scale is None else rows * scale.to(rows)]

    def keep(self, module: nn.Module, x: Tensor, sides: Sides, dtype: torch.dtype) -> Tensor:
        return x.reshape(x.shape[0], -1)

    def block(self, module: nn.Module, saved: Tensor, dy: Tensor, sides: Sides) -> Tensor:
        assert isinstance(module, nn.Embedding)
        dy = _scaled(module, dy)
        if isinstance(sides.in_JI, Axis):
            return self._whole_axis(
                module, saved, project(flatten_positions(dy), sides.out_KO, None, dy.dtype), sides.in_JI
            )
        a_BMJ = torch.nn.functional.embedding(saved, sides.in_JI.t())
        if module.padding_idx is not None:
            a_BMJ = a_BMJ.masked_fill(saved.eq(module.padding_idx).unsqueeze(-1), 0.0)
        return outer_sum(project(flatten_positions(dy), sides.out_KO, None, dy.dtype), a_BMJ)

    @staticmethod
    def _whole_axis(module: nn.Embedding, ids_BM: Tensor, d_BMK: Tensor, axis: Axis) -> Tensor:
        """(B, K, vocabulary): the gradient of each position, added up at its token."""
        if module.padding_idx is not None:
            d_BMK = d_BMK.masked_fill(ids_BM.eq(module.padding_idx).unsqueeze(-1), 0.0)
        batch, _, k = d_BMK.shape
        index_BM = ids_BM + axis.size * torch.arange(batch, device=ids_BM.device).unsqueeze(1)
        block = torch.zeros(batch * axis.size, k, device=d_BMK.device)
        add_rows(block, index_BM.flatten(), d_BMK.float().flatten(0, 1))
        return block.view(batch, axis.size, k).transpose(1, 2)

    def factors(self, module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Factors]:
        assert isinstance(module, nn.Embedding)
        ids_BM, dy_BMO = x.reshape(x.shape[0], -1), flatten_positions(_scaled(module, dy))
        if module.padding_idx is not None:
            dy_BMO = dy_BMO.masked_fill(ids_BM.eq(module.padding_idx).unsqueeze(-1), 0.0)
        return {"weight": Outer(ids_BM, dy_BMO)}


def _scale_of(module: nn.Module) -> Tensor | None:
    """The number that ``module`` multiplies its output with; None for torch's own class, which has none."""
    return None if runs_forward_of(module, nn.Embedding) else _scale(module)


def _scale(module: nn.Module) -> Tensor | None:
    value = getattr(module, "embed_scale", None)
    if isinstance(value, Tensor):
        return value.reshape(()) if value.numel() == 1 else None
    return torch.tensor(float(value)) if isinstance(value, (int, float)) else None


def _scaled(module: nn.Module, dy: Tensor) -> Tensor:
    scale = _scale_of(module)
    return dy if scale is None else dy * scale.to(dy)
