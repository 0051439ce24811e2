"""The side branch y = W x + P_outᵀ G P_in x at G = 0, as an autograd function.

Its forward adds nothing: the output shares the memory of y. Its backward passes dy on unchanged and returns, as the
gradient of the per-sample matrices G (B, K, J), the block Σ_m (P_out δ_m)(P_in x_m)ᵀ. That is what autograd would give
for ∂ℓ/∂G if the branch were computed (Hu et al. 2021; Choe et al., arXiv 2405.13954, section 3). G is a leaf that
requires a gradient, so autograd reaches every branch although all parameters are frozen, and computes no weight
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from indexer.encode.modes import without_autocast
from indexer.encode.tap import restored, save
from indexer.layers import LayerType, Sides


class SideBranch(torch.autograd.Function):
    """``SideBranch.apply(G, saved, use, rows, *outputs) -> outputs``; see the docstring of this module. ``use`` is
    (module, layer type, sides, flipped).

    With ``flipped`` the sides of the block are swapped for this use of it (an lm_head tied to an embedding), and the
    block is transposed before it is returned.
    """

    @staticmethod
    def forward(
        ctx: Any,
        leaf_BKJ: Tensor,
        saved: Any,
        use: tuple[nn.Module, LayerType, Sides, bool],
        rows: Callable[..., Tensor],
        *outputs: Tensor,
    ) -> tuple[Tensor, ...]:
        save(ctx, saved)
        ctx.use, ctx.rows = use, rows
        ctx.set_materialize_grads(False)
        # detach, not a view: the next module may modify y in place (ReLU(inplace=True)), as it may without the branch.
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        some = next((gradient for gradient in gradients if gradient is not None), None)
        if some is None:
            return None, None, None, None, *gradients
        module, layer_type, sides, flipped = ctx.use
        with without_autocast(some.device.type):
            block_BKJ = layer_type.block(module, restored(ctx), ctx.rows(gradients), sides)
        if flipped:
            block_BKJ = block_BKJ.transpose(1, 2)
        return block_BKJ, None, None, None, *gradients
