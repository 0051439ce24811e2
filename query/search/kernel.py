"""Integer products of stored codes with a query, as machine code that LLVM makes for this processor.

It is optional: ``pip install 'ghoststore[fast]'`` brings llvmlite. Without it, or on a processor that has none of the
instructions, :class:`query.search.products.CodeProducts` multiplies with torch: the products are the same integers.

The code computes what :func:`obvious_products` writes down. A row of one bit a number is never unpacked: for each bit
of a byte, 64 bytes are masked at once, and one instruction (``vpdpbusd``) multiplies them with 64 integers of the query
and adds. A masked bit counts 2^bit, not 1; the sums so far are doubled from bit to bit, so that all count 2^7 in the
end. Where a processor has AVX2 and not that instruction, three others on 32 bytes do the same.

Legend: Q queries, R rows, G blocks, N segments, S slices of a query, K numbers of a
segment, W bytes of a vector register.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BITS = 8
TILE_BYTES = 1 << 20
"""Bytes of rows that stay in the processor's cache while all segments of all queries are multiplied with them."""

MachineCode = Callable[..., None]


class Registers(NamedTuple):
    """What a processor multiplies with."""

    width: int
    """W."""
    vnni: bool
    """Whether it has ``vpdpbusd``."""

    @property
    def rows(self) -> int:
        """Rows whose sums are in registers together: the query's integers are loaded once for so many. AVX2 has half
        the registers of AVX-512.
        """
        return 8 if self.vnni else 4


@dataclass(frozen=True, slots=True)
class Segment:
    """Numbers ``start`` to ``stop`` of the rows, all of block ``group``, and the queries' integers there."""

    group: int
    start: int
    stop: int
    slices_SQK: NDArray[np.int8]
    step_SQ: NDArray[np.float64]
    """What one unit of each slice is worth."""


def obvious_products(
    codes_RD: NDArray[np.int8], scale_RG: NDArray[np.float32], segments: Sequence[Segment]
) -> NDArray[np.float64]:
    """(R, Q): Σ over segments of scale · Σ over slices of step · ⟨codes, slice⟩. The codes of one bit are 1 and -1."""
    total_RQ = np.zeros((len(codes_RD), segments[0].step_SQ.shape[1]))
    for segment in segments:
        codes_RK = codes_RD[:, segment.start : segment.stop].astype(np.int64)
        for slice_QK, step_Q in zip(segment.slices_SQK.astype(np.int64), segment.step_SQ, strict=True):
            total_RQ += (codes_RK @ slice_QK.T) * step_Q * scale_RG[:, segment.group, None].astype(np.float64)
    return total_RQ


@cache
def registers() -> Registers | None:
    """Those of this processor; None if the kernel does not run on it, or llvmlite is not installed."""
    try:
        from llvmlite import binding
    except ImportError:
        return None
    has = binding.get_host_cpu_features().get
    if has("avx512vnni") and has("avx512bw"):
        return Registers(64, vnni=True)
    if has("avxvnni") or (has("avx512vnni") and has("avx512vl")):
        return Registers(32, vnni=True)
    return Registers(32, vnni=False) if has("avx2") else None


class CodeKernel:
    """Multiplies rows of codes with the queries of ``segments``. ``packed``: one bit a number, else int8."""

    def __init__(self, segments: Sequence[Segment], *, packed: bool, on: Registers) -> None:
        self._packed, self._width, self._rows = packed, on.width, on.rows
        slices, self._queries = segments[0].step_SQ.shape
        self._code = {rows: machine_code(packed, slices, rows, on) for rows in (1, on.rows)}
        places: list[list[int]] = []
        integers: list[NDArray[np.int8]] = []
        size = self._reach = 0
        for segment in segments:
            first = segment.start // BITS if packed else segment.start
            arranged = self._arranged(segment)
            vectors = arranged.shape[-3]
            places.append([first, vectors, size, segment.group])
            integers.append(arranged.ravel())
            size += arranged.size
            self._reach = max(self._reach, first + vectors * on.width)
        self._places_N4 = np.array(places, dtype=np.int64)
        self._integers = np.concatenate(integers)
        step_NQS = np.stack([segment.step_SQ.T for segment in segments])
        sum_NQS = np.stack([segment.slices_SQK.sum(2, dtype=np.int64).T for segment in segments])
        # ⟨±1, slice⟩ = 2·⟨bit, slice⟩ - Σ slice, and ⟨code, slice⟩ = ⟨code + 128, slice⟩ - 128·Σ slice.
        self._factor_NQS = np.ascontiguousarray(step_NQS * 2 if packed else step_NQS)
        self._shift_NQ = np.ascontiguousarray(-(step_NQS * sum_NQS * (1 if packed else 128)).sum(2))

    def _arranged(self, segment: Segment) -> NDArray[np.int8]:
        """(Q, 8, vectors, S, W) or (Q, vectors, S, W): the integers in the order of use, zero beyond the segment."""
        slices, queries = segment.step_SQ.shape
        unit = BITS if self._packed else 1
        before = segment.start % unit
        columns = before + segment.stop - segment.start
        vectors = -(-columns // (unit * self._width))
        padded = np.zeros((slices, queries, vectors * self._width * unit), dtype=np.int8)
        padded[:, :, before:columns] = segment.slices_SQK
        if not self._packed:
            return padded.reshape(slices, queries, vectors, self._width).transpose(1, 2, 0, 3)
        return padded.reshape(slices, queries, vectors, self._width, BITS).transpose(1, 4, 2, 0, 3)

    def __call__(self, stored: Tensor, scale_RG: Tensor) -> Tensor:
        """(R, Q) float64 of rows (R, columns) as they lie in the store, on the CPU."""
        stored, scale_RG = stored.contiguous(), scale_RG.contiguous()
        total_RQ = torch.zeros(len(stored), self._queries, dtype=torch.float64)
        columns = stored.shape[1]
        # Whole registers are loaded. Rows for which that would go beyond the tensor's memory are copied.
        inside = max(0, len(stored) - max(0, -(-(self._reach - columns) // columns)))
        step = max(self._rows, TILE_BYTES // columns // self._rows * self._rows)
        for first in range(0, inside, step):
            tile = slice(first, min(first + step, inside))
            self._multiply(stored[tile], scale_RG[tile], total_RQ[tile])
        if inside < len(stored):
            padded = torch.zeros(len(stored) - inside, max(columns, self._reach), dtype=stored.dtype)
            padded[:, :columns] = stored[inside:]
            self._multiply(padded, scale_RG[inside:], total_RQ[inside:])
        return total_RQ

    def _multiply(self, stored: Tensor, scale_RG: Tensor, total_RQ: Tensor) -> None:
        rows, columns = stored.shape
        many = rows // self._rows * self._rows
        for first, count, at_once in ((0, many, self._rows), (many, rows - many, 1)):
            if count:
                self._code[at_once](
                    *(stored.data_ptr() + first * columns, columns, count // at_once),
                    *(scale_RG.data_ptr() + first * scale_RG.stride(0) * 4, scale_RG.stride(0)),
                    *(len(self._places_N4), self._queries, self._places_N4.ctypes.data, self._integers.ctypes.data),
                    *(self._factor_NQS.ctypes.data, self._shift_NQ.ctypes.data),
                    total_RQ.data_ptr() + first * self._queries * 8,
                )


ARGUMENTS = (
    *("stored", "columns", "blocks", "scale", "groups", "segments", "queries", "places", "integers"),
    *("factor", "shift", "total"),
)
NUMBERS = {"columns", "blocks", "groups", "segments", "queries"}
"""Arguments that are numbers; the others are addresses."""


@cache
def machine_code(packed: bool, slices: int, rows: int, on: Registers) -> MachineCode:
    """The compiled function for rows ``rows`` at once. It takes :data:`ARGUMENTS` and releases the GIL."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    name = "products"
    module = binding.parse_assembly(str(_Writer(name, packed, slices, rows, on).module))
    module.verify()
    target = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
    )
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    passes = binding.create_pass_builder(target, tuning)
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, target)
    engine.finalize_object()
    types = [ctypes.c_int64 if argument in NUMBERS else ctypes.c_void_p for argument in ARGUMENTS]
    code = ctypes.CFUNCTYPE(None, *types)(engine.get_function_address(name))
    _alive.append(engine)
    return code


_alive: list[Any] = []
"""What owns the memory of the machine code, for as long as the process lives."""


class _Writer:
    """Writes the function in LLVM's language. Loops, outermost first: segments, queries, blocks of rows, bits, vectors.

    Every loop runs at least once.
    """

    def __init__(self, name: str, packed: bool, slices: int, rows: int, on: Registers) -> None:
        from llvmlite import ir

        width = on.width
        self.ir, self.packed, self.slices, self.rows, self.width = ir, packed, slices, rows, width
        self.i64, self.i32, self.double = ir.IntType(64), ir.IntType(32), ir.DoubleType()
        self.bytes = ir.VectorType(ir.IntType(8), width)
        self.sums = ir.VectorType(self.i32, width // 4)
        self.module = ir.Module(name)
        self.pairs = ir.VectorType(ir.IntType(16), width // 2)
        self.dot = self.of_bytes = self.of_pairs = None
        if on.vnni:
            self.dot = self._declared(f"llvm.x86.avx512.vpdpbusd.{BITS * width}", self.sums, [self.sums] * 3)
        else:
            self.of_bytes = self._declared("llvm.x86.avx2.pmadd.ub.sw", self.pairs, [self.bytes] * 2)
            self.of_pairs = self._declared("llvm.x86.avx2.pmadd.wd", self.sums, [self.pairs] * 2)
        self.add_up = self._declared(f"llvm.vector.reduce.add.v{width // 4}i32", self.i32, [self.sums])
        pointer = ir.IntType(8).as_pointer()
        types = [self.i64 if argument in NUMBERS else pointer for argument in ARGUMENTS]
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), types), name)
        self.given = dict(zip(ARGUMENTS, function.args, strict=True))
        self.b = ir.IRBuilder(function.append_basic_block())
        self.sum_at = [[self.b.alloca(self.sums) for _ in range(slices)] for _ in range(rows)]
        self._segments()
        self.b.ret_void()

    def _declared(self, name: str, result: Any, arguments: list[Any]) -> Any:
        return self.ir.Function(self.module, self.ir.FunctionType(result, arguments), name)

    @contextmanager
    def _loop(self, count: Any) -> Iterator[Any]:
        """The instructions of the body run for each number from 0 to ``count`` - 1."""
        before, body = self.b.block, self.b.append_basic_block()
        self.b.branch(body)
        self.b.position_at_end(body)
        number = self.b.phi(self.i64)
        number.add_incoming(self.i64(0), before)
        yield number
        following = self.b.add(number, self.i64(1))
        number.add_incoming(following, self.b.block)
        after = self.b.append_basic_block()
        self.b.cbranch(self.b.icmp_unsigned("<", following, count), body, after)
        self.b.position_at_end(after)

    def _at(self, address: Any, offset: Any, kind: Any) -> Any:
        """The address of the item ``offset``, of type ``kind``, from ``address`` on."""
        typed = self.b.bitcast(address, kind.as_pointer())
        return self.b.gep(typed, [offset], source_etype=kind)

    def _load(self, address: Any, offset: Any, kind: Any) -> Any:
        return self.b.load(self._at(address, offset, kind), align=1, typ=kind)

    def _all(self, kind: Any, value: int) -> Any:
        return self.ir.Constant(kind, [value] * kind.count)

    def _segments(self) -> None:
        b, given = self.b, self.given
        byte = self.ir.IntType(8)
        with self._loop(given["segments"]) as segment:
            first, vectors, offset, group = (
                self._load(given["places"], b.add(b.mul(segment, self.i64(4)), self.i64(item)), self.i64)
                for item in range(4)
            )
            size = b.mul(vectors, self.i64(self.slices * self.width * (BITS if self.packed else 1)))
            with self._loop(given["queries"]) as query:
                integers = self._at(given["integers"], b.add(offset, b.mul(query, size)), byte)
                column = b.add(b.mul(segment, given["queries"]), query)
                shift = self._load(given["shift"], column, self.double)
                factors = [
                    self._load(given["factor"], b.add(b.mul(column, self.i64(self.slices)), self.i64(s)), self.double)
                    for s in range(self.slices)
                ]
                with self._loop(given["blocks"]) as block:
                    row = b.mul(block, self.i64(self.rows))
                    rows = [b.add(row, self.i64(r)) for r in range(self.rows)]
                    starts = [self._at(given["stored"], b.add(b.mul(r, given["columns"]), first), byte) for r in rows]
                    self._sums(starts, vectors, integers)
                    for place, r in enumerate(rows):
                        scale = self._load(given["scale"], b.add(b.mul(r, given["groups"]), group), self.ir.FloatType())
                        self._add_to_total(place, r, query, scale, factors, shift)

    def _sums(self, starts: list[Any], vectors: Any, integers: Any) -> None:
        """Leave the sums of products of rows and slices in ``sum_at``."""
        b = self.b
        for of_row in self.sum_at:
            for at in of_row:
                b.store(self._all(self.sums, 0), at)
        if not self.packed:
            self._dots(starts, vectors, integers, lambda codes: b.xor(codes, self._all(self.bytes, -128)))
            return
        with self._loop(self.i64(BITS)) as bit:
            for of_row in self.sum_at:
                for at in of_row:
                    b.store(b.shl(b.load(at), self._all(self.sums, 1)), at)
            one = b.shl(self.ir.IntType(8)(1), b.trunc(bit, self.ir.IntType(8)))
            first = b.insert_element(self.ir.Constant(self.bytes, self.ir.Undefined), one, self.i32(0))
            mask = b.shuffle_vector(first, first, self.ir.Constant(self.ir.VectorType(self.i32, self.width), None))
            of_bit = b.mul(b.mul(bit, vectors), self.i64(self.slices * self.width))
            self._dots(
                starts, vectors, self._at(integers, of_bit, self.ir.IntType(8)), lambda codes: b.and_(codes, mask)
            )

    def _dots(self, starts: list[Any], vectors: Any, integers: Any, unsigned: Callable[[Any], Any]) -> None:
        b = self.b
        with self._loop(vectors) as vector:
            slices = [
                self._load(integers, b.add(b.mul(vector, self.i64(self.slices)), self.i64(s)), self.bytes)
                for s in range(self.slices)
            ]
            for start, of_row in zip(starts, self.sum_at, strict=True):
                codes = unsigned(self._load(start, vector, self.bytes))
                for slice_, at in zip(slices, of_row, strict=True):
                    b.store(self._dot(b.load(at), codes, slice_), at)

    def _dot(self, sums: Any, codes: Any, integers: Any) -> Any:
        """``sums``, each with the products of four unsigned bytes of ``codes`` and four signed ones of ``integers``."""
        b = self.b
        if self.dot:
            return b.call(self.dot, [sums, *(b.bitcast(each, self.sums) for each in (codes, integers))])
        if self.packed:  # two products of at most 2^7 · 127 have room in 16 bits
            products = b.call(self.of_bytes, [codes, integers])
            return b.add(sums, b.call(self.of_pairs, [products, self._all(self.pairs, 1)]))
        for half in range(2):  # those of 255 · 127 do not
            places = [half * self.pairs.count + place for place in range(self.pairs.count)]
            picked = self.ir.Constant(self.ir.VectorType(self.i32, self.pairs.count), places)
            wide = [
                extended(b.shuffle_vector(each, each, picked), self.pairs)
                for extended, each in ((b.zext, codes), (b.sext, integers))
            ]
            sums = b.add(sums, b.call(self.of_pairs, wide))
        return sums

    def _add_to_total(self, place: int, row: Any, query: Any, scale: Any, factors: list[Any], shift: Any) -> None:
        b, value = self.b, shift
        for at, factor in zip(self.sum_at[place], factors, strict=True):
            sums = b.load(at)
            if self.packed:  # every bit counts 2^7 by now
                sums = b.ashr(sums, self._all(self.sums, BITS - 1))
            value = b.fadd(value, b.fmul(factor, b.sitofp(b.call(self.add_up, [sums]), self.double)))
        total = self._at(self.given["total"], b.add(b.mul(row, self.given["queries"]), query), self.double)
        b.store(b.fadd(b.load(total, typ=self.double), b.fmul(b.fpext(scale, self.double), value)), total)
