"""The first batch is held against autograd: what the taps must add up to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from indexer.dotprod.parameters import Ledger


class AutogradDots:
    """⟨gradient, val gradient⟩ of every parameter, by autograd alone: hooks on the parameters for one backward."""

    def __init__(self, expected: dict[str, Tensor]) -> None:
        self._expected = expected
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
            wide = gradient.to(self._expected[name].dtype)
            dot = (wide * self._expected[name]).sum(dtype=torch.float64)
            size = wide.norm().double() * self._expected[name].norm().double()
            self._dots[name] = self._dots[name] + dot if name in self._dots else dot
            self._sums[name] = self._sums[name] + size if name in self._sums else size

        return hook

    def found(self) -> dict[str, tuple[float, float]]:
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
