"""torch.nn.Linear: y = x Wᵀ + b, so ∂ℓ/∂[W|b] = Σ_m δ_m [x_m, 1]ᵀ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from indexer.layers.base import (
    LayerType,
    Sides,
    computes,
    drawn_input,
    flatten_positions,
    has_plain_weight,
    outer_sum,
    project,
    register,
    runs_forward_of,
    summed,
)
from indexer.layers.factors import Factors, Outer, Vector


@register
class LinearLayer(LayerType):
    name = "linear"

    def handles(self, module: nn.Module) -> bool:
        if runs_forward_of(module, nn.Linear):
            return True
        if not isinstance(module, nn.Linear) or not has_plain_weight(module):
            return False
        return computes(module, self, drawn_input(module.weight, module.in_features))

    def axes(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Linear)
        return module.out_features, module.in_features

    def outputs(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        weight: Tensor = module.get_parameter("weight")
        rows = weight.t() if self.transposed else weight
        return [torch.nn.functional.linear(x.to(weight.dtype), rows, module._parameters.get("bias"))]

    def keep(self, module: nn.Module, x: Tensor, sides: Sides, dtype: torch.dtype) -> Tensor:
        return project(flatten_positions(x), sides.in_JI, sides.in_bias_J, dtype)

    def block(self, module: nn.Module, saved: Tensor, dy: Tensor, sides: Sides) -> Tensor:
        return outer_sum(project(flatten_positions(dy), sides.out_KO, None, dy.dtype), saved)

    def factors(self, module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Factors]:
        factors = {"weight": self.outer(flatten_positions(x), flatten_positions(dy))}
        return factors if module._parameters.get("bias") is None else {**factors, "bias": Vector(summed(dy))}

    def outer(self, x_BMI: Tensor, dy_BMO: Tensor) -> Factors:
        """The weight's gradient, as the weight is stored."""
        return Outer(dy_BMO, x_BMI)
