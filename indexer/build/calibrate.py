"""Learning the projection from a sample of the corpus, in one pass of the model that keeps only small sums.

The pass estimates the second moments of both sides of gradients. For the output side P_in is drawn and the output axis
is not projected: each sample gives Y = G P_inᵀ, and E[Y Yᵀ] equals E[G Gᵀ] up to noise. For the input side the axes are
swapped. One backward pass gives both. Neither matrix is ever formed: a Nyström approximation gives its leading
eigenvectors from its products with a few random directions (Tropp et al. 2017, "Fixed-rank approximation of a
positive-semidefinite matrix from streaming data").

How much energy a preconditioned block has follows from the factors. That of other blocks takes a second pass.

Legend: B samples of a batch, K, J the ranks of a block, n an axis of a gradient matrix, m its random directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ghoststore.errors import CorpusError, LayerError
from ghoststore.progress import Progress
from ghoststore.settings.projection import LEARNED
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

OVERSAMPLING = 3
"""Number of random directions for each wanted eigenvector."""
LEAST_DIRECTIONS = 64
"""Least number of random directions, for the case of few eigenvectors and a slowly falling spectrum."""
DRAWN_RANK = 64
"""Rank of the side that is drawn while the other one is learned."""
ROUNDING = 2.0**-20
"""Eigenvalues below this share of the largest are rounding errors of float32 sums."""
BYTES_AT_ONCE = 64 << 20
"""Most bytes of the blocks of a batch."""


class Leading:
    """The ``k`` leading eigenvectors of the mean of terms Y Yᵀ that are added one by one. Memory: n × m numbers."""

    def __init__(self, key: str, n: int, k: int, device: torch.device) -> None:
        self.k = k
        m = _random_directions(n, k)
        drawn = torch.eye(n) if m == n else torch.linalg.qr(torch.from_numpy(draws.gaussian(key, m, n)).t()).Q
        self._directions = drawn.contiguous().to(device)
        self._products = torch.zeros(n, m, device=device)
        self._trace = torch.zeros((), dtype=torch.float64, device=device)
        self._terms = 0

    def add(self, y_NC: Tensor, terms: int) -> None:
        """Add ``terms`` terms at once: the columns of their Y side by side, (n, columns)."""
        self._products += y_NC @ (y_NC.t() @ self._directions)
        self._trace += y_NC.double().square().sum()
        self._terms += terms

    def factor(self) -> MomentFactor:
        """The k largest eigenvalues and their eigenvectors. The sign of a vector makes its largest number positive.

        ValueError if the mean is zero or not finite.
        """
        products, directions = self._products.double().cpu() / self._terms, self._directions.double().cpu()
        trace, size = float(self._trace) / self._terms, float(products.norm())
        if not (0 < size < math.inf and 0 < trace < math.inf):
            raise ValueError("the gradients are zero or not finite")
        core = directions.t() @ products
        inner, turn = torch.linalg.eigh((core + core.t()) / 2)
        half = products @ turn * torch.where(inner > ROUNDING * inner[-1], inner.rsqrt(), 0.0)
        left, singular, _ = torch.linalg.svd(half, full_matrices=False)
        rows, values = left[:, : self.k].t(), singular[: self.k].square()
        signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
        outside = len(left) - self.k
        rest = max(0.0, trace - float(values.sum())) / outside if outside else 0.0
        return MomentFactor((rows * signs).float().contiguous(), values.float(), rest)


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
        sides = {}
        for layer in self.plan.layers:
            name = layer.block.name
            pair = drawn_sides(self.plan.config, layer) if learned.sides is None else learned.sides[name]
            if self.scales is not None:
                pair = (pair[0] * self.scales[name].scale_in, pair[1] * self.scales[name].scale_out)
            sides[name] = pair
        sums = [torch.zeros(layer.stop - layer.start, dtype=torch.float64) for layer in self.plan.layers]
        for blocks in self._blocks(Projection.with_sides(self.plan, sides)):
            for total, block_BKJ in zip(sums, blocks, strict=True):
                total += block_BKJ.flatten(1).double().square().sum(0).cpu()
        means = [total / self.finite for total in sums]
        return [torch.full_like(mean, float(mean.mean())) for mean in means] if alike else means

    def _factors(self) -> tuple[dict[str, MomentFactor], dict[str, MomentFactor]]:
        """The factors of E[Gᵀ G] and of E[G Gᵀ], by block name."""
        layers, device = self.plan.layers, self.device
        sums: dict[str, list[Leading]] = {"in": [], "out": []}
        for layer in layers:
            for axis, n, k in (("in", layer.block.n_in, layer.k_in), ("out", layer.block.n_out, layer.k_out)):
                most = _eigenvectors(self.plan, n, k)
                sums[axis].append(Leading(_key(layer, f"directions {axis}"), n, most, device))
        out_whole = Projection.with_sides(self.plan, {x.block.name: (self._drawn(x, "in"), None) for x in layers})
        in_whole = Projection.with_sides(self.plan, {x.block.name: (None, self._drawn(x, "out")) for x in layers})
        for blocks in self._blocks(out_whole, in_whole):
            for axis, of_axis in (("out", blocks[: len(layers)]), ("in", blocks[len(layers) :])):
                for layer, total, block_BKJ in zip(layers, sums[axis], of_axis, strict=True):
                    total.add(self._unfolded(layer, axis, block_BKJ), len(block_BKJ))
        factors: dict[str, dict[str, MomentFactor]] = {"in": {}, "out": {}}
        with closing(self.progress.task("eigenvectors of layers", len(layers), unit="layers")) as task:
            for place, layer in enumerate(layers):
                for axis in factors:
                    try:
                        factors[axis][layer.block.name] = sums[axis][place].factor()
                    except (ValueError, RuntimeError) as error:
                        raise _nothing_to_learn(layer.block.name, str(error)) from error
                task.advance(1)
        return factors["in"], factors["out"]

    def _drawn(self, layer: BlockPlan, axis: str) -> Tensor | None:
        """The scaled random side for ``axis`` while the other one is learned; None leaves the axis as it is."""
        n = layer.block.n_in if axis == "in" else layer.block.n_out
        if n <= DRAWN_RANK and self.scales is None:
            return None
        exact = n <= DRAWN_RANK
        key = _key(layer, f"learning {axis}")
        side = torch.eye(n) if exact else torch.from_numpy(draws.gaussian(key, DRAWN_RANK, n))
        if self.scales is None:
            return side
        pair = self.scales[layer.block.name]
        return side * (pair.scale_in if axis == "in" else pair.scale_out)

    def _unfolded(self, layer: BlockPlan, axis: str, block_BKJ: Tensor) -> Tensor:
        """(n, columns): the blocks with the axis to learn first, multiplied by its scales, and all other axes as
        columns.
        """
        matrix = (block_BKJ.permute(1, 0, 2) if axis == "out" else block_BKJ.permute(2, 0, 1)).flatten(1)
        if self.scales is None:
            return matrix
        pair = self.scales[layer.block.name]
        scale = pair.scale_out if axis == "out" else pair.scale_in
        return matrix * scale.to(matrix.device).unsqueeze(1)

    def _blocks(self, *projections: Projection) -> Iterator[list[Tensor]]:
        """Blocks (B, K, J) of all layers for each batch, of one projection or of two, without rows that are not
        finite.
        """
        layers = [layer for projection in projections for layer in projection.plan.layers]
        sizes = [layer.stop - layer.start for layer in layers]
        most = max(1, BYTES_AT_ONCE // (4 * sum(sizes)))
        self.finite, not_finite_layer = 0, ""
        encoder = RowEncoder(
            self.model,
            projections[0],
            reduction=self.reduction,
            checkpointing=self.checkpointing,
            beside=projections[1] if len(projections) > 1 else None,
        )
        task = self.progress.task("learning the projection", len(self.rows))
        with closing(task), encoder:
            for batch in batches_of(self.rows, self.batch_tokens, padding=self.padding):
                for start in range(0, len(batch), most):
                    batch_rows = [self.rows[place] for place in batch[start : start + most]]
                    vectors, losses = encoder(batch_rows)
                    blocks = torch.split(vectors, sizes, dim=1)
                    finite = vectors.isfinite().all(1) & losses.isfinite()
                    if not bool(finite.all()):
                        not_finite_layer = next(
                            (
                                layer.block.name
                                for layer, block in zip(layers, blocks, strict=True)
                                if not bool(block.isfinite().all())
                            ),
                            not_finite_layer,
                        )
                        blocks = torch.split(vectors[finite], sizes, dim=1)
                    self.finite += len(blocks[0])
                    yield [
                        block.view(len(block), layer.k_out, layer.k_in)
                        for layer, block in zip(layers, blocks, strict=True)
                    ]
                    task.advance(len(batch_rows), sum(row.length for row in batch_rows))
        if not self.finite:
            raise _nothing_to_learn(not_finite_layer or layers[0].block.name, "the gradients are not finite")


def _eigenvectors(plan: ProjectionPlan, n: int, k: int) -> int:
    """How many eigenvectors to compute for an axis of length n and rank k."""
    return max(k if plan.config.kind == LEARNED else 1, directions(n) if plan.config.preconditioned else 1)


def _random_directions(n: int, k: int) -> int:
    """m for k eigenvectors of an axis of length n."""
    return min(n, max(OVERSAMPLING * k, LEAST_DIRECTIONS))


def learning_bytes(plan: ProjectionPlan) -> int:
    """Estimate of the bytes that learning takes beside the model: random directions and their products, for both
    sides, and three times the blocks of a batch.
    """
    if not plan.calibrated:
        return 0
    axes = [pair for shape in plan.shapes for pair in ((shape.n_out, shape.k_out), (shape.n_in, shape.k_in))]
    sides = sum(2 * 4 * n * _random_directions(n, _eigenvectors(plan, n, k)) for n, k in axes)
    return sides * plan.config.learns_sides + 3 * BYTES_AT_ONCE


def _key(layer: BlockPlan, purpose: str) -> str:
    """The key of random numbers. It has no seed, because what is learned should depend only on the corpus."""
    return f"ghoststore/1|calibration|layer={layer.block.name}|{purpose}"


def _nothing_to_learn(layer: str, problem: str) -> LayerError:
    return LayerError(
        f"layer {layer!r}: no projection can be learned from the sample of the corpus ({problem}); leave the layer out "
        f"with `exclude_layers` {layer!r}, or give `kind=gaussian`, `precondition=none` and "
        "`compress_by=all`"
    )
