"""``ghoststore.open``: a session, which keeps the model of a part between questions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.question import OpenOptions, QueryOptions
from ghoststore.settings.shared import Data
from ghoststore.store import Part, Store
from query.answer.query import answer
from query.answer.results import QueryResult
from query.ask.chosen import chosen_rows
from query.ask.opened_model import OpenedModel
from query.search.on_ray import searching_on_ray
from query.search.search import Search
from query.search.vectors import PartVectors

OF_SESSION = ("store", "part", "checkpoint", "base", "tokenizer", "data", "device", "engine", "ray_address")
"""Options of a query that the session has."""
NOT_OF_SESSION = ("near", "run", "step_window", "last", "candidates", "part_weights", "server")
"""Options of a query of other things than one part."""


@takes(OpenOptions)
def open(options: OpenOptions) -> Session:
    """Open a session of one part of ``store``: it keeps the model and the tokenizer between questions.

    ``with ghoststore.open("store") as store: store.query(["a text", …], top_k=10)``. ``part`` names the part (default:
    the only one). ``checkpoint`` and ``tokenizer`` are folders or loaded objects; by default what the user's own build
    read. ``data`` is the corpus of the part, for texts. The model is loaded when a question first needs it. With
    ``engine="ray"`` rows are searched by actors of a Ray cluster, which stay until the session is closed, and keep what
    they have read.

    Raises UsageError if there is no such part, CorruptError if its metadata are damaged.
    """
    return Session(options)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class PartRows:
    """Vectors of a part with their rows. ``np.asarray`` takes it as the array of the vectors."""

    rows: NDArray[np.int64]
    """(N,): numbers of the rows in the part."""
    ids: list[str]
    """N ids of samples."""
    vectors: Tensor
    """(N, D) float32 on the CPU."""

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"<vectors of {len(self):,} rows, {self.vectors.shape[1]:,} numbers each>"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.to_numpy(), dtype=dtype, copy=copy)

    def to_numpy(self) -> NDArray[np.float32]:
        """(N, D) float32, without a copy."""
        array: NDArray[np.float32] = self.vectors.numpy()
        return array

    def to_torch(self) -> Tensor:
        """(N, D) float32 on the CPU."""
        return self.vectors


class Session:
    """One part of a store with its model. Made by ``ghoststore.open``.

    Every question reads the part anew: it sees the rows that are committed at that moment, as ``ghoststore.query``
    does. Questions of several threads wait for each other.
    """

    def __init__(self, options: OpenOptions) -> None:
        self.store = str(options.store)
        self.name = Store.open(options.store).part(options.part).name
        """The name of the part."""
        self._options = options
        self._progress = options.progress or Silent()
        self._model: OpenedModel | None = OpenedModel(options)
        self._stack = ExitStack()
        self._on_ray: Search | None = None
        options.check_engine()

    @property
    def part(self) -> Part:
        """The part as it is now."""
        return Store.open(self._options.store).part(self.name)

    def query(self, val_set: Data, **options: Any) -> QueryResult:
        """``ghoststore.query`` of this part: the rows whose gradients are most similar to those of ``val_set``.

        ``val_set`` is a path, a list of texts or of dicts, or a table in memory. ``options`` are those of
        ``ghoststore.query`` that are about one part: ``top_k``, ``bottom_k``, ``each``, ``metric``, ``where``,
        ``minus``, ``group_field``, ``fields``, ``rerank`` and others. The answer is the same.
        """
        for name in options:
            if name in OF_SESSION:
                raise UsageError(f"`{name}` is an option of the session: give it to `ghoststore.open`")
            if name in NOT_OF_SESSION:
                raise UsageError(f"`{name}` is not about one part, of which a session is: use `ghoststore.query`")
        model = self._opened()

        @takes(QueryOptions)
        def query(options: QueryOptions) -> QueryResult:
            return answer(options, model, self._searching if options.engine else None)

        given = {name: getattr(self._options, name) for name in OF_SESSION} | {"part": self.name}
        with model.lock:
            return query(val_set=val_set, **{"progress": self._progress, **given, **options})

    def vectors(self, where: str | None = None, *, progress: Progress | None = None) -> PartRows:
        """The vectors of the usable rows that match ``where`` (default: all), decoded to float32.

        Memory: 4 bytes for each of the N·D numbers. UsageError for what is no condition, and if no row is left.
        """
        self._opened()
        part = self.part
        chosen = chosen_rows([part], where, progress or self._progress)
        part.refuse_hollow()
        rows = part.row_numbers[part.usable()]
        if chosen is not None:
            rows = rows[chosen.mask[rows]]
        vectors = PartVectors(part).gather(rows) if len(rows) else torch.zeros(0, part.layout.dimension)
        return PartRows(rows=rows, ids=[str(name) for name in part.read_rows("sample_id", rows)], vectors=vectors)

    def close(self) -> None:
        """Let go of the model, and of a Ray cluster. The session answers nothing more."""
        self._model = self._on_ray = None
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Committed rows of the part."""
        return self.part.rows

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<ghoststore session of part {self.name!r} in {self.store}{self._state()}>"

    def _repr_html_(self) -> str:
        part = self.part
        shown = (
            f"part <b>{escape(self.name)}</b> of <code>{escape(str(Path(self.store)))}</code>{escape(self._state())}"
        )
        return f"<div>{shown}: {part.rows:,} rows of {part.layout.dimension:,} numbers</div>"

    def _state(self) -> str:
        if self._model is None:
            return ", closed"
        return "" if self._model.device is None else f", model on {self._model.device}"

    def _searching(self, parts: Sequence[Part]) -> AbstractContextManager[Search]:
        """The search on a Ray cluster, whose actors stay until the session is closed."""
        if self._on_ray is None:
            self._on_ray = self._stack.enter_context(searching_on_ray(self._options.ray_address, parts))
        return nullcontext(self._on_ray)

    def _opened(self) -> OpenedModel:
        if self._model is None:
            raise UsageError("this session is closed: open another one with `ghoststore.open`")
        return self._model
