"""Check by gradients that the first axis of a layer is that of the samples. Its length alone proves nothing.

A gradient for each sample exists only if the rows of a layer's output belong to the samples of the batch:
∂ℓ_i/∂y[b] = 0 for i ≠ b. A layer may also see (positions, samples, width), a table (positions, positions), or tokens
that a router picked, and the first axis may still have the length of the batch by chance.

The check reweights the losses: row b of the gradient of Σ_i w_i ℓ_i must be w_b times row b of that of Σ_i ℓ_i. Weights
are powers of two, so a correct row scales without rounding; a wrong one differs by Σ_{i≠b} (w_i - w_b) ∂ℓ_i/∂y[b].

Legend: B samples, M positions of one sample, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError
from indexer.encode.modes import devices_of, reseed
from indexer.encode.tap import tapped
from indexer.layers import LayerType
from indexer.layers.base import Seen

SKETCH = 4
"""Number of random sums that represent a row. Rows that differ have equal sums with probability zero."""
PROBE_SIZES = (2, 3)
"""Sizes of the batches of a probe. An axis that is not that of the samples cannot have both lengths."""
TOLERANCE, NARROW_TOLERANCE, HALF_TOLERANCE = 1e-3, 0.05, 0.3
"""Largest share of a row that may come from other samples: in float32; in 16 bits, because a GPU may round sums in
another order the second time; in float16, where small numbers lose their last bits.
"""
LEAST_TOLERANCE, ROUNDING = 1e-2, 4.0
"""In 16 bits the tolerance is lowered to ROUNDING times the change of rows when all weights are equal, but not below
LEAST_TOLERANCE.
"""
COMPANY_TOLERANCE, NARROW_COMPANY_TOLERANCE = 1e-2, 0.2
"""Largest relative difference of a sample with other batch mates that can be the rounding of kernels that a GPU chooses
by the size of the batch: in float32 (TF32), and with 16-bit numbers. Mixing samples causes larger differences.
"""
HALF_SCALE = 4096.0
"""Factor of the loss before float16 gradients are computed, lowered if they overflow."""
FAINT = 1e-6
"""Rows with a smaller share of the largest row are compared relative to that share."""

_REACHES = "the loss of one sample reaches the rows of others"


class Witness:
    """Records the gradients at the outputs of layers in two backward passes, and tells which layers mix samples.

    ::

        witness = Witness(device)
        seen = witness.tap("layer", seen)  # in the forward pass, at each call of each layer
        witness.run(losses_B)
        witness.problems()
    """

    def __init__(self, device: torch.device) -> None:
        self.leaf = torch.zeros((), device=device, requires_grad=True)
        """A leaf that makes autograd reach the taps even if all parameters are frozen."""
        self._names: list[str] = []
        self._seen: list[dict[int, Tensor]] = []
        self._weights = torch.ones(0)
        self._dtypes: set[torch.dtype] = set()

    def tap(self, name: str, seen: Seen) -> Seen:
        """``seen`` with a tap on its outputs, whose first axis should be that of the samples."""
        self._names.append(name)
        self._dtypes.add(seen.dtype)
        return tapped(seen, seen.outputs[0].new_empty(0), partial(self._see, len(self._names) - 1), self.leaf)

    def _see(self, place: int, saved: Tensor, dy: Tensor) -> None:
        if self._seen:  # ignore backward passes of the caller before plain()
            self._seen[-1][place] = row_sums(dy)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Record the backward pass of Σ ℓ_i, which must run in the ``with`` block."""
        self._seen = [{}]
        yield

    def weighted(self, losses_B: Tensor, sources: Sequence[Tensor], scale: float = 1.0) -> None:
        """Run and record the backward pass of ``scale`` · Σ w_i ℓ_i, after :meth:`plain`. The graph is freed.

        In 16 bits a pass of w Σ ℓ_i runs before it, with the smallest weight w, to measure the effect of rounding.
        """
        self._weights = sample_weights(len(losses_B), 4 if self.half else 8).to(losses_B.device)
        even = [torch.full_like(self._weights, float(self._weights.min()))] if self.narrow else []
        for weights in (*even, self._weights):
            self._seen.append({})
            torch.autograd.grad(
                losses_B,
                sources,
                grad_outputs=(weights * scale).to(losses_B.dtype),
                retain_graph=weights is not self._weights,
                allow_unused=True,
            )

    def run(self, losses_B: Tensor) -> None:
        """Run both backward passes for the taps only, without gradients of parameters."""
        scale = HALF_SCALE if self.half else 1.0
        while True:
            with self.plain():
                ones = torch.full_like(losses_B, scale)
                torch.autograd.grad(losses_B, [self.leaf], grad_outputs=ones, retain_graph=True, allow_unused=True)
            if self.finite or scale <= 1.0:
                break
            scale /= 16
        self.weighted(losses_B, [self.leaf], scale)

    @property
    def narrow(self) -> bool:
        """Whether some layers compute in 16 bits."""
        return self.half or torch.bfloat16 in self._dtypes

    @property
    def half(self) -> bool:
        """Whether some layers compute in float16."""
        return torch.float16 in self._dtypes

    @property
    def seen(self) -> set[str]:
        """Names of the layers that got a gradient other than zero. A zero gradient proves nothing."""
        return {self._names[place] for place, rows in self._seen[0].items() if bool(rows.any())}

    @property
    def finite(self) -> bool:
        """Whether all recorded gradients are finite. If not, the check proves nothing."""
        return all(bool(rows.isfinite().all()) for seen in self._seen for rows in seen.values())

    def problems(self) -> dict[str, str]:
        """For each layer in which one sample's loss reaches the rows of another, a phrase that says so."""
        return {name: f"{_REACHES} ({share:.2g} of a row)" for name, share in self.mixed().items()}

    def mixed(self) -> dict[str, float]:
        """For each layer in which one sample's loss reaches the rows of another, the largest share of a row that is not
        the sample's own.
        """
        most = NARROW_TOLERANCE if torch.bfloat16 in self._dtypes else TOLERANCE
        most = HALF_TOLERANCE if self.half else most
        shares: dict[str, float] = {}
        plain, *even, weighted = self._seen
        for place, plain_BS in plain.items():
            name = self._names[place]
            tolerance = most
            for rows in even:
                rounding = _foreign_share(plain_BS, rows[place], self._weights.min().expand_as(self._weights))
                tolerance = min(most, max(LEAST_TOLERANCE, ROUNDING * rounding))
            error = _foreign_share(plain_BS, weighted[place], self._weights)
            if error > tolerance:
                shares[name] = max(error, shares.get(name, 0.0))
        return shares


def mixed_blocks(
    names: Sequence[str], losses_B: Tensor, leaves: Sequence[Tensor], blocks: Sequence[Tensor | None]
) -> dict[str, str]:
    """As :meth:`Witness.problems`, from the ``blocks`` (B, K, J) that the losses gave at ``leaves``: reweighted losses
    go backward once more. The graph is freed; ``names`` are those of the first leaves.
    """
    weights_B = sample_weights(len(losses_B), 8).to(losses_B.device)
    again = torch.autograd.grad(losses_B, leaves, weights_B.to(losses_B.dtype), allow_unused=True)
    problems = {}
    for name, plain, weighted in zip(names, blocks, again, strict=False):
        if plain is None or weighted is None or not bool(plain.isfinite().all()):
            continue
        share = _foreign_share(plain.flatten(1), weighted.flatten(1), weights_B)
        if share > NARROW_TOLERANCE:
            problems[name] = f"{_REACHES} ({share:.2g} of a row)"
    return problems


def _foreign_share(plain_BS: Tensor, weighted_BS: Tensor, weights_B: Tensor) -> float:
    plain_BS, scaled_BS = plain_BS.double(), weighted_BS.double() / weights_B.double().unsqueeze(1)
    error_B = (scaled_BS - plain_BS).norm(dim=1)
    size_B = torch.maximum(plain_BS.norm(dim=1), scaled_BS.norm(dim=1))
    largest = float(size_B.max())
    return 0.0 if largest == 0.0 else float((error_B / (size_B + FAINT * largest)).max())


def _same(measured_B: Tensor, expected_B: Tensor) -> bool:
    narrow = measured_B.dtype in (torch.float16, torch.bfloat16)
    tolerance = NARROW_TOLERANCE if narrow else TOLERANCE
    measured_B, expected_B = measured_B.detach().double(), expected_B.double()
    return torch.allclose(measured_B, expected_B, rtol=tolerance, atol=tolerance * 1e-3, equal_nan=True)


def row_sums(x: Tensor) -> Tensor:
    """(B, SKETCH): random sums of the rows of ``x`` (B, …). Rows of the same shape are summed with the same weights."""
    places_BMS = place_sums(x)
    left_MS = torch.randn(places_BMS.shape[1:], generator=torch.Generator().manual_seed(places_BMS.shape[1]))
    return (places_BMS * left_MS.to(x.device, places_BMS.dtype)).sum(1)


def place_sums(x: Tensor) -> Tensor:
    """(B, M, SKETCH), float32 or wider: random sums of the numbers at each position of ``x`` (B, …, O)."""
    x_BMO = x.reshape(x.shape[0], -1, x.shape[-1]) if x.dim() > 1 else x.reshape(-1, 1, 1)
    right_OS = torch.randn(x_BMO.shape[2], SKETCH, generator=torch.Generator().manual_seed(-1 - x_BMO.shape[2]))
    if not x.is_floating_point():
        return x_BMO.double() @ right_OS.to(x.device, torch.float64)
    if x.dtype != torch.float16:
        sums_BMS = x_BMO @ right_OS.to(x.device, x.dtype)
        return sums_BMS.to(torch.promote_types(x.dtype, torch.float32))
    right_OS = right_OS.to(x.device)  # sums overflow in float16; sample by sample, not to copy all logits
    return torch.cat([sample_MO.float() @ right_OS for sample_MO in torch.split(x_BMO, 1)])


def sample_weights(count: int, classes: int) -> Tensor:
    """(count,): powers of two in a random order, with ``classes`` different values; all differ if ``count`` ≤
    ``classes``.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    exponents = torch.arange(count) % classes - min(count, classes) // 2
    return torch.ldexp(torch.ones(count), exponents[order])


class AxisProbe:
    """Runs small batches and checks which layers have the samples as their first axis.

    ``kinds`` are the types of the layers by name. All passes add to :attr:`problems`, so that one error names them all.
    """

    def __init__(self, model: nn.Module, kinds: Mapping[str, LayerType]) -> None:
        self.model = model
        self.problems: dict[str, str] = {}
        """For each layer with a problem a phrase that says what is wrong."""
        self.seen: set[str] = set()
        """Names of the layers that a loss depends on."""
        self._kinds = kinds
        self._losses_B = torch.zeros(0)
        self._expanded: set[str] = set()
        """The layers whose output for an index of positions, which has no axis of samples, was expanded to one row a
        sample.
        """

    def run(self, losses: Callable[[], Tensor], batch: int, *, more_of_the_same: bool = False) -> bool:
        """Check one batch. ``losses()`` runs the model on ``batch`` samples and returns the loss of each, (batch,).

        Returns False if the batch proves nothing: the losses have another shape, gradients are not finite, or the model
        is compiled and its graph allows only one backward pass. With ``more_of_the_same`` the batch begins with the
        samples of the last one, or that one with these; their losses must be the same, up to a common factor. The mode
        of the model is up to the caller. CaptureError if the taps change what the model computes, or if losses depend
        on batch mates.
        """
        unwatched_B = self._unwatched(losses, seed=1)
        self._expanded = set()
        witness = Witness(next(self.model.parameters()).device)
        problems: dict[str, str] = {}
        with torch.enable_grad(), self._same_numbers(), self._watched(witness, batch, problems):
            try:
                losses_B = losses()
            except (RuntimeError, ValueError, IndexError) as error:  # it ran without the taps
                if self._expanded:
                    raise no_positions(self._expanded, error) from error
                return False
        if losses_B.shape != (batch,):
            return False  # the function may use samples of its own, and not the batch
        self.problems |= problems
        same = _same(losses_B, unwatched_B)  # if not, the forward pass is random, or has a state
        if self._expanded and not same and not _same(losses_B, self._unwatched(losses)):
            raise no_positions(self._expanded, "the losses are others")
        if not losses_B.requires_grad:
            return True
        if more_of_the_same and same:
            self._refuse_company(unwatched_B, NARROW_COMPANY_TOLERANCE if witness.narrow else COMPANY_TOLERANCE)
        self._losses_B = unwatched_B
        try:
            with self._watched(witness, batch, {}):  # gradient checkpointing runs the layers again
                witness.run(losses_B)
        except RuntimeError as error:
            if "donated buffer" in str(error):
                return False
            raise
        if not witness.finite:
            return False
        self.seen |= witness.seen
        self.problems.update(witness.problems())
        return True

    def _unwatched(self, losses: Callable[[], Tensor], seed: int | None = None) -> Tensor:
        """(B,): the losses without taps and without a graph. A ``seed`` changes the random numbers."""
        with torch.no_grad(), self._same_numbers():
            if seed is not None:
                reseed(seed, devices_of(self.model))
            return losses()

    def _same_numbers(self) -> AbstractContextManager[None]:
        """A block with the caller's random state, which is restored at the end: each pass draws the same numbers."""
        return torch.random.fork_rng(devices=devices_of(self.model))

    def _refuse_company(self, losses_B: Tensor, tolerance: float) -> None:
        """CaptureError if samples of the last batch have other losses in this one.

        A common factor is allowed, because all losses may be divided by a number that depends on the batch.
        """
        count = min(len(self._losses_B), len(losses_B))
        if count < 2:
            return
        now_B, before_B = losses_B[:count].detach().double(), self._losses_B[:count].double()
        if not bool((now_B + before_B).isfinite().all()):
            return  # the val pass raises the error, with the name of the sample
        factor = float(now_B @ before_B) / max(float(before_B @ before_B), 1e-300)
        if not torch.allclose(now_B, before_B * factor, rtol=tolerance, atol=tolerance * 1e-3):
            raise CaptureError(
                "the loss of a sample changes with its batch mates: something mixes the samples of a batch (a "
                "statistic over it, routing with a capacity, or val_losses themselves), so no sample has a gradient of "
                "its own. Leave it out of the model (an eval mode, a router without capacity)"
            )

    @contextmanager
    def _watched(self, witness: Witness, batch: int, problems: dict[str, str]) -> Iterator[None]:
        """Taps of ``witness`` on every layer. What is wrong with a layer's input or output is added to ``problems``."""
        handles = [
            self.model.get_submodule(name).register_forward_hook(
                self._hook(witness, name, kind, batch, problems), with_kwargs=True, prepend=True
            )
            for name, kind in self._kinds.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(
        self, witness: Witness, name: str, kind: LayerType, batch: int, problems: dict[str, str]
    ) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> Any:
            problem = kind.axis_problem(args, kwargs, y, batch) or kind.output_problem(module, args, kwargs, y)
            if problem is not None:
                problems[name] = problem
                return None
            seen = kind.seen(module, args, kwargs, y, batch, name)
            if seen.expanded:
                self._expanded.add(name)
            return seen.back(witness.tap(name, seen).outputs)

        return hook

    def refuse(self, if_all_mix: str = "") -> None:
        """CaptureError, with the names of the layers, if there are problems. ``if_all_mix``: see
        :func:`refuse_mixed`.
        """
        problems = {name: self.problems[name] for name in self._kinds if name in self.problems}
        refuse_mixed(problems, len(self._kinds), if_all_mix)


def unsupported(message: str, layers: Iterable[str]) -> CaptureError:
    """The error of ``message``, which ``layers`` can be left out to mend."""
    error = CaptureError(message)
    error.unsupported = tuple(layers)
    return error


def no_positions(names: Iterable[str], problem: object) -> CaptureError:
    """The error for the layers ``names``, whose outputs were repeated, after the model's own ``problem``."""
    listed = sorted(names)
    return unsupported(
        "watching the layers changes what this model computes: what runs once for all samples cannot have one row for "
        f"each there, or is an index of something else than positions ({problem!s:.200}). Leave it out "
        f"(`exclude_layers`): {','.join(listed)}",
        listed,
    )


def refuse_mixed(problems: Mapping[str, str], layers: int, if_all_mix: str = "") -> None:
    """CaptureError, with every layer of ``problems``, if there is one. ``layers`` is the number of all layers.

    ``if_all_mix`` is more advice for the case that the loss of a sample reaches other rows in all layers.
    """
    if not problems:
        return
    lines = "\n".join(f"  {name}: {problem}" for name, problem in problems.items())
    all_mix = len(problems) == layers and all(problem.startswith(_REACHES) for problem in problems.values())
    raise unsupported(
        f"{len(problems)} of {layers} layers cannot be taken sample by sample along their first axis:\n{lines}\n"
        f"{if_all_mix if all_mix else ''}Have the model work batch first, or leave these layers out "
        f"(`exclude_layers`): {','.join(problems)}",
        () if all_mix else problems,
    )


def taken(batch: Any, places: Sequence[int], size: int) -> Any:
    """``batch`` with only the samples at ``places``: every tensor in it whose first axis has the length ``size`` is
    cut.
    """
    if isinstance(batch, Tensor):
        return batch[torch.tensor(places, device=batch.device)] if can_be_cut(batch, size) else batch
    if isinstance(batch, Mapping):
        cut = {key: taken(value, places, size) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return cut
        same_kind = copy(batch)  # a copy keeps other attributes, which a BatchEncoding has
        same_kind.update(cut)
        return same_kind
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(taken(value, places, size) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(taken(value, places, size) for value in batch)
    return batch


def can_be_cut(batch: Any, size: int) -> bool:
    """Whether there is a tensor in ``batch`` whose first axis has the length ``size``."""
    if isinstance(batch, Tensor):
        return batch.dim() > 0 and len(batch) == size
    if isinstance(batch, Mapping):
        return any(can_be_cut(value, size) for value in batch.values())
    return isinstance(batch, (list, tuple)) and any(can_be_cut(value, size) for value in batch)
