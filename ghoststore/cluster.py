"""Ray clusters: joining one, or starting one on this machine."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from ghoststore.errors import GhostStoreError, UsageError, WorkerError

T = TypeVar("T")
DEATHS = 5
"""Actors that may die in each place, one after the other, without a result in between."""


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
    the cluster holds, one core each), whose method ``do(item)`` gives the result, or returns a GhostStoreError.

    An actor that dies is begun anew, and its item done again: doing an item twice must be harmless. Raises the errors
    that `do` returns, and WorkerError if actors die one after the other without a result in between.
    """
    with ray_cluster(address) as ray:
        at_most = room(ray, 1, gpus)
        if count is not None and count > at_most:
            raise UsageError(f"`workers={count}`: the Ray cluster has room for {at_most} with a core each")
        actor_kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, runtime_env=runtime_environment())(kind)
        waiting, deaths = deque(items), 0
        at_work: dict[Any, tuple[Any, T]] = {}
        actors = [actor_kind.remote(*arguments) for _ in range(min(count or at_most, len(items)))]
        limit = DEATHS * len(actors)
        for actor in actors:
            item = waiting.popleft()
            at_work[actor.do.remote(item)] = (actor, item)
        try:
            while at_work:
                (reference,), _ = ray.wait(list(at_work), num_returns=1)
                actor, item = at_work.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayActorError as error:
                    deaths += 1
                    if deaths > limit:
                        how = str(error).strip().splitlines()[0]
                        raise WorkerError(
                            f"{deaths} of Ray's actors ended, one after the other, without a result in between; the "
                            f"last: {how:.200}. What was written is intact: the same command resumes"
                        ) from error
                    actor = actor_kind.remote(*arguments)
                    at_work[actor.do.remote(item)] = (actor, item)
                    continue
                if isinstance(result, GhostStoreError):
                    raise result
                deaths = 0
                if waiting:
                    following = waiting.popleft()
                    at_work[actor.do.remote(following)] = (actor, following)
                yield item, result
        finally:
            for actor, _ in at_work.values():
                ray.kill(actor, no_restart=True)
