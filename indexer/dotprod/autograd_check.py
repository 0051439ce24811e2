"""What autograd says of the first batch: the sums that the taps must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import CaptureError
from indexer.dotprod.ledger import Ledger
from indexer.encode.plain import BlockGradients
from indexer.projection.matrices import Projection

FAINT = 1e-2
"""A block whose gradient is a smaller share of the whole may be rounding noise (that of a key's bias is zero)."""


class AutogradDots:
    """⟨gradient, val gradient⟩ of every parameter by autograd: hooks on the parameters for one backward pass."""

    def __init__(self, expected: dict[str, Tensor]) -> None:
        self.expected = expected
        """The val gradient of each parameter, in the metric of the score."""
        self._dots: dict[str, Tensor] = {}
        self._norm_products: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, ledger: Ledger) -> None:
        """Put hooks on the parameters, before the forward pass of a batch."""
        self.detach()
        self._dots, self._norm_products = {}, {}
        for name, scored in ledger.parameters.items():
            self._handles.append(scored.parameter.register_hook(self._hook(name)))  # type: ignore[no-untyped-call]

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            gradient = (gradient.to_dense() if gradient.is_sparse else gradient).detach()
            wide = gradient.to(self.expected[name].dtype)
            dot = (wide * self.expected[name]).sum(dtype=torch.float64)
            product = wide.norm().double() * self.expected[name].norm().double()
            self._dots[name] = self._dots[name] + dot if name in self._dots else dot
            self._norm_products[name] = self._norm_products[name] + product if name in self._norm_products else product

        return hook

    def dots(self) -> dict[str, tuple[float, float]]:
        """(dot, product of the norms), by the parameters that received a gradient."""
        return {name: (float(dot), float(self._norm_products[name])) for name, dot in self._dots.items()}

    def is_informative(self) -> bool:
        """Whether the gradients are finite and not all zero: a batch may lack targets, float16 may overflow."""
        products = torch.stack(list(self._norm_products.values())) if self._norm_products else torch.zeros(1)
        return bool(torch.isfinite(products).all()) and bool((products > 0).any())

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class AutogradBlocks:
    """The projected blocks of a batch's gradient by autograd: hooks on the parameters for one backward pass."""

    def __init__(self, model: nn.Module, projection: Projection) -> None:
        self._parameters = dict(model.named_parameters())
        self._blocks = [
            layer.block
            for layer in projection.plan.layers
            if all(self._parameters[name].requires_grad for name in layer.block.parameters)
        ]
        """Frozen blocks are left out: autograd gives no gradient of them."""
        self._projection = projection
        self._gradients = BlockGradients(projection, self._blocks)
        self._handles: list[RemovableHandle] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that have hooks."""
        return [self._parameters[name] for name in self._gradients.owners()]

    def attach(self) -> None:
        """Put hooks on the parameters, before the forward pass of a batch."""
        self.detach()
        self._gradients = BlockGradients(self._projection, self._blocks)
        for name, block in self._gradients.owners().items():

            def hook(gradient: Tensor, name: str = name, block: Any = block) -> None:
                self._gradients.arrived(block, name, gradient)

            self._handles.append(self._parameters[name].register_hook(hook))  # type: ignore[no-untyped-call]

    def agree(self, blocks: dict[str, Tensor], tolerance: float) -> bool:
        """Compare the sums over samples of ``blocks`` (B, K, J) with autograd's.

        False if the gradient is zero or not finite: such a batch shows nothing. CaptureError naming every layer that
        differs.
        """
        expected = self._gradients.finished(self._parameters)
        whole = torch.stack([block.norm() for block in expected.values()]).norm() if expected else torch.zeros(())
        if not bool(torch.isfinite(whole)) or (expected and not bool(whole)):
            return False
        wrong = {}
        for name, block in expected.items():
            error = float((blocks[name].sum(0) - block).norm() / torch.maximum(block.norm(), FAINT * whole))
            if not error <= tolerance:
                wrong[name] = error
        if wrong:
            listed = ", ".join(f"{name} ({error:.2g})" for name, error in list(wrong.items())[:8])
            raise CaptureError(
                f"the projected gradients of {len(wrong)} layer(s) differ from autograd's: {listed}. A weight is used "
                "where no tap sees it (a functional call on it, a module that was replaced after attaching), a hook "
                "of the parameter changes its gradient, or a second term went backward beside the watched loss (a "
                "penalty on the weights: leave that to the optimizer's weight_decay). Leave the layer out with "
                "`exclude_layers`; `check=False` trusts the taps"
            )
        return True

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
