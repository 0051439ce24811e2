"""Opening an index of a part. It is checked first, and refused if it is damaged or does not cover what is committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import CorruptError, MismatchError, UsageError
from ghoststore.store import Part
from ghoststore.store.base.own import is_own_digest
from ghoststore.store.part.build_command import flags_of
from ghoststore.store.part.index_manifest import IndexManifest
from ghoststore.store.part.indexes import (
    check_coverage,
    damage_of,
    index_folder,
    own_index_names,
    read_manifest,
)
from query.ann.engine import Engine, check_device
from query.ann.rows import ROW, CheckedRows
from query.ann.searcher import Front, Searcher
from query.search.part_score import Metric, Term
from query.search.top_k import Ranking

ATTEMPTS = 5
"""How often to try to open an index that is replaced while it is being opened."""


class AnnIndex:
    """An open index; :meth:`open` makes it. It stays usable when another index takes its name."""

    def __init__(self, part: Part, name: str, manifest: IndexManifest, searcher: Searcher) -> None:
        self.part, self.name, self.manifest = part, name, manifest
        self._searcher = searcher

    @classmethod
    def open(
        cls, part: Part, name: str | None = None, *, metric: Metric | None = None, device: str = "cpu"
    ) -> AnnIndex:
        """The index called ``name``; without a name the only one of the part, or the only one for ``metric``.

        Its files are memory-mapped after their SHA-256 is compared. UsageError if there is no such index or if there
        are several, or if somebody else built it; MismatchError if it is stale (rows were committed since, or it is of
        other vectors) or of another metric; CorruptError, with the name of the file, if one is damaged. In each case
        ``ghoststore index`` builds it again.
        """
        check_device(device)
        name = choose_index(part, metric) if name is None else name.removesuffix(part.tag) + part.tag
        for _ in range(ATTEMPTS):
            manifest = read_manifest(part, name)
            try:
                index = cls._load(part, name, manifest, metric, device)
            except CorruptError:
                if manifest == read_manifest(part, name):
                    raise
                continue
            if manifest == read_manifest(part, name):
                return index
        raise MismatchError(f"index {name!r} of part {part.name!r} is being replaced again and again; try later")

    @classmethod
    def _load(cls, part: Part, name: str, manifest: IndexManifest, metric: Metric | None, device: str) -> AnnIndex:
        if metric is not None and manifest.metric != metric:
            raise MismatchError(
                f"index {name!r} is for `metric={manifest.metric}`, not {metric}: "
                f"`ghoststore index --metric {metric}` makes one, or give `metric={manifest.metric}`"
            )
        check_coverage(part, name, manifest)
        folder = index_folder(part, name)
        for path, problem in damage_of(folder, manifest):
            raise CorruptError(f"{path} of index {name!r}: {problem}; `ghoststore index` builds it again")
        refuse_foreign(part, name, manifest)
        engine = Engine.read(manifest.path_of(folder, "faiss"), manifest.factory, device)
        engine.set_effort(manifest.effort)
        rows = CheckedRows(part, _table(manifest.path_of(folder, "rows"), part))
        if (engine.rows, engine.dimension) != (manifest.rows, manifest.front_dimension):
            raise CorruptError(
                f"{manifest.path_of(folder, 'faiss')} holds {engine.rows} rows × {engine.dimension}; its manifest says "
                f"{manifest.rows} × {manifest.front_dimension}"
            )
        front = Front(manifest.dimension, manifest.front_dimension, manifest.front_key, manifest.metric, manifest.scale)
        return cls(part, name, manifest, Searcher(engine, front, rows, manifest.candidates))

    def search(self, term: Term, *, top_k: int, bottom_k: int = 0) -> tuple[Ranking, Ranking]:
        """The best and the worst rows of the part for each query of ``term``, with the scores of exact search.

        Some rows may be missing from a ranking (see ``recall`` of the manifest), but the scores of the others are
        exact. UsageError for what :meth:`refuse` refuses, CorruptError for a damaged row.
        """
        self.refuse([term])
        return self._searcher.search(term, top_k=top_k, bottom_k=bottom_k)

    def search_among(
        self, term: Term, allowed_N: NDArray[np.bool_], *, top_k: int, bottom_k: int = 0
    ) -> tuple[Ranking, Ranking] | None:
        """:meth:`search` among the allowed rows; None if this index cannot filter, see `query.ann.engine`."""
        self.refuse([term])
        return self._searcher.search_among(term, allowed_N, top_k=top_k, bottom_k=bottom_k)

    def settings(self) -> dict[str, Any]:
        """What the settings of a result say about the index: its name, how it searches, and its measured recall."""
        manifest = self.manifest
        return {
            "index": "ann",
            "index_name": self.name,
            "factory": manifest.factory,
            "candidates": manifest.candidates,
            "recall": {kind: asdict(recall) for kind, recall in manifest.recall.items()},
        }

    def refuse(self, terms: Sequence[Term]) -> None:
        """UsageError, with the reason, for scores that this index cannot rank by."""
        exact = "; use `index=exact`"
        if len(terms) != 1:
            raise UsageError(f"an index is of one part, the scores are summed over {len(terms)}{exact}")
        (term,) = terms
        if (term.part.path, term.part.name) != (self.part.path, self.part.name):
            raise UsageError(f"index {self.name!r} is of part {self.part.name!r}, not {term.part.name!r}{exact}")
        if term.metric != self.manifest.metric:
            raise UsageError(
                f"index {self.name!r} is for `metric={self.manifest.metric}`, not {term.metric}: "
                f"`ghoststore index --metric {term.metric}` makes one, or give `metric={self.manifest.metric}`"
            )
        refuse_lengths(term.metric, some_layers=term.groups is not None, preconditioned=term.preconditioner is not None)


def refuse_lengths(metric: Metric, *, some_layers: bool, preconditioned: bool) -> None:
    """UsageError for cosines by other lengths than those of whole vectors as they are stored."""
    if metric == "cosine" and some_layers:
        raise UsageError(
            "an index by cosine ranks whole vectors, not some layers: these have lengths of their own; use "
            "`index=exact`, or `metric=dot`"
        )
    if metric == "cosine" and preconditioned:
        raise UsageError("an index by cosine knows no preconditioned lengths; use `index=exact`, or `metric=dot`")


def refuse_foreign(part: Part, name: str, manifest: IndexManifest) -> None:
    """UsageError unless this user built the index: FAISS trusts the offsets in an index file, and a crafted file could
    make it read any memory.
    """
    if not is_own_digest(manifest.digest):
        raise UsageError(
            f"index {name!r} of part {part.name!r} was not built by you on this machine: FAISS reads whatever its file "
            f"points to, so one from elsewhere is not opened. `ghoststore index {flags_of(part.members)} --name {name} "
            f"--metric {manifest.metric} --factory {manifest.factory} --rebuild` builds it here, or use `index=exact`"
        )


def choose_index(part: Part, metric: Metric | None) -> str:
    """The name of the only index of ``part``, or of the only one for ``metric``. UsageError otherwise."""
    own = own_index_names(part)
    names = [name for name in own if metric is None or read_manifest(part, name).metric == metric]
    if len(names) == 1:
        return names[0]
    wanted = "index" if metric is None else f"index for `metric={metric}`"
    if not names:
        command, other = f"ghoststore index {flags_of(part.members)}", ""
        if metric is not None:
            command = f"ghoststore index {flags_of(part.members)} --metric {metric}"
        if own:
            other = f", or give `metric={read_manifest(part, own[0]).metric}`, which it has one for"
        raise UsageError(f"part {part.name!r} has no {wanted}; `{command}` makes one{other}")
    raise UsageError(f"part {part.name!r} has more than one {wanted}; choose with `index_name`: {', '.join(names)}")


def _table(path: Path, part: Part) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """The table of rows (:data:`ROW`), memory-mapped; CorruptError if it names rows that the part cannot have."""
    table: np.ndarray[tuple[int], np.dtype[np.void]] = np.memmap(path, dtype=ROW, mode="r")
    rows = table["row"]
    if rows[0] < 0 or rows[-1] >= part.layout.rows or bool((rows[1:] <= rows[:-1]).any()):
        raise CorruptError(f"{path} names rows that part {part.name!r} cannot have")
    return table
