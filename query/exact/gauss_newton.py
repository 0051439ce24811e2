"""Queries that the inverse of the Gauss-Newton matrix improves, by conjugate gradients.

Influence functions ask for (H + λ)⁻¹ g (Koh, Liang 2017), with H the curvature of the mean loss of the corpus. For H
they take the Gauss-Newton matrix, the mean of Jᵀ H_out J over rows: J is the Jacobian of a row's logits, H_out the
Hessian of its loss at them (Martens 2010; Grosse et al. 2023). A product with it takes a forward-mode and a
reverse-mode pass; no matrix is formed. Conjugate gradients solve with products alone, and start in the direction of
the metric that they are preconditioned by.

Legend: Q queries, O, I axes of a gradient matrix, B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghoststore.errors import UsageError
from ghoststore.progress import Task
from indexer.encode.batching import batches_of
from indexer.encode.encoder import inputs_of
from indexer.encode.losses import IGNORED, Reduction
from indexer.encode.modes import forward_options
from indexer.encode.tokens import Row
from indexer.layers.base import at_least_float
from indexer.projection.blocks import Block
from query.exact.layer_gradients import Passes

TOLERANCE = 1e-6
"""A query whose residual is a smaller share of it is solved."""

Blocks = list[Tensor]
"""(Q, O, I) for each block."""


class GaussNewton:
    """Products with the Gauss-Newton matrix of the mean loss of ``rows``, over the parameters of ``blocks``."""

    def __init__(
        self,
        model: Any,
        blocks: Sequence[Block],
        rows: Sequence[Row],
        *,
        batch_tokens: int,
        reduction: Reduction = "mean",
    ) -> None:
        self.model, self.blocks, self.rows = model, list(blocks), rows
        self._batches = batches_of(rows, batch_tokens)
        self._options, self._reduction = forward_options(model), reduction
        self._frozen = {name: parameter.detach() for name, parameter in model.named_parameters()}
        names = dict.fromkeys(name for block in blocks for name in block.parameters)
        self._parameters = {name: self._frozen[name].clone().requires_grad_(True) for name in names}

    def times(self, vectors: Blocks, task: Task | None = None) -> Blocks:
        """The products with each query. ``task`` advances by the rows.

        UsageError where the model has an operation without a forward-mode derivative.
        """
        tangents = [self._apart([vector[query] for vector in vectors]) for query in range(len(vectors[0]))]
        sums = [{name: torch.zeros_like(at_least_float(p)) for name, p in self._parameters.items()} for _ in tangents]
        for batch in self._batches:
            rows = [self.rows[place] for place in batch]
            inputs, labels = inputs_of(rows, vectors[0].device)
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
                for total, products in zip(sums, self._of_batch(inputs, labels, tangents), strict=True):
                    for name, product in products.items():
                        total[name] += product
            if task is not None:
                task.advance(len(batch), sum(row.length for row in rows))
        matrices = [[block.lay_out(total) / len(self.rows) for block in self.blocks] for total in sums]
        return [
            torch.stack(of_block).to(like.dtype)
            for of_block, like in zip(zip(*matrices, strict=True), vectors, strict=True)
        ]

    def _of_batch(self, inputs: dict[str, Tensor], labels: Tensor, tangents: Sequence[dict[str, Tensor]]) -> Any:
        def logits_of(parameters: dict[str, Tensor]) -> Tensor:
            settings = {**inputs, **self._options}
            logits: Tensor = functional_call(self.model, {**self._frozen, **parameters}, (), settings).logits
            return logits

        weights_BT1 = _weights(labels, self._reduction).unsqueeze(2)
        with torch.enable_grad():
            logits = logits_of(self._parameters)
        p_BTV = torch.softmax(logits.detach().to(torch.promote_types(logits.dtype, torch.float32)), -1)
        for place, tangent in enumerate(tangents):
            with torch.no_grad(), forward_mode.dual_level():
                try:
                    duals = {n: forward_mode.make_dual(self._frozen[n], t) for n, t in tangent.items()}  # type: ignore[no-untyped-call]
                    moved = forward_mode.unpack_dual(logits_of(duals)).tangent  # type: ignore[no-untyped-call]
                except NotImplementedError as error:
                    raise UsageError(
                        f"{type(self.model).__name__} has an operation without a forward-mode derivative, which "
                        f"`rerank_with=cg` needs ({error}); give `rerank_with=exact`"
                    ) from error
            assert moved is not None
            moved = p_BTV * moved.to(p_BTV.dtype)
            upstream = (moved - p_BTV * moved.sum(-1, keepdim=True)) * weights_BT1.to(p_BTV.dtype)
            products = torch.autograd.grad(
                logits,
                list(self._parameters.values()),
                upstream.to(logits.dtype),
                retain_graph=place + 1 < len(tangents),
                allow_unused=True,
            )
            yield {n: g for n, g in zip(self._parameters, products, strict=True) if g is not None}

    def _apart(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        tangents: dict[str, Tensor] = {}
        for block, matrix in zip(self.blocks, matrices, strict=True):
            for name, tangent in block.take_apart(matrix, self._parameters).items():
                tangents[name] = tangent.to(self._parameters[name].dtype)
        return tangents


def _weights(labels_BT: Tensor, reduction: Reduction) -> Tensor:
    """(B, T): what the loss at each position counts in the loss of its row."""
    is_target = torch.zeros_like(labels_BT, dtype=torch.float64)
    is_target[:, :-1] = (labels_BT[:, 1:] != IGNORED).double()
    return is_target / is_target.sum(1, keepdim=True).clamp_min(1) if reduction == "mean" else is_target


def mean_eigenvalues(passes: Passes, rows: Sequence[Row], task: Task, *, seed: int = 0) -> list[float]:
    """An unbiased estimate of the mean eigenvalue of each block's own part of the Gauss-Newton matrix, in one pass.

    The trace is the mean squared length of gradients for targets that the model draws (Martens 2014, section 9).
    """
    layers = passes.layers
    generator = torch.Generator(layers.device).manual_seed(seed)

    def drawn_losses(logits: Tensor, labels: Tensor, *, reduction: Reduction) -> tuple[Tensor, Tensor]:
        logits = at_least_float(logits)
        weights_BT = _weights(labels, reduction).sqrt().to(logits.dtype)
        p = torch.softmax(logits.detach(), -1).flatten(0, 1)
        drawn = torch.multinomial(p, 1, generator=generator).view_as(labels)
        losses_BT = torch.nn.functional.cross_entropy(logits.transpose(1, 2), drawn, reduction="none")
        return (losses_BT * weights_BT).sum(1), (weights_BT > 0).sum(1)

    squares = torch.zeros(len(layers.blocks), dtype=torch.float64, device=layers.device)

    def see(place: int, samples: Tensor, matrices: Tensor) -> None:
        squares[place] += matrices.square().sum(dtype=torch.float64)

    with layers.of_losses(drawn_losses):
        layers.over(rows, see, passes.batch_tokens, task, padding=passes.padding)
    return [float(square) / len(rows) / block.numel for square, block in zip(squares, layers.blocks, strict=True)]


def conjugate_gradients(
    times: Callable[[Blocks], Blocks],
    queries: Blocks,
    damping: Sequence[float],
    precondition: Callable[[Blocks], Blocks],
    steps: int,
) -> Blocks:
    """The solutions x of (H + λ) x = ``queries`` after at most ``steps`` steps; ``times`` is the product with H.

    ``damping`` has the λ of each block. ``precondition`` must be symmetric and positive. Memory: five times
    ``queries``.
    """
    x = [torch.zeros_like(query) for query in queries]
    residual = [query.clone() for query in queries]
    direction = precondition(residual)
    slope_Q = _dots(residual, direction)
    enough_Q = TOLERANCE**2 * _dots(queries, queries)
    for step in range(steps):
        product = times(direction)
        for matrix, along, damped in zip(product, direction, damping, strict=True):
            matrix.add_(along, alpha=damped)
        curvature_Q = _dots(direction, product)
        going_Q = (curvature_Q > 0) & (_dots(residual, residual) > enough_Q)
        if not bool(going_Q.any()):
            break
        size_Q = torch.where(going_Q, slope_Q / curvature_Q.where(going_Q, torch.ones_like(slope_Q)), 0.0)
        for solution, rest, along, matrix in zip(x, residual, direction, product, strict=True):
            solution.add_(_per_query(size_Q, along) * along)
            rest.sub_(_per_query(size_Q, matrix) * matrix)
        if step + 1 == steps:
            break
        downhill = precondition(residual)
        next_Q = _dots(residual, downhill)
        turn_Q = torch.where(going_Q & (slope_Q > 0), next_Q / slope_Q.clamp_min(1e-300), 0.0)
        direction = [new + _per_query(turn_Q, old) * old for new, old in zip(downhill, direction, strict=True)]
        slope_Q = next_Q
    return x


def _dots(a: Blocks, b: Blocks) -> Tensor:
    """(Q,) float64."""
    return torch.stack([(x.double() * y.double()).flatten(1).sum(1) for x, y in zip(a, b, strict=True)]).sum(0)


def _per_query(numbers_Q: Tensor, like: Tensor) -> Tensor:
    return numbers_Q.to(like.dtype).view(-1, 1, 1)
