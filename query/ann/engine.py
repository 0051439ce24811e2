"""The only module that calls FAISS, and turns its errors into ours. FAISS is imported when an index is first used.

Legend: Q queries, R rows, d numbers of a vector in FAISS.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import CorruptError, UsageError
from ghoststore.store.base.opening import size_of

Float32 = NDArray[np.float32]

CANDIDATE_BATCH = 256
"""Queries searched in one call, which bounds the memory of their candidates."""
MOST_ON_GPU = 2048
"""Most candidates that FAISS returns for a query on a GPU."""


def load_faiss() -> Any:
    """The module ``faiss``. UsageError if it is missing or too old; the message says what to install."""
    try:
        import faiss
    except ImportError as error:
        raise UsageError(
            "an index needs FAISS, which is not installed: pip install 'ghoststore[cpu]' (or 'ghoststore[gpu]', not "
            "both); exact search needs neither"
        ) from error
    if not hasattr(faiss, "IO_FLAG_MMAP_IFC"):
        raise UsageError(f"faiss {faiss.__version__} is too old: `pip install --upgrade 'ghoststore[cpu]'`")
    return faiss


def check_device(device: str) -> str:
    """``device``, if FAISS can use it; else UsageError, which says what to install for ``cuda``."""
    name, _, number = device.partition(":")
    if name not in ("cpu", "cuda") or (number and not (name == "cuda" and number.isdecimal())):
        raise UsageError(f"`device` {device!r}: an index knows cpu, cuda and cuda:N")
    if name == "cuda":
        faiss = load_faiss()
        count = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else -1
        if count < 0:
            raise UsageError(
                f"`device={device}`: the faiss that is installed ({faiss.__version__}) has no GPU index. Install "
                "faiss-gpu (CUDA 12) or faiss-gpu-cuvs (CUDA 13) in place of faiss-cpu: all three are imported as "
                "faiss, so uninstall faiss-cpu first; or use `device=cpu`"
            )
        if int(number or 0) >= count:
            raise UsageError(f"`device={device}`: FAISS sees {count} GPUs; use `device=cpu`")
    return device


class Engine:
    """One FAISS index by inner product. The id of a row is its place: 0, 1, 2, … in the order of adding."""

    def __init__(self, index: Any, factory: str, device: str = "cpu") -> None:
        self.factory, self.device = factory, device
        self._index = index
        self._resources: Any = None

    @classmethod
    def create(cls, factory: str, dimension: int, device: str = "cpu") -> Engine:
        """An empty index. UsageError, with the words of FAISS, for a factory string that it rejects."""
        faiss = load_faiss()
        try:
            index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise UsageError(f"`factory` {factory!r} is not one that FAISS makes: {_reason(error)}") from error
        engine = cls(index, factory)
        if engine.lists == 0:
            raise UsageError(f"`factory` {factory!r} has no inverted list: give at least one, such as IVF1024")
        return engine._on(check_device(device))

    @classmethod
    def read(cls, path: Path, factory: str, device: str = "cpu") -> Engine:
        """Read the index in the file ``path``, whose checksum the caller has compared. On the CPU it is memory-mapped.

        CorruptError if FAISS cannot read it.
        """
        faiss = load_faiss()
        flags = faiss.IO_FLAG_MMAP_IFC if device == "cpu" else 0
        try:
            with _read_limit(size_of(path)):
                index = faiss.read_index(str(path), flags)
        except (RuntimeError, MemoryError) as error:
            raise CorruptError(
                f"{path} cannot be read by faiss {faiss.__version__}: {_reason(error)}; `ghoststore index … --rebuild`"
            ) from error
        return cls(index, factory)._on(check_device(device))

    def _on(self, device: str) -> Engine:
        if device != "cpu":
            faiss = load_faiss()
            self._resources = faiss.StandardGpuResources()
            with self._usage_errors(f"on {device}"):
                number = int(device.partition(":")[2] or 0)
                self._index = faiss.index_cpu_to_gpu(self._resources, number, self._index)
            self.device = device
        return self

    @contextmanager
    def _usage_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise UsageError(f"`factory` {self.factory!r} cannot be used {doing}: {_reason(error)}") from error

    @property
    def rows(self) -> int:
        """Number of rows added."""
        return int(self._index.ntotal)

    @property
    def dimension(self) -> int:
        """d, the numbers of a vector in FAISS."""
        return int(self._index.d)

    @property
    def needs_training(self) -> bool:
        """Whether :meth:`train` must come before :meth:`add`."""
        return not self._index.is_trained

    @property
    def lists(self) -> int | None:
        """Number of inverted lists; None for an index without them."""
        inverted = self._inverted
        return None if inverted is None else int(inverted.nlist)

    def train(self, rows_Rd: Float32) -> None:
        """Learn lists and codes. The same rows on one thread give the same bits."""
        with self._usage_errors(f"with {len(rows_Rd):,} rows to train on"):
            self._index.train(rows_Rd)

    def add(self, rows_Rd: Float32) -> None:
        """Append rows."""
        with self._usage_errors("for rows numbered from 0"):
            self._index.add(rows_Rd)

    def write(self, path: Path) -> None:
        """Write the index to ``path``, in the form for the CPU. OSError if the disk refuses."""
        faiss = load_faiss()
        index = self._index if self.device == "cpu" else faiss.index_gpu_to_cpu(self._index)
        try:
            faiss.write_index(index, str(path))
        except RuntimeError as error:  # FAISS gives the system's error as text, without its number
            number = next((code for code in errno.errorcode if os.strerror(code) in str(error)), errno.EIO)
            raise OSError(number, os.strerror(number), str(path)) from error

    def efforts(self) -> list[int | None]:
        """Settings of ``nprobe`` or ``efSearch`` to try, cheapest first; ``[None]`` for an index without such a
        setting.
        """
        if self.lists is not None:
            return [*(1 << power for power in range((self.lists - 1).bit_length())), self.lists]
        if self._graph is not None:
            return [1 << power for power in range(4, 13)]
        return [None]

    @property
    def effort(self) -> int | None:
        """The setting that :meth:`set_effort` set last; None for an index without one."""
        if self._inverted is not None:
            return int(self._inverted.nprobe)
        return None if self._graph is None else int(self._graph.hnsw.efSearch)

    def set_effort(self, effort: int | None) -> None:
        """Search with this setting, one of :meth:`efforts`, from now on."""
        if effort is None:
            return
        if self._inverted is not None:
            self._inverted.nprobe = effort
        elif self._graph is not None:
            self._graph.hnsw.efSearch = effort

    def share(self, effort: int | None) -> float:
        """Approximate share of the rows that a search with ``effort`` looks at, 0 to 1."""
        if self.lists is not None:
            return (effort or 1) / self.lists
        return 1.0 if effort is None else min(1.0, 32 * effort / max(1, self.rows))

    def search(self, queries_Qd: Float32, count: int) -> NDArray[np.int64]:
        """(Q, count) places of candidates, best first by the coded vectors; -1 where there are no more.

        ``count`` is lowered to the number of rows, and on a GPU to 2,048.
        """
        count = min(count, self.rows) if self.device == "cpu" else min(count, self.rows, MOST_ON_GPU)
        places = [
            self._index.search(np.ascontiguousarray(queries_Qd[first : first + CANDIDATE_BATCH]), count)[1]
            for first in range(0, len(queries_Qd), CANDIDATE_BATCH)
        ]
        return np.concatenate(places) if places else np.empty((0, count), dtype=np.int64)

    def search_among(self, queries_Qd: Float32, count: int, allowed_R: NDArray[np.bool_]) -> NDArray[np.int64] | None:
        """:meth:`search` among the places that are allowed; None if this index cannot: on a GPU, and for some kinds.

        It looks at more lists (or nodes), the more the fewer places are allowed, so that as many vectors are compared
        as in a search among all.
        """
        share = float(allowed_R.mean()) if len(allowed_R) == self.rows else 0.0
        if self.device != "cpu" or not share > 0:
            return None
        faiss = load_faiss()
        selector = faiss.IDSelectorBitmap(np.packbits(allowed_R, bitorder="little"))
        parameters = _filtering(self._index, selector, share)
        if parameters is None:
            return None
        count = min(count, int(allowed_R.sum()))
        try:
            places_QC = np.concatenate(
                [
                    self._index.search(
                        np.ascontiguousarray(queries_Qd[first : first + CANDIDATE_BATCH]), count, params=parameters
                    )[1]
                    for first in range(0, len(queries_Qd), CANDIDATE_BATCH)
                ]
            )
        except RuntimeError:  # a kind that takes no selector
            return None
        given = places_QC[places_QC >= 0]
        # A kind that passes over the selector is no filter.
        return None if len(given) and (given.max() >= self.rows or not allowed_R[given].all()) else places_QC

    @property
    def _inverted(self) -> Any:
        return _find(self._index, "nprobe")

    @property
    def _graph(self) -> Any:
        return _find(self._index, "hnsw")


def _find(index: Any, attribute: str) -> Any:
    """The index with ``attribute``, also inside transforms and refinements; None if there is none."""
    faiss = load_faiss()
    while index is not None:
        index = faiss.downcast_index(index)
        if hasattr(index, attribute):
            return index
        index = getattr(index, "index", None) or getattr(index, "base_index", None)
    return None


MOST_NODES = 4096
"""Most nodes of a graph that a filtered search keeps in view."""


def _filtering(index: Any, selector: Any, share: float) -> Any:
    """The parameters of a search of ``index`` among what ``selector`` takes, a ``share`` of the rows; None where its
    kind is not known to filter.
    """
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _filtering(index.index, selector, share)
        return None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = _filtering(index.base_index, selector, share)
        return (
            None
            if inner is None
            else faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)
        )
    if isinstance(index, faiss.IndexIVF):
        probes = min(int(index.nlist), math.ceil(index.nprobe / share))
        return faiss.SearchParametersIVF(sel=selector, nprobe=probes)
    if isinstance(index, faiss.IndexHNSW):
        nodes = min(max(MOST_NODES, index.hnsw.efSearch), math.ceil(index.hnsw.efSearch / share))
        return faiss.SearchParametersHNSW(sel=selector, efSearch=nodes)
    if isinstance(index, faiss.IndexRaBitQ):
        return faiss.RaBitQSearchParameters(sel=selector, qb=index.qb, centered=index.centered)
    if isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer | faiss.IndexPQ):
        return faiss.SearchParameters(sel=selector)
    return None


@contextmanager
def _read_limit(size: int) -> Iterator[None]:
    """While this is open, FAISS refuses a file that claims longer vectors, or more loops, than ``size`` bytes can hold.

    Else a damaged file could make it ask for any amount of memory. Releases before 1.14 have no such limit.
    """
    faiss = load_faiss()
    names = [f"deserialization_{kind}_limit" for kind in ("vector_byte", "loop")]
    before = {name: getattr(faiss, f"get_{name}")() for name in names if hasattr(faiss, f"get_{name}")}
    try:
        for name in before:
            getattr(faiss, f"set_{name}")(size)
        yield
    finally:
        for name, limit in before.items():
            getattr(faiss, f"set_{name}")(limit)


def _reason(error: RuntimeError | MemoryError) -> str:
    """The message of FAISS, without the place in its source code."""
    return " ".join(str(error).split()).rpartition(".cpp:")[2].partition(": ")[2] or str(error)
