"""One pass: the factors of every layer are held until the scores are known; then weight gradients of the chosen alone.

Legend: B samples of a batch, K those that have a weight, M positions, R and C rows and columns of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import CaptureError, LayerError, UsageError
from indexer.dotprod.axes import KnownAxes
from indexer.dotprod.exact import NEGLIGIBLE
from indexer.dotprod.ledger import Ledger, Tapped, survey
from indexer.dotprod.open_batch import OpenBatch
from indexer.dotprod.val_gradient import ValGradient
from indexer.encode.tap import Tap
from indexer.layers.base import at_least_float, by_sample, input_of
from indexer.layers.factors import Factors, Vector


@dataclass(frozen=True, slots=True)
class Weighted:
    """Σ_k factor·share[k] over some samples of a batch."""

    factor: float
    share_K: Tensor | None
    """(K,) float64, at most 1 in size; None: all are 1."""
    places_K: Tensor | None
    """(K,) int64: which samples; None: all."""

    @classmethod
    def of(cls, weights_B: Tensor) -> Weighted | None:
        """None where every weight is 0. The largest is taken out: equal weights are ones then, and cost no rounding in
        a narrow dtype.
        """
        factor = float(weights_B.abs().max())
        if not factor:
            return None
        share_B = weights_B.double() / factor
        places_K = share_B.nonzero().flatten()
        share_K = share_B[places_K]
        every = len(places_K) == len(share_B)
        return cls(factor, None if bool((share_K == 1).all()) else share_K, None if every else places_K)


@dataclass(slots=True)
class HeldFactors:
    """Of one batch: every use of every trainable parameter."""

    uses: dict[str, list[Factors]] = field(default_factory=dict)
    """By parameter."""
    versions: list[tuple[Tensor, int, str]] = field(default_factory=list)
    """(a factor, its version when it was held, the parameter): what is changed in place afterwards is no factor."""

    def add(self, name: str, factors: Factors) -> None:
        """One use of parameter ``name``."""
        self.uses.setdefault(name, []).append(factors)
        parts = [factors.values] if isinstance(factors, Vector) else [factors.rows, factors.columns]
        self.versions += [(part, part._version, name) for part in parts]

    def add_gradient(self, name: str, weighted: Weighted, into: Tensor) -> None:
        """Add the weighted sum of the samples' gradients of one parameter to ``into``."""
        for use in self.uses[name]:
            _add(use if weighted.places_K is None else use.of(weighted.places_K), weighted, into)

    def refuse_changed(self) -> None:
        """UsageError if a factor was changed in place since it was held; to be asked once, right before their use."""
        for part, version, name in self.versions:
            if part._version != version:
                raise UsageError(
                    f"what the gradient of {name!r} is formed of was changed in place after the scoring pass (a batch "
                    "that is filled anew?): give the model a copy of it, or call add_gradients() before"
                )
        self.versions = []  # which would keep every factor to the end


def _add(factors: Factors, weighted: Weighted, into: Tensor) -> None:
    """Of the samples that ``factors`` are of; products in their dtype, as a plain backward pass forms them."""
    share_K, factor = weighted.share_K, weighted.factor
    if isinstance(factors, Vector):
        values = factors.values
        summed = values.sum(0) if share_K is None else share_K.to(values.dtype) @ values
        into.add_(summed.view_as(into).mul_(factor).to(into.dtype))
        return
    rows, columns = factors.rows, factors.columns
    if share_K is not None:
        share_K11 = share_K.to(at_least_float(columns[:0]).dtype).view(-1, 1, 1)
        if factors.is_lookup or columns.shape[-1] <= rows.shape[-1]:
            columns = (columns * share_K11).to(columns.dtype)
        else:
            rows = (rows * share_K11).to(rows.dtype)
    if factors.is_lookup:
        wide = at_least_float(columns.flatten(0, 1)) * factor  # a factor of float16 may be out of its range
        into.index_add_(0, rows.flatten(), wide.to(into.dtype))
    elif columns.dtype == into.dtype == torch.promote_types(into.dtype, torch.float32):
        into.addmm_(rows.flatten(0, 1).t(), columns.flatten(0, 1), alpha=factor)
    else:
        product = at_least_float(rows.flatten(0, 1).t() @ columns.flatten(0, 1))
        into += (product * factor).to(into.dtype)


class FactorHolder:
    """Holds the factors of every trainable parameter of ``model`` in a scoring pass.

    LayerError naming what no layer type handles.
    """

    def __init__(self, model: nn.Module, *, check: bool) -> None:
        try:
            self.ledger: Ledger = survey(model)
        except LayerError as error:
            raise LayerError(
                f"hold=True forms the gradient of every trainable parameter, scored or not: {error}. Without "
                "hold=True, train on the chosen samples in a step of its own"
            ) from error
        self._kinds = {name: tapped.kind for name, tapped in self.ledger.tapped.items()}
        self._axes = KnownAxes(model, self._kinds, trusted=not check)
        self._unchecked = check
        self._handles: list[RemovableHandle] = []
        self._opened: OpenBatch | None = None
        self._held = HeldFactors()

    def attach(self, val: ValGradient) -> None:
        """Put the taps in place, once, and have the axes of the layers examined with the first of the val samples."""
        if self._handles:
            return
        self._axes.attach()
        for name, tapped in self.ledger.tapped.items():
            hook = self._hook(name, tapped)
            self._handles.append(tapped.module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        val.examine(self._axes)

    def detach(self) -> None:
        """Take the taps away."""
        self._axes.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin(self, opened: OpenBatch) -> None:
        """A scoring pass is open."""
        self._opened, self._held = opened, HeldFactors()
        self._axes.begin_train()

    def end(self) -> None:
        """It is closed: what was held of it is with whoever took it."""
        self._opened, self._held = None, HeldFactors()
        self._axes.end_train()

    def awaiting_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters whose gradient the open batch is held against; none once that is done."""
        return {name: scored.parameter for name, scored in self.ledger.parameters.items()} if self._unchecked else {}

    def take(self, expected: Mapping[str, Tensor | None], tolerance: float) -> HeldFactors:
        """The factors of the open batch, after its backward pass. ``expected`` are autograd's gradients of the
        :meth:`awaiting_parameters`.

        CaptureError where a layer does not follow the samples, or where the gradients are not autograd's.
        """
        assert self._opened is not None
        self._axes.check_train(self._opened.size)
        sizes = [gradient.norm().double() for gradient in expected.values() if gradient is not None]
        whole = float(torch.stack(sizes).norm()) if sizes else 0.0
        if whole and isfinite(whole):  # else it says nothing: no targets, or out of float16's range
            for name, gradient in expected.items():
                self._check(name, gradient, whole, tolerance)
            self._unchecked = False
        return self._held

    def _check(self, name: str, gradient: Tensor | None, whole: float, tolerance: float) -> None:
        parameter = self.ledger.parameters[name].parameter
        formed = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        if name in self._held.uses:
            self._held.add_gradient(name, Weighted(1.0, None, None), formed)
        expected = torch.zeros_like(formed) if gradient is None else gradient.to_dense().to(formed.dtype)
        error, size = float((formed - expected).norm()), float(expected.norm())
        if not error <= tolerance * (size + NEGLIGIBLE * whole):
            raise CaptureError(
                f"parameter {name!r}: the gradient that is formed from what was held differs from autograd's by "
                f"{error / size if size else float('inf'):.2g} of its size. It is used where no tap sees it (a "
                "functional call on the weight, a module that was replaced after attaching), or a hook of the "
                "parameter changes its gradient. Without hold=True, train on the chosen samples in a step of its own"
            )

    def _hook(self, name: str, tapped: Tapped) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor | None:
            opened = self._opened
            if opened is None:
                return None
            if not torch.is_grad_enabled():
                if not opened.forwarded:
                    opened.without_graph.append(name)
                return None
            if not y.requires_grad:
                return None
            x, y = by_sample(input_of(args, kwargs), y, opened.size, tapped.kind, name)
            x = x.detach()
            if x.is_floating_point() and tapped.kind.is_matrix:
                x = x.to(y.dtype)
            self._axes.ran(name)
            see = partial(self._see, self._held, tapped)
            output: Tensor = Tap.apply(y, x, see, opened.leaf)  # type: ignore[no-untyped-call]
            return output

        return hook

    def _see(self, held: HeldFactors, tapped: Tapped, saved: Tensor, dy: Tensor) -> None:
        if held is self._held:  # else the batch is closed
            factors = tapped.kind.factors(tapped.module, saved, dy)
            for key, full in tapped.parameters.items():
                held.add(full, factors[key])
