"""Keeps each layer's factors until the scores are known, to form weight gradients of the chosen samples alone.

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
from indexer.encode.flat_rows import FlatRows
from indexer.encode.tap import tapped
from indexer.encode.uses import CallWindows, refuse_hidden
from indexer.layers.base import at_least_float
from indexer.layers.factors import Factors, Vector, add_rows


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
        """None if every weight is 0.

        The largest weight is the factor, so equal weights have shares of exactly 1: no narrow dtype rounds them.
        """
        factor = float(weights_B.abs().max())
        if not factor:
            return None
        share_B = weights_B.double() / factor
        places_K = share_B.nonzero().flatten()
        share_K = share_B[places_K]
        has_all = len(places_K) == len(share_B)
        return cls(factor, None if bool((share_K == 1).all()) else share_K, None if has_all else places_K)


@dataclass(slots=True)
class HeldFactors:
    """The factors of one batch, for every use of every trainable parameter."""

    uses: dict[str, list[Factors]] = field(default_factory=dict)
    """By parameter."""
    versions: list[tuple[Tensor, int, str]] = field(default_factory=list)
    """(factor, its version when it was kept, parameter): a factor that was changed in place later is of no use."""

    def add(self, name: str, factors: Factors) -> None:
        """Keep the factors of one use of parameter ``name``."""
        self.uses.setdefault(name, []).append(factors)
        parts = [factors.values] if isinstance(factors, Vector) else [factors.rows, factors.columns]
        self.versions += [(part, part._version, name) for part in parts]

    def add_gradient(self, name: str, weighted: Weighted, into: Tensor) -> None:
        """Add the weighted sum of the samples' gradients of one parameter to ``into``."""
        for use in self.uses[name]:
            _add(use if weighted.places_K is None else use.of(weighted.places_K), weighted, into)

    def refuse_changed(self) -> None:
        """UsageError if a factor was changed in place since it was kept. Call it once, right before using them."""
        for part, version, name in self.versions:
            if part._version != version:
                raise UsageError(
                    f"what the gradient of {name!r} is formed of was changed in place after the scoring pass (a batch "
                    "that is filled anew?): give the model a copy of it, or call add_gradients() before"
                )
        self.versions = []  # its references would keep every factor alive


def _add(factors: Factors, weighted: Weighted, into: Tensor) -> None:
    """Add the weighted sum of the samples of ``factors``. Products are in their dtype, as in a plain backward pass."""
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
        wide = at_least_float(columns.flatten(0, 1)) * factor  # in float16 the product may overflow
        add_rows(into, rows.flatten(), wide.to(into.dtype))
    elif columns.dtype == into.dtype == torch.promote_types(into.dtype, torch.float32):
        into.addmm_(rows.flatten(0, 1).t(), columns.flatten(0, 1), alpha=factor)
    else:
        product = at_least_float(rows.flatten(0, 1).t() @ columns.flatten(0, 1))
        into += (product * factor).to(into.dtype)


class FactorHolder:
    """Keeps the factors of every trainable parameter of ``model`` in a scoring pass.

    LayerError naming a parameter that no layer type handles.
    """

    def __init__(self, model: nn.Module, *, check: bool) -> None:
        try:
            self.ledger: Ledger = survey(model)
        except LayerError as error:
            raise LayerError(
                f"`hold=True` forms the gradient of every trainable parameter, scored or not: {error}. Without "
                "`hold=True`, train on the chosen samples in a step of its own"
            ) from error
        self._kinds = {name: tapped.kind for name, tapped in self.ledger.tapped.items()}
        self._axes = KnownAxes(model, self._kinds, trusted=not check)
        self._unchecked = check
        self._flat_rows = FlatRows()
        self._windows = CallWindows(model, self.ledger.by_module) if check else None
        self._hidden: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._open_batch: OpenBatch | None = None
        self._held = HeldFactors()

    def attach(self, val: ValGradient) -> None:
        """Put the taps in place, once, and check the axes of the layers with the first val batch."""
        if self._handles:
            return
        self._axes.attach()
        if self._windows is not None:
            self._handles += self._windows.attach()
        for name, layer in self.ledger.tapped.items():
            hook = self._hook(name, layer)
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        val.examine(self._axes)

    def detach(self) -> None:
        """Remove the taps."""
        self._axes.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin(self, open_batch: OpenBatch) -> None:
        """Begin a scoring pass."""
        self._open_batch, self._held = open_batch, HeldFactors()
        self._flat_rows.begin()
        self._axes.begin_train()
        self._hidden = []
        if self._windows is not None:
            self._windows.begin()

    def look_for_hidden(self, total: Tensor) -> None:
        """Note the parameters that the loss ``total`` uses where no tap sees it; :meth:`take` refuses them."""
        if self._windows is not None:
            self._hidden = self._windows.hidden(total)

    def end(self) -> None:
        """End the scoring pass. The caller of :meth:`take` has its factors."""
        self._open_batch, self._held = None, HeldFactors()
        self._axes.end_train()

    def awaiting_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters whose gradient is compared with autograd's; none once that is done."""
        return {name: scored.parameter for name, scored in self.ledger.parameters.items()} if self._unchecked else {}

    def take(self, expected: Mapping[str, Tensor | None], tolerance: float) -> HeldFactors:
        """Return the factors of the open batch, after its backward pass.

        ``expected``: autograd's gradients of the :meth:`awaiting_parameters`. CaptureError if a layer does not follow
        the samples, or if the gradients differ from autograd's.
        """
        assert self._open_batch is not None
        self._axes.check_train(self._open_batch)
        self._flat_rows.check()
        sizes = [gradient.norm().double() for gradient in expected.values() if gradient is not None]
        total_norm = float(torch.stack(sizes).norm()) if sizes else 0.0
        if total_norm and isfinite(total_norm):  # else the batch shows nothing: no targets, or an overflow in float16
            for name, gradient in expected.items():
                self._check(name, gradient, total_norm, tolerance)
            self._unchecked = False
        refuse_hidden(self._hidden)
        return self._held

    def _check(self, name: str, gradient: Tensor | None, total_norm: float, tolerance: float) -> None:
        parameter = self.ledger.parameters[name].parameter
        formed = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        if name in self._held.uses:
            self._held.add_gradient(name, Weighted(1.0, None, None), formed)
        expected = torch.zeros_like(formed) if gradient is None else gradient.to_dense().to(formed.dtype)
        error, size = float((formed - expected).norm()), float(expected.norm())
        if not error <= tolerance * (size + NEGLIGIBLE * total_norm):
            raise CaptureError(
                f"parameter {name!r}: the gradient that is formed from what was held differs from autograd's by "
                f"{error / size if size else float('inf'):.2g} of its size. It is used where no tap sees it (a "
                "functional call on the weight, a module that was replaced after attaching), or a hook of the "
                "parameter changes its gradient. Without `hold=True`, train on the chosen samples in a step of its own"
            )

    def _hook(self, name: str, layer: Tapped) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> Any:
            open_batch = self._open_batch
            if open_batch is None:
                return None
            if not torch.is_grad_enabled():
                if not open_batch.forwarded:
                    open_batch.without_graph.append(name)
                return None
            seen = layer.kind.seen(module, args, kwargs, y, open_batch.size, name)
            if not seen.requires_grad:
                return None
            self._axes.ran(name)
            self._flat_rows.saw(name, seen, open_batch.size)
            see = partial(self._see, self._held, layer)
            x = layer.kind.held(seen.x, seen.dtype)
            output = seen.back(tapped(seen, x, see, open_batch.leaf).outputs)
            if self._windows is not None:
                self._windows.ended(name)
            return output

        return hook

    def _see(self, held: HeldFactors, tapped: Tapped, saved: Any, dy: Tensor) -> None:
        if held is self._held:  # otherwise the batch is closed
            factors = tapped.kind.factors(tapped.module, saved, dy)
            for key, full in tapped.parameters.items():
                held.add(full, factors[key])
