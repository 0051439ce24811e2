"""Inner products of per-sample gradients that are never all formed: three ways, and what each costs.

Legend: B samples, M positions of one sample, R and C rows and columns of a parameter, N numbers of a vector;
V val samples, P their positions, G val gradients (groups). Formulas: Wang et al., arXiv 2406.11011, section 4.

All functions return at least float32, on the device of their input, and hold at most about TILE numbers beside it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from indexer.layers.base import at_least_float
from indexer.layers.factors import Factors, Outer, Vector

TILE = 1 << 23
"""Numbers of a temporary array: 32 MiB in float32."""


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which factors of ``dtype`` are multiplied: float32 for float16, whose range holds neither a val
    gradient without the scale of its loss nor the product of two scaled ones.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def direct(factors: Factors, gradients_G: Tensor) -> Tensor:
    """(B, G): inner products with G val gradients, (G, *parameter's shape)."""
    if isinstance(factors, Vector):
        return factors.values @ gradients_G.flatten(1).to(factors.values.dtype).t()
    if factors.is_lookup:
        return _direct_lookup(factors, gradients_G)
    if len(gradients_G) == 1:
        return _direct_one(factors, gradients_G[0]).unsqueeze(1)
    return _direct_many(factors, gradients_G)


def _direct_one(factors: Outer, gradient_RC: Tensor) -> Tensor:
    """(B,): rowsum((a·G) ⊙ b), multiplying from the longer side, so that the product is the short one."""
    dtype = product_dtype(factors.rows.dtype)
    left, right, matrix = factors.rows, factors.columns, gradient_RC.to(dtype)
    if left.shape[-1] < right.shape[-1]:
        left, right, matrix = right, left, matrix.t()
    batch, positions, width = right.shape
    dots = []
    for samples in _slices(batch, positions * width):
        product = left[samples].to(dtype) @ matrix
        dots.append(_dot_rows(product, right[samples]))
    return torch.cat(dots)


def _dot_rows(x: Tensor, y: Tensor) -> Tensor:
    """(B, …) and (B, …) to (B,), at least float32."""
    if x.is_cuda and x.dtype == y.dtype == torch.bfloat16:
        # Float32 copies would be three times the memory traffic; a product rounded as its factors are adds no error
        # that they do not have.
        return (x * y).flatten(1).sum(1, dtype=torch.float32)
    x, y = at_least_float(x).flatten(1), at_least_float(y).flatten(1)
    dots: Tensor = torch.linalg.vecdot(x, y)
    return dots


def _direct_lookup(factors: Outer, gradients_G: Tensor) -> Tensor:
    """(B, G): the rows of each val gradient that the samples looked up, times δ."""
    batch, positions, width = factors.columns.shape
    dots = []
    for samples in _slices(batch, positions * width):
        columns = at_least_float(factors.columns[samples])
        picked = [
            _dot_rows(torch.nn.functional.embedding(factors.rows[samples], gradient), columns)
            for gradient in gradients_G
        ]
        dots.append(torch.stack(picked, dim=1))
    return torch.cat(dots)


def _direct_many(factors: Outer, gradients_G: Tensor) -> Tensor:
    """(B, G): each sample's gradient once, some rows of it at a time, times all G."""
    batch, _, n_rows = factors.rows.shape
    n_columns = factors.columns.shape[-1]
    dots = factors.columns.new_zeros(batch, len(gradients_G), dtype=gradients_G.dtype)
    for part in _slices(n_rows, batch * n_columns):
        formed = _formed(factors, part)
        dots += formed.flatten(1).to(dots.dtype) @ gradients_G[:, part].flatten(1).t()
    return dots


def _formed(factors: Outer, part: slice) -> Tensor:
    """(B, r, C): some rows of each sample's gradient."""
    dtype = product_dtype(factors.rows.dtype)
    return factors.rows[:, :, part].to(dtype).transpose(1, 2) @ factors.columns.to(dtype)


def gram(train: Factors, val: Factors) -> Tensor:
    """(B, V): inner products of every sample of one with every sample of the other, Σ (a·a')(b·b')."""
    if isinstance(train, Vector) or isinstance(val, Vector):
        assert isinstance(train, Vector), "the factors of a parameter are of one kind"
        assert isinstance(val, Vector), "the factors of a parameter are of one kind"
        both: Tensor = train.values @ val.values.to(train.values.dtype).t()
        return both
    batch, positions = train.columns.shape[:2]
    others, their_positions = val.columns.shape[:2]
    dots = torch.zeros(batch, others, dtype=at_least_float(train.columns[:0]).dtype, device=train.columns.device)
    pair = positions * their_positions
    for val_part in _slices(others, pair):
        some = val if val_part == slice(0, others) else val.of(val_part)
        count = some.columns.shape[0]
        for train_part in _slices(batch, pair * count):
            for places in _slices(positions, their_positions * count * (train_part.stop - train_part.start)):
                tile = Outer(train.rows[train_part, places], train.columns[train_part, places])
                product = _inner(tile, some, "rows").mul_(_inner(tile, some, "columns"))
                shape = (train_part.stop - train_part.start, places.stop - places.start, count, their_positions)
                dots[train_part, val_part] += product.view(shape).sum(dim=(1, 3))
    return dots


def _inner(train: Outer, val: Outer, side: Literal["rows", "columns"]) -> Tensor:
    """(B·M, V·P), at least float32: inner products of the factors of one side, at every two positions."""
    a, b = (train.rows, val.rows) if side == "rows" else (train.columns, val.columns)
    if side == "rows" and train.is_lookup and val.is_lookup:
        return a.reshape(-1, 1).eq(b.reshape(1, -1)).to(at_least_float(train.columns[:0]).dtype)
    if side == "rows" and train.is_lookup:
        return at_least_float(b.flatten(0, 1).index_select(1, a.flatten()).t().contiguous())
    if side == "rows" and val.is_lookup:
        return at_least_float(a.flatten(0, 1).index_select(1, b.flatten()))
    dtype = product_dtype(a.dtype)
    return at_least_float(a.flatten(0, 1).to(dtype) @ b.flatten(0, 1).to(dtype).t())


def pairs(uses: list[Factors], shape: torch.Size) -> Tensor:
    """(B, B): inner products between the samples of one batch; ``uses`` are the factors of each use of a parameter."""
    dense = all(isinstance(use, Outer) and not use.is_lookup for use in uses)
    if dense and pairs_by_tiles(uses, shape):
        return _pairs_formed(uses, shape)
    dots = gram(uses[0], uses[0])
    for i, use in enumerate(uses):
        for j, other in enumerate(uses[: i + 1]):
            if i == j:
                dots = dots if i == 0 else dots + gram(use, use)
            else:
                cross = gram(use, other)
                dots = dots + cross + cross.t()
    return dots


def pairs_by_tiles(uses: list[Factors], shape: torch.Size) -> bool:
    """Whether forming the gradients of a batch, tile by tile, is cheaper than the Gram route for all its pairs."""
    outers = [use for use in uses if isinstance(use, Outer)]
    batch = outers[0].columns.shape[0]
    positions = sum(use.columns.shape[1] for use in outers)
    n_rows, n_columns = shape
    formed = batch * positions * n_rows * n_columns + batch * batch * n_rows * n_columns
    return formed < batch * positions * batch * positions * (n_rows + n_columns)


def _pairs_formed(uses: list[Factors], shape: torch.Size) -> Tensor:
    outers = [use for use in uses if isinstance(use, Outer)]
    batch = len(outers[0].columns)
    dots = at_least_float(outers[0].columns.new_zeros(batch, batch))
    for part in _slices(shape[0], batch * shape[1]):
        formed = at_least_float(_formed(outers[0], part))
        for use in outers[1:]:
            formed = formed + _formed(use, part)
        flat = formed.flatten(1)
        dots += flat @ flat.t()
    return dots


def add_gradients(factors: Factors, group_V: Tensor, into_G: Tensor) -> None:
    """Add the gradient of val sample v to ``into_G[group_V[v]]``; ``into_G`` is (G, *parameter's shape)."""
    for group, into in enumerate(into_G):
        chosen = factors
        if len(into_G) > 1:
            places = group_V.eq(group).nonzero().flatten()
            if not len(places):
                continue
            chosen = factors.of(places)
        if isinstance(chosen, Vector):
            into += chosen.values.sum(0).to(into.dtype).view_as(into)
        elif chosen.is_lookup:
            into.index_add_(0, chosen.rows.flatten(), chosen.columns.flatten(0, 1).to(into.dtype))
        elif chosen.columns.dtype == into.dtype:
            into.addmm_(chosen.rows.flatten(0, 1).t(), chosen.columns.flatten(0, 1))
        else:
            into += chosen.rows.flatten(0, 1).t() @ chosen.columns.flatten(0, 1)


def direct_flops(shape: torch.Size, *, tokens: int, batch: int, val_tokens: int, groups: int, interval: int) -> float:
    """Multiply-adds of a step by the direct route: the contraction, and the share of forming the val gradients."""
    size = shape.numel()
    contraction = tokens * size + (batch * groups * size if groups > 1 else 0)
    return contraction + val_tokens * size / interval


def gram_flops(shape: torch.Size, *, tokens: int, val_tokens: int) -> float:
    """Multiply-adds of a step by the Gram route."""
    return float(tokens) * val_tokens * (shape[0] + shape[1])


def _slices(count: int, each: int) -> list[slice]:
    """``range(count)`` in slices of as many as fit TILE at ``each`` numbers, at least one."""
    step = max(1, TILE // max(1, each))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
