"""The first batch is held against autograd: what the taps must add up to."""

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
"""Share of the whole below which a block's own gradient may be rounding noise (a key's bias: exactly zero)."""


class AutogradDots:
    """⟨gradient, val gradient⟩ of every parameter, by autograd alone: hooks on the parameters for one backward."""

    def __init__(self, expected: dict[str, Tensor]) -> None:
        self.expected = expected
        """The val gradient of each parameter, in the metric of the score."""
        self._dots: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, ledger: Ledger) -> None:
        self.detach()
        self._dots, self._sums = {}, {}
        for name, scored in ledger.parameters.items():
            self._handles.append(scored.parameter.register_hook(self._hook(name)))  # type: ignore[no-untyped-call]

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            gradient = (gradient.to_dense() if gradient.is_sparse else gradient).detach()
            wide = gradient.to(self.expected[name].dtype)
            dot = (wide * self.expected[name]).sum(dtype=torch.float64)
            size = wide.norm().double() * self.expected[name].norm().double()
            self._dots[name] = self._dots[name] + dot if name in self._dots else dot
            self._sums[name] = self._sums[name] + size if name in self._sums else size

        return hook

    def dots(self) -> dict[str, tuple[float, float]]:
        """(dot, product of the norms) by parameter that got a gradient."""
        return {name: (float(dot), float(self._sums[name])) for name, dot in self._dots.items()}

    def says_something(self) -> bool:
        """Whether a gradient came that is not all zero (a batch without targets) nor out of range (float16)."""
        sizes = torch.stack(list(self._sums.values())) if self._sums else torch.zeros(1)
        return bool(torch.isfinite(sizes).all()) and bool((sizes > 0).any())

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class AutogradBlocks:
    """The blocks of a whole batch's gradient, by autograd alone: hooks on the parameters for one backward pass."""

    def __init__(self, model: nn.Module, projection: Projection) -> None:
        self._parameters = dict(model.named_parameters())
        self._blocks = [
            layer.block
            for layer in projection.plan.layers
            if all(self._parameters[name].requires_grad for name in layer.block.parameters)
        ]
        """Autograd has nothing to say of what is frozen."""
        self._projection = projection
        self._gradients = BlockGradients(projection, self._blocks)
        self._handles: list[RemovableHandle] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those whose gradients it waits for."""
        return [self._parameters[name] for name in self._gradients.owners()]

    def attach(self) -> None:
        """Before the forward pass of a batch."""
        self.detach()
        self._gradients = BlockGradients(self._projection, self._blocks)
        for name, block in self._gradients.owners().items():

            def hook(gradient: Tensor, name: str = name, block: Any = block) -> None:
                self._gradients.arrived(block, name, gradient)

            self._handles.append(self._parameters[name].register_hook(hook))  # type: ignore[no-untyped-call]

    def agree(self, blocks: dict[str, Tensor], tolerance: float) -> bool:
        """Whether the sums over samples of ``blocks`` (B, K, J) are autograd's; False where the gradient is zero or not
        finite, and says nothing. CaptureError naming every layer that differs.
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
            shown = ", ".join(f"{name} ({error:.2g})" for name, error in list(wrong.items())[:8])
            raise CaptureError(
                f"the projected gradients of {len(wrong)} layer(s) differ from autograd's: {shown}. A weight is used "
                "where no tap sees it (a functional call on it, a module that was replaced after attaching), a hook "
                "of the parameter changes its gradient, or a second term went backward beside the watched loss (a "
                "penalty on the weights: leave that to the optimizer's weight_decay). Leave the layer out with "
                "exclude_layers; check=False trusts the taps"
            )
        return True

    def detach(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
