"""Screening products: stored rows times queries, cheap, each with a bound of its error that holds for every row.

Rows of floats are multiplied in float32. Rows of codes (``int8``, ``onebit``) are multiplied as they are, in integers:
each query is written as a few vectors of 8-bit numbers, the products of these with the codes are exact, and the error
is the product with what is left of the query.

Legend: Q queries, R rows, D numbers of a vector, G blocks, S slices of a query, C = S·Q columns, N segments, K numbers
of a segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ghoststore.store import Part
from ghoststore.store.part.encoding import Groups
from query.search.vectors import StoredRows

PIECE = 2048
"""Most numbers of one float32 product. Products of longer vectors are sums of such, in float64: the bound of the error
grows with the numbers of one product, and what it does not rule out is scored in float64, pair by pair.
"""
UNIT = 2.0**-24
"""Unit roundoff of float32."""
ROUNDINGS = 8
"""Roundings of query, norm, factor, scale, score and bound on the way from a product to a screened score, at most."""
TILE_BYTES = 2 << 20
"""Bytes of float32 rows that are decoded for one product: a tile stays in the processor's cache."""
WIDEST = 4096
"""Most numbers of a segment: its products stay below 2^31 and its unpacked rows in the cache."""
LARGEST = 127
"""Largest magnitude of the numbers that a query is sliced into."""
LEAST_SLICES, MOST_SLICES = 2, 3
COMBINED = 1 << 18
"""Integer products that wait to be scaled and summed."""
FEW_COLUMNS = 4
"""Columns up to which as many matrix-vector products are faster than a matrix product, which pads them to 16."""


class Products(Protocol):
    """Products of rows with the queries that it was made for."""

    error_Q: Tensor
    """(Q,) float64: the largest error of a product with a row of length 1, and of the roundings up to its score."""

    def of(self, rows: StoredRows) -> Tensor:
        """(R, Q) float32."""


def products_of(part: Part, unit_QD: Tensor) -> Products:
    """The fastest products of rows of ``part``, as they lie in the store, with the queries (Q, D) float64 on a CPU."""
    if part.encoding.scaled and integers_are_exact():
        return CodeProducts(unit_QD, part.groups, packed=part.layout.dtype == "onebit")
    return FloatProducts(unit_QD)


@cache
def integers_are_exact() -> bool:
    """Whether this processor adds products of 8-bit integers in 32 bits (VNNI), and torch's product of them is exact.

    Without it they go through 16 bits, which may saturate, or are slower than float32. Both functions are private ones
    of torch: where they are gone, or one of the largest products is wrong, rows are multiplied as float32.
    """
    supported, multiply = getattr(torch.cpu, "_is_vnni_supported", None), getattr(torch, "_int_mm", None)
    if supported is None or multiply is None or not supported():
        return False
    largest_RK, signs_K = torch.full((17, WIDEST), LARGEST, dtype=torch.int8), torch.ones(WIDEST, dtype=torch.int8)
    signs_K[1::3] = -1
    columns_KC = torch.stack([largest_RK[0], largest_RK[0] * signs_K], dim=1).repeat(1, 8)
    expected_RC = largest_RK.double() @ columns_KC.double()
    return torch.equal(multiply(largest_RK, columns_KC).double(), expected_RC)


def product_error(dimension: int) -> float:
    """Largest error of a float32 inner product of two vectors of length 1, in any order of summation.

    It is n·u with u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), and a few u more for
    the roundings of query, scale and bound.
    """
    return (dimension + ROUNDINGS) * UNIT


def cheap_products(rows_RD: Tensor, query_DQ: Tensor) -> Tensor:
    """(R, Q) float32: products of rows and queries, with the error of pieces of at most :data:`PIECE` numbers.

    By Cauchy and Schwarz the errors of the pieces add up to no more than one piece's bound for the whole lengths.
    """
    dimension = rows_RD.shape[1]
    if dimension <= PIECE:
        return rows_RD @ query_DQ
    total_RQ = torch.zeros(len(rows_RD), query_DQ.shape[1], dtype=torch.float64, device=rows_RD.device)
    for start in range(0, dimension, PIECE):
        total_RQ += rows_RD[:, start : start + PIECE] @ query_DQ[start : start + PIECE]
    return total_RQ.float()


class FloatProducts:
    """Products in float32 of rows of any encoding, decoded tile by tile, on the device of the queries."""

    def __init__(self, unit_QD: Tensor) -> None:
        self._query_DQ = unit_QD.float().t().contiguous()
        # Inputs are rounded to TF32 where the user allows that on a GPU.
        tf32 = unit_QD.is_cuda and torch.get_float32_matmul_precision() != "highest"
        error = product_error(min(PIECE, unit_QD.shape[1])) + (2.0**-9 if tf32 else 0.0)
        self.error_Q = error * unit_QD.norm(dim=1)

    def of(self, rows: StoredRows) -> Tensor:
        if rows.stored.dtype == torch.float32:
            return cheap_products(rows.stored, self._query_DQ)
        step = max(16, TILE_BYTES // (4 * len(self._query_DQ)))
        tiles = [
            cheap_products(rows.decoded(slice(start, start + step)), self._query_DQ)
            for start in range(0, len(rows), step)
        ]
        return torch.cat(tiles)


@dataclass(frozen=True, slots=True)
class _Segment:
    """Columns ``start`` to ``stop`` of block ``group``, and the integers of the queries there."""

    group: int
    start: int
    stop: int
    slices_KC: Tensor
    """(K, C) int8."""
    columns: list[Tensor]
    """The same, column by column (K, 1) contiguous, if there are few."""


class CodeProducts:
    """Products of codes with queries in integers, block by block, on the CPU.

    In each segment a query is q = Σ step·slice + rest: the slices are integers of magnitude ≤ 127, each made of what
    the ones before it left, with a step of its own. A row is scale · code in each block. So its product with the query
    is Σ scale·step·⟨code, slice⟩ + ⟨row, rest⟩. The first sum is exact but for roundings in float64; the last term is
    at most the length of the row times that of the rest (Cauchy and Schwarz), which is what :attr:`error_Q` holds.

    Codes of one bit are multiplied as 0 and 1: ⟨±1, slice⟩ = 2·⟨bit, slice⟩ - Σ slice.
    """

    def __init__(self, unit_QD: Tensor, groups: Groups, packed: bool) -> None:
        self._packed, self._queries = packed, len(unit_QD)
        length_Q = unit_QD.norm(dim=1)
        for slices in range(LEAST_SLICES, MOST_SLICES + 1):
            rest_QD = unit_QD.clone()
            cut = [
                (group, first, min(first + WIDEST, stop))
                for group, (_, start, stop) in enumerate(groups)
                for first in range(start, stop, WIDEST)
            ]
            segments, steps = [], []
            for group, start, stop in cut:
                slices_CK, step_C = _slice(rest_QD[:, start:stop], slices)
                # A copy: the strides of a transposed single row mislead the integer product.
                slices_KC = slices_CK.t().clone(memory_format=torch.contiguous_format)
                few = len(slices_CK) <= FEW_COLUMNS
                columns = [column_K.unsqueeze(1).contiguous() for column_K in slices_CK] if few else []
                segments.append(_Segment(group, start, stop, slices_KC, columns))
                steps.append(step_C)
            rest_Q = rest_QD.norm(dim=1)
            if bool((rest_Q <= product_error(PIECE) * length_Q).all()):
                break  # as good as float32
        self._segments, self._step_NC = segments, torch.stack(steps)
        self._sum_NC = torch.stack([segment.slices_KC.sum(0, dtype=torch.int64) for segment in segments]).double()
        self._group_N = torch.tensor([segment.group for segment in segments])
        self.error_Q = rest_Q * (1 + 2.0**-20) + ROUNDINGS * UNIT * length_Q

    def of(self, rows: StoredRows) -> Tensor:
        assert rows.scale_RG is not None
        columns = self._step_NC.shape[1]
        total_RC = torch.zeros(len(rows), columns, dtype=torch.float64)
        step = max(1, COMBINED // max(1, total_RC.numel()))
        for first in range(0, len(self._segments), step):
            batch = slice(first, first + step)
            products_NRC = torch.empty(len(self._segments[batch]), len(rows), columns, dtype=torch.int32)
            for segment, products_RC in zip(self._segments[batch], products_NRC, strict=True):
                self._multiply(rows.stored, segment, products_RC)
            wide_NRC = products_NRC.double()
            if self._packed:
                wide_NRC.mul_(2).sub_(self._sum_NC[batch, None])
            wide_NRC *= self._step_NC[batch, None]
            scale_RN = rows.scale_RG[:, self._group_N[batch]].double()
            total_RC += torch.einsum("nrc,rn->rc", wide_NRC, scale_RN)
        return total_RC.view(len(rows), -1, self._queries).sum(1).float()

    def _multiply(self, stored: Tensor, segment: _Segment, products_RC: Tensor) -> None:
        """Write the products of the codes of a segment with its slices, int32."""
        if self._packed:
            byte = segment.start // 8
            bits = np.unpackbits(stored[:, byte : -(-segment.stop // 8)].numpy(), axis=1, bitorder="little")
            codes_RK = torch.from_numpy(bits[:, segment.start - 8 * byte : segment.stop - 8 * byte].view(np.int8))
        else:
            codes_RK = stored[:, segment.start : segment.stop]
        if not segment.columns:
            torch._int_mm(codes_RK, segment.slices_KC, out=products_RC)
            return
        for column, slice_K1 in enumerate(segment.columns):
            products_RC[:, column] = torch._int_mm(codes_RK, slice_K1)[:, 0]


def _slice(rest_QK: Tensor, slices: int) -> tuple[Tensor, Tensor]:
    """(slices (C, K) int8, their steps (C,) float64), C slice by slice; they are subtracted from ``rest_QK``."""
    numbers, steps = [], []
    for _ in range(slices):
        step_Q = rest_QK.abs().amax(1) / LARGEST
        divisor_Q1 = torch.where(step_Q > 0, step_Q, 1.0).unsqueeze(1)
        whole_QK = (rest_QK / divisor_Q1).round().clamp(-LARGEST, LARGEST)
        rest_QK -= whole_QK * step_Q.unsqueeze(1)
        numbers.append(whole_QK.to(torch.int8))
        steps.append(step_Q)
    return torch.cat(numbers), torch.cat(steps)
