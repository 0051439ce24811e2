"""LayerNorm and RMSNorm: y = γ ⊙ x̂ (+ β), so ∂ℓ/∂γ = Σ_m δ_m ⊙ x̂_m and ∂ℓ/∂β = Σ_m δ_m.

The gradient matrix is one column: γ's numbers above β's. The backward pass computes x̂ again from the
layer's own input, which autograd keeps anyway.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from ghoststore.errors import LayerError
from indexer.layers.base import Axis, LayerType, Sides, at_least_float, project, register, runs_forward_of, summed
from indexer.layers.factors import Factors, Vector


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
    name = "layernorm"

    def handles(self, module: nn.Module) -> bool:
        return runs_forward_of(module, nn.LayerNorm)

    def check(self, module: nn.Module, name: str) -> None:
        assert isinstance(module, nn.LayerNorm)
        if len(module.normalized_shape) != 1:
            raise LayerError(f"layer {name!r} normalises over {len(module.normalized_shape)} axes; one is supported")

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.LayerNorm)
        return torch.nn.functional.layer_norm(at_least_float(x), module.normalized_shape, None, None, module.eps)


@register
class RMSNormLayer(NormLayer):
    """torch.nn.RMSNorm and the RMSNorm classes of transformers, recognised by name.

    :meth:`check` compares a class with the formula before it is used.
    """

    name = "rmsnorm"

    def handles(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        has_name = type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
        return has_name and isinstance(weight, nn.Parameter) and weight.dim() == 1

    def outputs(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        x_hat = self.normalised(module, x)
        weight = module.get_parameter("weight").to(x_hat.dtype)
        return [x_hat * weight, x_hat * (1.0 + weight)]

    @staticmethod
    def epsilon(module: nn.Module) -> float | None:
        """The module's epsilon; None if it is the machine epsilon of the input's dtype (torch)."""
        for attribute in ("variance_epsilon", "eps"):
            if hasattr(module, attribute):
                value = getattr(module, attribute)
                return None if value is None else float(value)
        return None

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        epsilon = self.epsilon(module)
        epsilon = torch.finfo(x.dtype).eps if epsilon is None else epsilon
        return torch.nn.functional.rms_norm(at_least_float(x), (x.shape[-1],), None, epsilon)

    def check(self, module: nn.Module, name: str) -> None:
        """Run the module on a small input: it must compute γ ⊙ x̂ or (1 + γ) ⊙ x̂."""
        # A copy with random weights: at 1 (or 0) other formulas agree by chance.
        module = deepcopy(module)
        weight = module.get_parameter("weight")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
        x = torch.randn(2, weight.numel(), generator=generator).to(weight.device, weight.dtype)
        with torch.no_grad():
            try:
                y = module(x).float()
            except (TypeError, ValueError, RuntimeError) as error:
                raise LayerError(f"layer {name!r} ({type(module).__name__}) is not an RMSNorm: {error}") from error
            scale = weight.float()
            x_hat = self.normalised(module, x).float()
            tolerance = 5e-2 if weight.dtype in (torch.float16, torch.bfloat16) else 1e-4
            plain, shifted = x_hat * scale, x_hat * (1.0 + scale)
            if not any(torch.allclose(y, expected, rtol=tolerance, atol=tolerance) for expected in (plain, shifted)):
                raise LayerError(
                    f"layer {name!r} ({type(module).__name__}) does not compute weight * x / rms(x): "
                    "its gradient formula is not known; exclude it with `exclude_layers`"
                )
