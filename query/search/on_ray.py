"""Exact search on a Ray cluster: actors keep the exact best rows of ranges of spans, and merging these is exact.

An actor gets the same ranges for every question, so that what it has read stays warm: files in its node's memory,
objects in its own. The nodes must see the store at the same place, and have ghoststore installed. What goes between
the processes are names, numbers and arrays.

Legend: Q queries, N rows of the part, D numbers of a vector.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ghoststore.cluster import Actors, actors_there_can_be, ray_cluster
from ghoststore.errors import GhostStoreError, StorageError, UsageError
from ghoststore.progress import Task
from ghoststore.store import Part, Store
from ghoststore.store.base.object_path import ObjectPath
from ghoststore.store.part.united import UnitedPart
from ghoststore.store.spans.reader import WarmChunks
from query.search.part_score import Metric, Term
from query.search.search import Combine, ExactSearch, searched_spans, units_of
from query.search.top_k import Pairs, Ranking, RunningTopK

PIECES = 4
"""Ranges of spans of an actor: one that dies loses no more than one, and others take what is left of a slow one."""
WARM_BYTES = 1 << 30
"""Most bytes of objects that an actor keeps from one question to the next."""


class Searcher:
    """What the actor is. It keeps the parts that it has opened, and what the last question has made of them."""

    def __init__(self, store: str) -> None:
        torch.set_num_threads(1)  # it has one core
        self._store, self._warm = store, WarmChunks(WARM_BYTES)
        self._parts: dict[str, Part] = {}
        self._asked: tuple[str, list[Part], ExactSearch] | None = None

    def search(self, question: Mapping[str, Any], spans: Sequence[int]) -> tuple[Pairs, Pairs] | GhostStoreError:
        """The best and the worst rows of ``spans``, for each query of ``question`` (:func:`_asked`)."""
        try:
            exact = self._of(question, spans)
            exact.over(spans)
            return exact.taken()
        except GhostStoreError as error:
            return error

    def _of(self, question: Mapping[str, Any], spans: Sequence[int]) -> ExactSearch:
        if self._asked is None or self._asked[0] != question["key"]:
            self._asked = self._opened(question)
        if missing := self._missing(self._asked[1], spans):
            self._parts.clear()  # committed since they were opened
            self._asked = self._opened(question)
            missing = self._missing(self._asked[1], spans)
        if missing:
            raise self._another(f"span {missing[0]} of part {self._asked[1][0].name!r} is not committed there")
        return self._asked[2]

    @staticmethod
    def _missing(parts: Sequence[Part], spans: Sequence[int]) -> list[int]:
        return [span for span in spans if not all(span in part.spans for part in parts)]

    def _opened(self, question: Mapping[str, Any]) -> tuple[str, list[Part], ExactSearch]:
        terms = []
        for term in question["terms"]:
            members = [self._part(name, identity) for name, identity in term["members"]]
            part = members[0] if len(members) == 1 else UnitedPart(members)
            part.warm = self._warm
            queries_QD = torch.from_numpy(np.array(term["queries"]))  # Ray's own array cannot be written
            terms.append(Term(part, queries_QD, term["metric"], term["weight"], term["groups"], None))
        exact = ExactSearch(
            terms,
            top_k=question["top_k"],
            bottom_k=question["bottom_k"],
            combine=question["combine"],
            allowed_N=question["allowed"],
        )
        return question["key"], [term.part for term in terms], exact

    def _part(self, name: str, identity: str) -> Part:
        part = self._parts.get(name)
        if part is None or part.open or part.identity != identity:
            try:
                part = Store.open(self._store).part(name)
            except UsageError as error:
                raise self._another(str(error)) from error
            if part.identity != identity:
                raise self._another(f"part {name!r} is another one there")
            self._parts[name] = part
        return part

    def _another(self, problem: str) -> StorageError:
        import ray

        return StorageError(
            f"node {ray.util.get_node_ip_address()} of the Ray cluster does not see what this process sees at "
            f"{self._store}: {problem}. All nodes must see the store at the same place"
        )


class RaySearch:
    """:func:`query.search.search.search` on the actors of a cluster. :func:`searching_on_ray` makes it."""

    def __init__(self, ray: Any, actors: Actors[list[int]]) -> None:
        self._ray, self._actors = ray, actors

    def __call__(
        self,
        terms: Sequence[Term],
        *,
        top_k: int,
        bottom_k: int = 0,
        combine: Combine | None = None,
        device: str = "cpu",
        task: Task | None = None,
        allowed_N: NDArray[np.bool_] | None = None,
    ) -> tuple[Ranking, Ranking]:
        """As :func:`~query.search.search.search` on a CPU of the cluster's kind, whatever ``device`` is: the same bits.

        StorageError if a node sees another store, WorkerError if actors die again and again.
        """
        units_Q = units_of(terms, combine)
        best, worst = RunningTopK(len(units_Q), top_k), RunningTopK(len(units_Q), bottom_k)
        question = self._ray.put(_asked(terms, top_k, bottom_k, combine, allowed_N))
        layout = terms[0].part.layout

        def order(actor: Any, spans: list[int]) -> Any:
            return actor.search.remote(question, spans)

        ranges = _ranges(layout.spans, searched_spans(terms, allowed_N), len(self._actors))
        with closing(self._actors.each(ranges, order)) as results:
            for spans, (high, low) in results:
                best.add(high)
                worst.add(low)
                if task:
                    task.advance(sum(stop - start for start, stop in map(layout.span_of, spans)))
        return best.ranking(units_Q), worst.ranking(units_Q, -1.0)


@contextmanager
def searching_on_ray(address: str | None, parts: Sequence[Part]) -> Iterator[RaySearch]:
    """A search of parts of the store of ``parts``, by as many actors as the cluster at ``address`` has room for, one
    core each, and no more than there are spans. They live while the block runs.

    UsageError if Ray is not installed, and where it has no cluster, or no room.
    """
    store = parts[0].path.parent.parent
    with ray_cluster(address) as ray:
        count = min(actors_there_can_be(ray, None), parts[0].layout.spans)
        place = str(store) if isinstance(store, ObjectPath) else str(store.absolute())
        actors: Actors[list[int]] = Actors(ray, Searcher, [place], count)
        try:
            yield RaySearch(ray, actors)
        finally:
            actors.end()


def refuse_terms_on_ray(metric: Metric, precondition: str) -> None:
    """UsageError for scores that need more of a part than its rows."""
    if metric == "cosine" and precondition != "none":
        raise UsageError(
            "`engine=ray` does not do `precondition=second-moment` with `metric=cosine`, which needs the length of "
            "every row in that metric: leave `engine` out, or give `metric=dot`"
        )


def _asked(
    terms: Sequence[Term], top_k: int, bottom_k: int, combine: Combine | None, allowed_N: NDArray[np.bool_] | None
) -> dict[str, Any]:
    """What the actors are told. Queries are preconditioned and scaled already."""
    return {
        "key": uuid.uuid4().hex,
        "terms": [
            {
                "members": [(member.name, member.identity) for member in term.part.members],
                "queries": term.queries_QD.numpy(),
                "metric": term.metric,
                "weight": term.weight,
                "groups": None if term.groups is None else list(term.groups),
            }
            for term in terms
        ],
        "top_k": top_k,
        "bottom_k": bottom_k,
        "combine": combine,
        "allowed": allowed_N,
    }


def _ranges(spans: int, searched: Sequence[int], actors: int) -> list[list[list[int]]]:
    """For each actor its ranges: those of the ``searched`` spans that lie in them. The same ranges for any question."""
    wanted, count = set(searched), min(spans, actors * PIECES)
    ranges: list[list[list[int]]] = [[] for _ in range(actors)]
    for number, piece in enumerate(np.array_split(np.arange(spans), count)):
        if chosen := [int(span) for span in piece if span in wanted]:
            ranges[number * actors // count].append(chosen)
    return ranges
