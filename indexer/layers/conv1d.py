"""transformers' Conv1D (GPT-2): a Linear whose weight is stored as (inputs, outputs)."""

from __future__ import annotations

from torch import Tensor, nn

from indexer.layers.base import register, runs_forward_of
from indexer.layers.factors import Factors, Outer
from indexer.layers.linear import LinearLayer


@register
class Conv1DLayer(LinearLayer):
    name = "conv1d"
    transposed = True

    def handles(self, module: nn.Module) -> bool:
        from transformers.pytorch_utils import Conv1D  # here: a search of stored vectors does without

        return runs_forward_of(module, Conv1D)

    def axes(self, module: nn.Module) -> tuple[int, int]:
        n_in, n_out = module.get_parameter("weight").shape
        return n_out, n_in

    def outer(self, x_BMI: Tensor, dy_BMO: Tensor) -> Factors:
        return Outer(x_BMI, dy_BMO)
