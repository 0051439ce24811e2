"""Ray clusters: joining one, or starting one on this machine."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from ghoststore.errors import GhostStoreError, UsageError, WorkerError

T = TypeVar("T")
DEATHS = 5
"""Actors that may die in each place, one after the other, without a result in between."""
PATIENCE = 10.0
"""Seconds without any answer after which it is asked whether the cluster has a node left."""


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Any]:
    """The module ``ray``, connected while the block runs.

    ``address`` is that of a cluster. None: the one that this process has joined, that of RAY_ADDRESS, the one that runs
    on this machine, or else a new one of this machine alone, which ends with the block.

    UsageError if Ray is not installed or the cluster cannot be joined.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    try:
        import ray
    except ImportError:
        raise UsageError("`engine=ray` needs Ray: pip install 'ghoststore[ray]'") from None
    if ray.is_initialized():
        if address is not None and address != ray.get_runtime_context().gcs_address:
            raise UsageError(
                f"`ray_address={address}`: this process has joined another cluster, "
                f"{ray.get_runtime_context().gcs_address}; leave that (`ray.shutdown()`), or give no address"
            )
        yield ray
        return
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"`ray_address={address}`: no Ray cluster can be joined there: {error!s:.300}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def runtime_environment() -> dict[str, Any]:
    """What Ray's workers on this machine are given, so that they import what this process imports."""
    return {
        "env_vars": {
            "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),
            "TOKENIZERS_PARALLELISM": "false",
        }
    }


def room(ray: Any, cores: int, gpus: float) -> int:
    """How many actors of so many cores and GPUs the cluster could hold if nothing else ran."""
    have = ray.cluster_resources()
    at_once = int(have.get("CPU", 0)) // cores
    return min(at_once, int(have.get("GPU", 0) / gpus)) if gpus else at_once


class Actors(Generic[T]):
    """``count`` actors ``kind(*arguments)``, one core each, that stay until :meth:`end`: each has a place, and its own
    items.

    An actor that dies, or whose node does, is begun anew where there is room; until then the others do its items.
    """

    def __init__(self, ray: Any, kind: type, arguments: Sequence[Any], count: int, gpus: float = 0.0) -> None:
        self._ray, self._arguments = ray, arguments
        self._kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, runtime_env=runtime_environment())(kind)
        self._gpus = gpus
        self._actors: list[Any] = []
        self._beginning: dict[Any, int] = {}
        """By what they wait for, the places of actors that are not known to be there yet."""
        for place in range(count):
            self._actors.append(None)
            self._begin(place)

    def __len__(self) -> int:
        return len(self._actors)

    def _begin(self, place: int) -> None:
        actor = self._kind.remote(*self._arguments)
        self._actors[place] = actor
        self._beginning[actor.__ray_ready__.remote()] = place

    def each(self, items: Sequence[Sequence[T]], order: Callable[[Any, T], Any]) -> Generator[tuple[T, Any]]:
        """(item, result) for each of the ``items`` of each place, as they come. An actor without items left takes the
        last one of the place with most.

        ``order(actor, item)`` calls a method that gives the result, or returns a GhostStoreError, which is raised. An
        item may be done twice, which must be harmless. WorkerError if actors die one after the other without a result
        in between, or no node has room for one.
        """
        ray, deaths = self._ray, 0
        waiting = [deque(some) for some in items]
        idle = set(range(len(self))) - set(self._beginning.values())
        at_work: dict[Any, tuple[int, T]] = {}
        while at_work or any(waiting):
            for place in sorted(idle):
                if not any(waiting):
                    break
                longest = max(waiting, key=len)
                item = waiting[place].popleft() if waiting[place] else longest.pop()
                at_work[order(self._actors[place], item)] = (place, item)
                idle.discard(place)
            reference = self._first([*at_work, *self._beginning])
            try:
                result = ray.get(reference)
            except _lost(ray) as error:
                deaths += 1
                if deaths > DEATHS * len(self):
                    raise _dead(deaths, error) from error
                if reference in at_work:
                    place, item = at_work.pop(reference)
                    waiting[place].appendleft(item)
                    ray.kill(self._actors[place], no_restart=True)  # only its answer may be lost
                else:
                    place = self._beginning.pop(reference)
                self._begin(place)
                continue
            if reference in self._beginning:
                idle.add(self._beginning.pop(reference))
                continue
            place, item = at_work.pop(reference)
            idle.add(place)
            if isinstance(result, GhostStoreError):
                raise result
            deaths = 0
            yield item, result

    def _first(self, references: list[Any]) -> Any:
        """The first of ``references`` that is there."""
        while True:
            done, _ = self._ray.wait(references, num_returns=1, timeout=PATIENCE)
            if done:
                return done[0]
            if len(references) == len(self._beginning) and not room(self._ray, 1, self._gpus):
                raise WorkerError(
                    "no node of the Ray cluster is left that has room for an actor. What was written is intact: the "
                    "same command resumes"
                )

    def end(self) -> None:
        """End the actors, whatever they do."""
        for actor in self._actors:
            self._ray.kill(actor, no_restart=True)


def _lost(ray: Any) -> tuple[type[Exception], ...]:
    """What tells that an actor is gone, or what it has answered."""
    errors = ray.exceptions
    return (errors.RayActorError, errors.ObjectLostError, errors.NodeDiedError, errors.WorkerCrashedError)


def _dead(deaths: int, error: Exception) -> WorkerError:
    how = str(error).strip().splitlines()[0]
    return WorkerError(
        f"{deaths} of Ray's actors ended, one after the other, without a result in between; the last: {how:.200}. What "
        "was written is intact: the same command resumes"
    )


def actors_there_can_be(ray: Any, count: int | None, gpus: float = 0.0) -> int:
    """``count``, or as many as the cluster has room for. UsageError if it has not, or no room at all."""
    at_most = room(ray, 1, gpus)
    if not at_most or (count is not None and count > at_most):
        wanted = "`engine=ray`" if count is None else f"`workers={count}`"
        raise UsageError(f"{wanted}: the Ray cluster has room for {at_most} with a core each")
    return count or at_most


def on_actors(
    address: str | None,
    kind: type,
    arguments: Sequence[Any],
    items: Sequence[T],
    count: int | None,
    *,
    gpus: float = 0.0,
) -> Generator[tuple[T, Any]]:
    """(item, result) for each of ``items``, as they come, by ``count`` actors ``kind(*arguments)`` (None: as many as
    the cluster holds, one core each), whose method ``do(item)`` gives the result. See :meth:`Actors.each`.
    """
    with ray_cluster(address) as ray:
        count = min(actors_there_can_be(ray, count, gpus), len(items))
        actors: Actors[T] = Actors(ray, kind, arguments, count, gpus)
        try:
            yield from actors.each([items[place::count] for place in range(count)], _do)
        finally:
            actors.end()


def _do(actor: Any, item: Any) -> Any:
    return actor.do.remote(item)
