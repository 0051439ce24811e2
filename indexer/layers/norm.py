"""LayerNorm and RMSNorm: y = γ ⊙ x̂ (+ β), so ∂ℓ/∂γ = Σ_m δ_m ⊙ x̂_m and ∂ℓ/∂β = Σ_m δ_m.

The gradient matrix is one column: γ's numbers above β's. The backward pass computes x̂ again from the
layer's own input, which autograd keeps anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from indexer.layers.base import (
    Axis,
    LayerType,
    Sides,
    at_least_float,
    computes,
    drawn_input,
    has_plain_weight,
    project,
    register,
    runs_forward_of,
    summed,
)
from indexer.layers.factors import Factors, Vector

LAYER_NORM_EPSILON = 1e-5
"""Of a class that names none (nanoGPT's)."""


class NormLayer(LayerType):
    """The common base of both norms. A subclass computes x̂ from x."""

    is_matrix = False

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """x̂ in float32 (float64 for a float64 model), shape of ``x``."""
        raise NotImplementedError

    def outputs(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        x_hat, bias = self.normalised(module, x), module._parameters.get("bias")
        weight = module.get_parameter("weight").to(x_hat.dtype)
        return [x_hat * weight + (0.0 if bias is None else bias)]

    def axes(self, module: nn.Module) -> tuple[int, int]:
        width = module.get_parameter("weight").numel()
        return (2 if module._parameters.get("bias") is not None else 1) * width, 1

    def keep(self, module: nn.Module, x: Tensor, sides: Sides, dtype: torch.dtype) -> Tensor:
        return x

    def block(self, module: nn.Module, saved: Tensor, dy: Tensor, sides: Sides) -> Tensor:
        all_factors = self.factors(module, saved, dy).values()
        gradient_BN = torch.cat([factors.values for factors in all_factors if isinstance(factors, Vector)], dim=1)
        block_BK1 = project(gradient_BN.unsqueeze(1), sides.out_KO, None, torch.float32).transpose(1, 2)
        return block_BK1 if isinstance(sides.in_JI, Axis) else block_BK1 * sides.in_JI[:, 0].float()

    def factors(self, module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Factors]:
        dy = at_least_float(dy)
        factors: dict[str, Factors] = {"weight": Vector(summed(dy * self.normalised(module, x)))}
        return factors if module._parameters.get("bias") is None else {**factors, "bias": Vector(summed(dy))}


@register
class LayerNormLayer(NormLayer):
    """torch.nn.LayerNorm, and classes that compute the same with weights γ or 1 + γ (Cohere, Nemotron, nanoGPT)."""

    name = "layernorm"

    def handles(self, module: nn.Module) -> bool:
        return _handles(self, module, nn.LayerNorm)

    def outputs(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        x_hat, bias = self.normalised(module, x), module._parameters.get("bias")
        shift = 0.0 if bias is None else bias
        return [x_hat * weight + shift for weight in _weights(module, x_hat, nn.LayerNorm)]

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        epsilon = _epsilon(module, LAYER_NORM_EPSILON)
        return torch.nn.functional.layer_norm(at_least_float(x), (x.shape[-1],), None, None, epsilon)


@register
class RMSNormLayer(NormLayer):
    """torch.nn.RMSNorm, and classes that compute the same with weights γ or 1 + γ (Llama, T5, Gemma)."""

    name = "rmsnorm"

    def handles(self, module: nn.Module) -> bool:
        return module._parameters.get("bias") is None and _handles(self, module, nn.RMSNorm)

    def outputs(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        x_hat = self.normalised(module, x)
        return [x_hat * weight for weight in _weights(module, x_hat, nn.RMSNorm)]

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        epsilon = _epsilon(module, torch.finfo(x.dtype).eps)  # torch: that of the input's dtype
        return torch.nn.functional.rms_norm(at_least_float(x), (x.shape[-1],), None, epsilon)


def _handles(kind: NormLayer, module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether ``module``, with a vector as weight, is a ``known`` norm or computes what ``kind`` says."""
    if not has_plain_weight(module):
        return False
    weight = module.get_parameter("weight")
    if weight.dim() != 1:
        return False
    return runs_forward_of(module, known) or computes(module, kind, drawn_input(weight, len(weight)))


def _weights(module: nn.Module, x_hat: Tensor, known: type[nn.Module]) -> list[Tensor]:
    """γ, in the dtype of ``x_hat``, and for somebody's own class 1 + γ."""
    weight = module.get_parameter("weight").to(x_hat.dtype)
    return [weight] if runs_forward_of(module, known) else [weight, 1.0 + weight]


def _epsilon(module: nn.Module, otherwise: float) -> float:
    """The module's epsilon; ``otherwise`` if it names none."""
    for attribute in ("variance_epsilon", "eps"):
        value = getattr(module, attribute, None)
        if isinstance(value, (int, float)):
            return float(value)
    return otherwise
