"""Screening products: stored rows times queries, cheap, each with a bound of its error that holds for every row.

Rows of floats are multiplied in float32. Rows of codes (``int8``, ``onebit``) are multiplied as they are, in integers:
each query is written as a few vectors of 8-bit numbers, the products of these with the codes are exact, and the error
is the product with what is left of the query.

Legend: Q queries, R rows, D numbers of a vector, G blocks, S slices of a query, C = S·Q columns, N segments, K numbers
of a segment.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.store import Part
from ghoststore.store.part.encoding import Groups
from query.search.kernel import CodeKernel, Registers, Segment, registers
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
MANY_BYTES = 4 << 20
"""Bytes of rows for which the calls of torch take little of the time."""
WIDEST = 4096
"""Most numbers of a segment: its products stay below 2^31 and its unpacked rows in the cache."""
LARGEST = 127
"""Largest magnitude of the numbers that a query is sliced into."""
LEAST_SLICES, MOST_SLICES = 2, 3
COMBINED = 1 << 18
"""Integer products that wait to be scaled and summed."""
KERNEL_QUERIES = 32
"""Queries up to which the compiled kernel is faster than torch's matrix product."""
KERNEL_NUMBERS = 1 << 28
"""Numbers of all rows, times queries, from which on the kernel saves more than importing and compiling it takes."""
FEW_COLUMNS = 4
"""Columns up to which as many matrix-vector products are faster than a matrix product, which pads them to 16."""


class Products(Protocol):
    """Products of rows with the queries that it was made for."""

    error_Q: Tensor
    """(Q,) float64: the largest error of a product with a row of length 1, and of the roundings up to its score."""

    bytes_at_once: int
    """Bytes of stored rows from which on more at once are not faster."""

    def of(self, rows: StoredRows) -> Tensor:
        """(R, Q) float32."""


def products_of(part: Part, unit_QD: Tensor) -> Products:
    """The fastest products of rows of ``part`` with the queries (Q, D) float64, on their device: of rows as they lie in
    the store on a CPU, of decoded rows elsewhere.
    """
    packed, queries = part.layout.dtype == "onebit", len(unit_QD)
    if part.encoding.scaled and unit_QD.device.type == "cpu":
        numbers = part.rows * part.layout.dimension
        if queries <= KERNEL_QUERIES and numbers * queries >= KERNEL_NUMBERS and (on := registers()):
            return KernelProducts(unit_QD, part.groups, packed, on)
        if integers_are_exact():
            return CodeProducts(unit_QD, part.groups, packed)
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

    bytes_at_once = MANY_BYTES

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


def sliced(unit_QD: Tensor, groups: Groups) -> tuple[list[Segment], Tensor]:
    """The queries in integers, segment by segment, and the largest error (Q,) of their products with a row of length 1.

    In each segment a query is q = Σ step·slice + rest: the slices are integers of magnitude ≤ 127, each made of what
    the ones before it left, with a step of its own. A row is scale · code in each block. So its product with the query
    is Σ scale·step·⟨code, slice⟩ + ⟨row, rest⟩. The first sum is exact but for roundings in float64; the last term is
    at most the length of the row times that of the rest (Cauchy and Schwarz), which is what the error holds.
    """
    length_Q = unit_QD.norm(dim=1)
    for slices in range(LEAST_SLICES, MOST_SLICES + 1):
        rest_QD = unit_QD.clone()
        segments = [
            Segment(group, first, last, *_slice(rest_QD[:, first:last], slices))
            for group, (_, start, stop) in enumerate(groups)
            for first in range(start, stop, WIDEST)
            for last in [min(first + WIDEST, stop)]
        ]
        rest_Q = rest_QD.norm(dim=1)
        if bool((rest_Q <= product_error(PIECE) * length_Q).all()):
            break  # as good as float32
    return segments, rest_Q * (1 + 2.0**-20) + ROUNDINGS * UNIT * length_Q


class KernelProducts:
    """Products of codes with queries in integers, by the compiled :class:`CodeKernel`, on the CPU."""

    bytes_at_once = 1 << 19

    def __init__(self, unit_QD: Tensor, groups: Groups, packed: bool, on: Registers) -> None:
        segments, self.error_Q = sliced(unit_QD, groups)
        self._kernel = CodeKernel(segments, packed=packed, on=on)

    def of(self, rows: StoredRows) -> Tensor:
        assert rows.scale_RG is not None
        return self._kernel(rows.stored, rows.scale_RG).float()


class CodeProducts:
    """Products of codes with queries in integers, block by block, by torch on the CPU.

    Codes of one bit are multiplied as 0 and 1: ⟨±1, slice⟩ = 2·⟨bit, slice⟩ - Σ slice.
    """

    bytes_at_once = MANY_BYTES

    def __init__(self, unit_QD: Tensor, groups: Groups, packed: bool) -> None:
        self._packed, self._queries = packed, len(unit_QD)
        self._segments, self.error_Q = sliced(unit_QD, groups)
        # C slice by slice.
        slices_NCK = [torch.from_numpy(segment.slices_SQK).flatten(0, 1) for segment in self._segments]
        # A copy: the strides of a transposed single row mislead the integer product.
        self._slices_NKC = [x_CK.t().clone(memory_format=torch.contiguous_format) for x_CK in slices_NCK]
        few = len(slices_NCK[0]) <= FEW_COLUMNS
        self._columns = [[x_K.unsqueeze(1).contiguous() for x_K in x_CK] if few else [] for x_CK in slices_NCK]
        self._step_NC = torch.from_numpy(np.stack([segment.step_SQ.ravel() for segment in self._segments]))
        self._sum_NC = torch.stack([x_CK.sum(1, dtype=torch.int64) for x_CK in slices_NCK]).double()
        self._group_N = torch.tensor([segment.group for segment in self._segments])

    def of(self, rows: StoredRows) -> Tensor:
        assert rows.scale_RG is not None
        columns = self._step_NC.shape[1]
        total_RC = torch.zeros(len(rows), columns, dtype=torch.float64)
        step = max(1, COMBINED // max(1, total_RC.numel()))
        for first in range(0, len(self._segments), step):
            batch = range(first, min(first + step, len(self._segments)))
            products_NRC = torch.empty(len(batch), len(rows), columns, dtype=torch.int32)
            for place, products_RC in zip(batch, products_NRC, strict=True):
                self._multiply(rows.stored, place, products_RC)
            segments = slice(first, first + step)
            wide_NRC = products_NRC.double()
            if self._packed:
                wide_NRC.mul_(2).sub_(self._sum_NC[segments, None])
            wide_NRC *= self._step_NC[segments, None]
            scale_RN = rows.scale_RG[:, self._group_N[segments]].double()
            total_RC += torch.einsum("nrc,rn->rc", wide_NRC, scale_RN)
        return total_RC.view(len(rows), -1, self._queries).sum(1).float()

    def _multiply(self, stored: Tensor, place: int, products_RC: Tensor) -> None:
        """Write the products of the codes of the segment at ``place`` with its slices, int32."""
        segment = self._segments[place]
        if self._packed:
            byte = segment.start // 8
            bits = np.unpackbits(stored[:, byte : -(-segment.stop // 8)].numpy(), axis=1, bitorder="little")
            codes_RK = torch.from_numpy(bits[:, segment.start - 8 * byte : segment.stop - 8 * byte].view(np.int8))
        else:
            codes_RK = stored[:, segment.start : segment.stop]
        if not self._columns[place]:
            torch._int_mm(codes_RK, self._slices_NKC[place], out=products_RC)
            return
        for column, slice_K1 in enumerate(self._columns[place]):
            products_RC[:, column] = torch._int_mm(codes_RK, slice_K1)[:, 0]


def _slice(rest_QK: Tensor, slices: int) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """(slices (S, Q, K), their steps (S, Q)); they are subtracted from ``rest_QK``."""
    numbers, steps = [], []
    for _ in range(slices):
        step_Q = rest_QK.abs().amax(1) / LARGEST
        divisor_Q1 = torch.where(step_Q > 0, step_Q, 1.0).unsqueeze(1)
        whole_QK = (rest_QK / divisor_Q1).round().clamp(-LARGEST, LARGEST)
        rest_QK -= whole_QK * step_Q.unsqueeze(1)
        numbers.append(whole_QK.to(torch.int8))
        steps.append(step_Q)
    return torch.stack(numbers).numpy(), torch.stack(steps).numpy()
