"""Inner products of per-sample gradients without forming all of them: three routes, and the cost of each.

Legend: B samples, M positions of one sample, R and C rows and columns of a parameter, N numbers of a vector;
V val samples, P their positions, G val gradients (groups). Formulas: Wang et al., arXiv 2406.11011, section 4.

All functions return at least float32, on the device of their input, and hold at most about TILE numbers beside it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from indexer.layers.base import at_least_float
from indexer.layers.factors import Factors, Outer, Vector, add_rows

TILE = 1 << 23
"""Numbers of a temporary array: 32 MiB in float32."""


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which factors of ``dtype`` are multiplied.

    It is float32 for float16, which overflows for a product of two scaled gradients and underflows for an unscaled
    val gradient.
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
    """(B,): rowsum((a·G) ⊙ b). The longer factor is multiplied first, so that the product is short."""
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
        # Float32 copies would take three times the memory traffic. Rounding the products to bfloat16 adds no error
        # larger than that of the factors.
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
        dots_of_groups = [
            _dot_rows(torch.nn.functional.embedding(factors.rows[samples], gradient), columns)
            for gradient in gradients_G
        ]
        dots.append(torch.stack(dots_of_groups, dim=1))
    return torch.cat(dots)


def _direct_many(factors: Outer, gradients_G: Tensor) -> Tensor:
    """(B, G): form each sample's gradient once, some rows at a time, and multiply it by all G."""
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
    """(B, V): inner products of every train with every val sample, Σ (a·a')(b·b')."""
    if isinstance(train, Vector) or isinstance(val, Vector):
        assert isinstance(train, Vector), "the factors of a parameter are of one kind"
        assert isinstance(val, Vector), "the factors of a parameter are of one kind"
        vector_dots: Tensor = train.values @ val.values.to(train.values.dtype).t()
        return vector_dots
    batch, positions = train.columns.shape[:2]
    val_batch, val_positions = val.columns.shape[:2]
    dots = torch.zeros(batch, val_batch, dtype=at_least_float(train.columns[:0]).dtype, device=train.columns.device)
    products = positions * val_positions  # of one pair of samples
    for val_part in _slices(val_batch, products):
        val_tile = val if val_part == slice(0, val_batch) else val.of(val_part)
        count = val_tile.columns.shape[0]
        for train_part in _slices(batch, products * count):
            for part in _slices(positions, val_positions * count * (train_part.stop - train_part.start)):
                tile = Outer(train.rows[train_part, part], train.columns[train_part, part])
                product = _inner(tile, val_tile, "rows").mul_(_inner(tile, val_tile, "columns"))
                shape = (train_part.stop - train_part.start, part.stop - part.start, count, val_positions)
                dots[train_part, val_part] += product.view(shape).sum(dim=(1, 3))
    return dots


def _inner(train: Outer, val: Outer, side: Literal["rows", "columns"]) -> Tensor:
    """(B·M, V·P), at least float32: inner products of the factors of one side, for all pairs of positions."""
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
    """(B, B): inner products between the samples of a batch, from the factors of each use of a parameter."""
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
    """Whether forming the gradients of a batch tile by tile is cheaper than the Gram route."""
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
        members = factors
        if len(into_G) > 1:
            indexes = group_V.eq(group).nonzero().flatten()
            if not len(indexes):
                continue
            members = factors.of(indexes)
        if isinstance(members, Vector):
            into += members.values.sum(0).to(into.dtype).view_as(into)
        elif members.is_lookup:
            add_rows(into, members.rows.flatten(), members.columns.flatten(0, 1).to(into.dtype))
        elif members.columns.dtype == into.dtype:
            into.addmm_(members.rows.flatten(0, 1).t(), members.columns.flatten(0, 1))
        else:
            into += members.rows.flatten(0, 1).t() @ members.columns.flatten(0, 1)


def direct_flops(shape: torch.Size, *, tokens: int, batch: int, val_tokens: int, groups: int, interval: int) -> float:
    """Multiply-adds of a step by the direct route: the contraction, and its share of forming the val gradients."""
    size = shape.numel()
    contraction = tokens * size + (batch * groups * size if groups > 1 else 0)
    return contraction + val_tokens * size / interval


def gram_flops(shape: torch.Size, *, tokens: int, val_tokens: int) -> float:
    """Multiply-adds of a step by the Gram route."""
    return float(tokens) * val_tokens * (shape[0] + shape[1])


def _slices(count: int, each: int) -> list[slice]:
    """Cut ``range(count)`` into slices of as many items as fit in TILE, at ``each`` numbers an item; at least one."""
    step = max(1, TILE // max(1, each))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
