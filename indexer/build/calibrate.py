"""Learning the projection from a sample of the corpus, in one pass of the model that keeps only small sums.

The pass estimates the second moments of both sides of gradients. For the output side P_in is drawn and the output axis
is not projected: each sample gives Y = G P_inᵀ, and E[Y Yᵀ] equals E[G Gᵀ] up to noise. For the input side the axes are
swapped. One backward pass gives both, and each block goes into its sums as soon as it is made, so that a batch is as
large as a build's and memory holds the block of one layer: see :mod:`indexer.build.leading`.

How much energy a preconditioned block has follows from the factors. That of other blocks takes a second pass.

Legend: B samples of a batch, K, J the ranks of a block, n an axis of a gradient matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ghoststore.errors import CorpusError, LayerError
from ghoststore.machine import total_memory
from ghoststore.progress import Progress, Task
from ghoststore.settings.projection import LEARNED
from indexer.build.leading import Leading, drawn_directions, leading_bytes
from indexer.encode.batching import batches_of
from indexer.encode.encoder import RowEncoder
from indexer.encode.losses import Reduction
from indexer.encode.tokens import Row
from indexer.projection import draws
from indexer.projection.adam import SideScales
from indexer.projection.allocation import share_out
from indexer.projection.calibration import Calibration
from indexer.projection.kfac import KroneckerPreconditioner, MomentFactor, directions
from indexer.projection.matrices import Projection, drawn_sides
from indexer.projection.plan import BlockPlan, ProjectionPlan

DRAWN_RANK = 32
"""Rank of the side that is drawn while the other one is learned."""
WHOLE = 64
"""Longest axis that is left as it is where another side would be drawn."""
LOTS = 8
"""Lots that the rows are dealt into, each with drawn sides of its own: what one draw misses, others see. Lots do not
depend on batches, so that what is learned depends on the rows alone."""
BYTES_AT_ONCE = 64 << 20
"""Most bytes of the blocks of a batch in one layer, on a CPU."""
SHARE_AT_ONCE = 32
"""On a GPU they are at most its memory divided by this: it waits for the host when batches are small."""
KEPT_AT_ONCE = 4
"""Most bytes of the inputs of all layers, which the backward pass needs whole, in :data:`BYTES_AT_ONCE`."""


def calibrate(
    model: Any,
    plan: ProjectionPlan,
    rows: Sequence[Row],
    *,
    reduction: Reduction,
    batch_tokens: int,
    scales: Mapping[str, SideScales] | None,
    progress: Progress,
    checkpointing: bool = False,
    padding: bool = True,
) -> Calibration:
    """Learn from ``rows`` what ``plan`` needs: sides, a preconditioner, the sizes of the sketches of layers.

    Rows that are not usable are left out, as in a build, and so are rows whose loss or gradient is not finite.
    ``scales`` multiply both sides, as in :class:`Projection`. CorpusError if no row is usable, LayerError for a layer
    whose gradients are zero, or are not finite for any row.
    """
    usable = [row for row in rows if row.status.usable]
    if not usable:
        raise CorpusError(
            f"none of the {len(rows)} samples that were drawn from the corpus to learn the projection from can be "
            "used; give `kind=gaussian`, `precondition=none` and `compress_by=all`"
        )
    run = _Passes(
        model=model,
        plan=plan,
        rows=usable,
        reduction=reduction,
        batch_tokens=batch_tokens,
        scales=scales,
        checkpointing=checkpointing,
        padding=padding,
        progress=progress,
    )
    learned = Calibration(samples=len(usable), sides=None, preconditioner=None, shares=None)
    if plan.config.learns_sides:
        learned = replace(learned, **run.sides())
    if plan.shared_out:
        assert plan.compress is not None
        concentrated = plan.config.kind == LEARNED and not plan.config.preconditioned
        energies = run.energies(learned, alike=not concentrated)
        learned = replace(learned, shares=share_out(energies, plan.compress, keep=concentrated))
    return replace(learned, samples=run.finite)


class _Sum(Protocol):
    """What the blocks (B, K, J) of a layer are added to."""

    def add(self, block_BKJ: Tensor) -> None: ...


_S = TypeVar("_S", bound=_Sum)


@dataclass(kw_only=True)
class _Passes:
    """Passes of the model over the same rows."""

    model: Any
    plan: ProjectionPlan
    rows: Sequence[Row]
    reduction: Reduction
    batch_tokens: int
    scales: Mapping[str, SideScales] | None
    checkpointing: bool
    padding: bool
    progress: Progress
    finite: int = 0
    """Number of rows with finite loss and gradient in the last pass, which are the rows that count."""

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def sides(self) -> dict[str, Any]:
        """The ``sides`` and the ``preconditioner`` of a calibration, without the scales."""
        config = self.plan.config
        f_in, f_out = self._factors()
        preconditioner = None
        if config.preconditioned:
            factors = {name: (f_in[name].leading(), f_out[name].leading()) for name in f_in}
            preconditioner = KroneckerPreconditioner(factors, config.damping)
        sides = {}
        for layer in self.plan.layers:
            name = layer.block.name
            if config.kind == LEARNED:
                pair = (f_in[name].vectors[: layer.k_in], f_out[name].vectors[: layer.k_out])
            else:
                pair = drawn_sides(config, layer)
            sides[name] = pair if preconditioner is None else preconditioner.sides(name, *pair)
        return {"sides": sides, "preconditioner": preconditioner}

    def energies(self, learned: Calibration, *, alike: bool) -> list[Tensor]:
        """For each block (k_out · k_in,) float64: the mean square of each number or, if ``alike``, the mean
        of these: by the factors, where there are some, else by a pass.
        """
        if alike and learned.preconditioner is not None and learned.sides is not None:
            return [
                torch.full(
                    (layer.stop - layer.start,),
                    learned.preconditioner.mean_square(layer.block.name, *learned.sides[layer.block.name]),
                    dtype=torch.float64,
                )
                for layer in self.plan.layers
            ]
        sides, layers = {}, self.plan.layers
        for layer in layers:
            name = layer.block.name
            pair = drawn_sides(self.plan.config, layer) if learned.sides is None else learned.sides[name]
            if self.scales is not None:
                pair = (pair[0] * self.scales[name].scale_in, pair[1] * self.scales[name].scale_out)
            sides[name] = pair
        sums = self._summed(
            lambda lot: [Projection.with_sides(self.plan, sides)],
            lambda: [_Energy(torch.zeros(x.stop - x.start, dtype=torch.float64, device=self.device)) for x in layers],
        )
        means = [energy.sums.cpu() / self.finite for energy in sums]
        return [torch.full_like(mean, float(mean.mean())) for mean in means] if alike else means

    def _factors(self) -> tuple[dict[str, MomentFactor], dict[str, MomentFactor]]:
        """The factors of E[Gᵀ G] and of E[G Gᵀ], by block name."""
        layers = self.plan.layers
        # Axes of one length share what is drawn for them: on a GPU it would take longer than the passes.
        directions = cache(lambda n, k: drawn_directions(_key(f"directions {n}"), n, k, self.device))

        def drawn(lot: int) -> list[Projection]:
            drawn_KN = cache(lambda n: _drawn_side(_key(f"learning {n} {lot}"), n).to(self.device))
            pairs = {x.block.name: (self._side(x, "in", drawn_KN), self._side(x, "out", drawn_KN)) for x in layers}
            return [
                Projection.with_sides(self.plan, {name: (p_in, None) for name, (p_in, _) in pairs.items()}),
                Projection.with_sides(self.plan, {name: (None, p_out) for name, (_, p_out) in pairs.items()}),
            ]

        def empty() -> list[_Moment]:
            return [self._moment(layer, axis, directions) for axis in ("out", "in") for layer in layers]

        sums = self._summed(drawn, empty, lots=LOTS)
        of_axis = {"out": sums[: len(layers)], "in": sums[len(layers) :]}
        factors: dict[str, dict[str, MomentFactor]] = {"in": {}, "out": {}}
        with closing(self.progress.task("eigenvectors of layers", len(layers), unit="layers")) as task:
            for place, layer in enumerate(layers):
                for axis in factors:
                    try:
                        factors[axis][layer.block.name] = of_axis[axis][place].leading.factor()
                    except (ValueError, RuntimeError) as error:
                        raise _nothing_to_learn(layer.block.name, str(error)) from error
                task.advance(1)
        return factors["in"], factors["out"]

    def _side(self, layer: BlockPlan, axis: str, drawn: Callable[[int], Tensor]) -> Tensor | None:
        """The scaled random side for ``axis`` while the other one is learned; None leaves the axis as it is."""
        n = layer.block.n_in if axis == "in" else layer.block.n_out
        if self.scales is None:
            return None if n <= WHOLE else drawn(n)
        pair = self.scales[layer.block.name]
        return drawn(n) * (pair.scale_in if axis == "in" else pair.scale_out).to(self.device)

    def _moment(self, layer: BlockPlan, axis: str, directions: Callable[[int, int], Tensor | None]) -> _Moment:
        """The sum of a layer's blocks for ``axis``, with nothing in it."""
        block, device = layer.block, self.device
        n, k = (block.n_in, layer.k_in) if axis == "in" else (block.n_out, layer.k_out)
        followed = _eigenvectors(self.plan, n, k)
        leading = Leading(n, followed, directions(n, followed), device)
        if self.scales is None:
            return _Moment(leading, axis, None)
        pair = self.scales[block.name]
        return _Moment(leading, axis, (pair.scale_in if axis == "in" else pair.scale_out).to(device).unsqueeze(1))

    def _summed(
        self, projections_of: Callable[[int], Sequence[Projection]], empty: Callable[[], list[_S]], *, lots: int = 1
    ) -> list[_S]:
        """The sums of the blocks, one for each layer of the projections of a lot, over all rows that are finite.

        That a row is not finite is known when its other blocks have been added: all begins again without it.
        """
        odd, not_finite_layer = set[int](), ""
        while len(odd) < len(self.rows):
            sums, more = empty(), set[int]()
            task = self.progress.task("learning the projection", len(self.rows) - len(odd))
            with closing(task):
                for lot in range(min(lots, len(self.rows))):
                    places = [place for place in range(lot, len(self.rows), lots) if place not in odd]
                    if places:
                        bad, layer = self._pass(places, projections_of(lot), sums, task)
                        more |= bad
                        not_finite_layer = layer or not_finite_layer
            odd |= more
            if not more:
                self.finite = len(self.rows) - len(odd)
                return sums
        name = not_finite_layer or self.plan.layers[0].block.name
        raise _nothing_to_learn(name, "the gradients are not finite")

    def _pass(
        self, lot: Sequence[int], projections: Sequence[Projection], sums: Sequence[_Sum], task: Task
    ) -> tuple[set[int], str]:
        """Adds the blocks of the rows at the places ``lot``; (those of them that are not finite, the name of a layer
        where one is not).
        """
        layers = [layer for projection in projections for layer in projection.plan.layers]
        at_once = _bytes_at_once(str(self.device))
        most = max(1, at_once // (4 * max(layer.stop - layer.start for layer in layers)))
        number = max(parameter.element_size() for parameter in self.model.parameters())
        kept = number * sum(layer.block.n_in for layer in layers if layer.k_in == layer.block.n_in)
        batch_tokens = min(self.batch_tokens, max(1, KEPT_AT_ONCE * at_once // max(1, kept)))
        encoder = RowEncoder(
            self.model,
            projections[0],
            reduction=self.reduction,
            checkpointing=self.checkpointing,
            beside=projections[1] if len(projections) > 1 else None,
        )
        odd, not_finite_layer, finite_of = set[int](), "", dict[int, Tensor]()

        def take(place: int, block_BKJ: Tensor) -> None:
            finite_of[place] = block_BKJ.sum((1, 2)).isfinite()
            sums[place].add(block_BKJ)

        with encoder:
            for batch in batches_of([self.rows[place] for place in lot], batch_tokens, padding=self.padding):
                for start in range(0, len(batch), most):
                    places = [lot[index] for index in batch[start : start + most]]
                    losses = encoder.hand_over([self.rows[place] for place in places], take)
                    finite = torch.stack([*finite_of.values(), losses.isfinite()])
                    if not bool(finite.all()):
                        odd |= {place for place, good in zip(places, finite.all(0).tolist(), strict=True) if not good}
                        bad = [place for place, good in finite_of.items() if not bool(good.all())]
                        not_finite_layer = layers[min(bad)].block.name if bad else not_finite_layer
                    task.advance(len(places), sum(self.rows[place].length for place in places))
        return odd, not_finite_layer


@dataclass(slots=True)
class _Energy:
    """The sum of the squares of each number of blocks."""

    sums: Tensor
    """(K · J,) float64."""

    def add(self, block_BKJ: Tensor) -> None:
        self.sums += block_BKJ.flatten(1).double().square().sum(0)


@dataclass(frozen=True, slots=True)
class _Moment:
    """The second moment of one axis of a layer."""

    leading: Leading
    axis: str
    scale_N1: Tensor | None
    """What the axis is multiplied by."""

    def add(self, block_BKJ: Tensor) -> None:
        # The axis to learn first, all others as columns.
        y_NC = (block_BKJ.permute(1, 0, 2) if self.axis == "out" else block_BKJ.permute(2, 0, 1)).flatten(1)
        self.leading.add(y_NC if self.scale_N1 is None else y_NC * self.scale_N1, len(block_BKJ))


def _eigenvectors(plan: ProjectionPlan, n: int, k: int) -> int:
    """How many eigenvectors to compute for an axis of length n and rank k."""
    return max(k if plan.config.kind == LEARNED else 1, directions(n) if plan.config.preconditioned else 1)


def axis_lengths(plan: ProjectionPlan) -> list[tuple[int, int]]:
    """(length, number of eigenvectors) of each axis whose eigenvectors are computed: both of each layer, or none."""
    if not plan.config.learns_sides:
        return []
    axes = [pair for shape in plan.shapes for pair in ((shape.n_out, shape.k_out), (shape.n_in, shape.k_in))]
    return [(n, _eigenvectors(plan, n, k)) for n, k in axes]


def learning_bytes(plan: ProjectionPlan, device: str) -> int:
    """Estimate of the bytes that learning takes beside the model: the sums of both sides, three times the blocks of a
    batch in one layer, and the inputs of all layers.
    """
    if not plan.calibrated:
        return 0
    return leading_bytes(axis_lengths(plan)) + (3 + KEPT_AT_ONCE) * _bytes_at_once(device)


def _bytes_at_once(device: str) -> int:
    """Most bytes of the blocks of a batch in one layer. Not by what is free, so that equal builds are equal."""
    return max(BYTES_AT_ONCE, total_memory(device) // SHARE_AT_ONCE) if device.startswith("cuda") else BYTES_AT_ONCE


def _drawn_side(key: str, n: int) -> Tensor:
    """A random side for an axis of length n; the identity for a short one."""
    return torch.eye(n) if n <= WHOLE else torch.from_numpy(draws.gaussian(key, DRAWN_RANK, n))


def _key(purpose: str) -> str:
    """The key of random numbers. It has no seed, because what is learned should depend only on the corpus."""
    return f"ghoststore/2|calibration|{purpose}"


def _nothing_to_learn(layer: str, problem: str) -> LayerError:
    return LayerError(
        f"layer {layer!r}: no projection can be learned from the sample of the corpus ({problem}); leave the layer out "
        f"with `exclude_layers` {layer!r}, or give `kind=gaussian`, `precondition=none` and "
        "`compress_by=all`"
    )
