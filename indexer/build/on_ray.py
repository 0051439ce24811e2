"""Workers that are actors of a Ray cluster: each holds the model, and builds the lists of spans that it is given.

The nodes of the cluster must see the same store, checkpoint and corpus, at the same paths, and have ghoststore
installed. An actor, or a node, that dies takes only unfinished spans with it.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from ghoststore.cluster import ray_cluster, room, runtime_environment
from ghoststore.errors import GhostStoreError, UsageError
from ghoststore.progress import Progress
from ghoststore.settings.build import BuildOptions
from indexer.build.crew import Death, Done, Event, Hand, Ready, build_by
from indexer.build.estimate import report_of
from indexer.build.opened import opened
from indexer.build.report import BuildReport
from indexer.build.sent import Sent
from indexer.build.spans import KeptEncoder, compute_lists

NEWS_SECONDS = 1.0
"""How long a call for news waits for the first."""


class Builder:
    """What the actor is: one thread builds, another answers calls for news."""

    def __init__(self) -> None:
        self._news: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._sent = Sent(self._news.put)
        self._stack = ExitStack()

    def open(self, keywords: Mapping[str, Any]) -> Ready | GhostStoreError:
        """Open the model and the part, beginning it if it is not there."""
        try:
            # What is committed was checked by the process that made this actor.
            opening = opened(BuildOptions(**keywords), self._sent, lambda spans: [])
            self._job, self._part = self._stack.enter_context(opening)
            self._kept = self._stack.enter_context(KeptEncoder(self._job))
        except GhostStoreError as error:
            return error
        return Ready(report=report_of(self._job), learning=self._job.learning_seconds)

    def build(self, spans: Sequence[int]) -> Done | GhostStoreError:
        """Build and commit ``spans``."""
        try:
            compute_lists(
                self._part, self._job, self._sent, iter([spans]), kept=self._kept, done=lambda: None, wake=lambda: None
            )
        except GhostStoreError as error:
            return error
        return Done()

    def close(self) -> Death:
        """Leave the part."""
        self._stack.close()
        return Death("it was let go")

    def news(self) -> list[Event]:
        """What has happened since the last call, after waiting a little for the first."""
        events: list[Event] = []
        try:
            events.append(self._news.get(timeout=NEWS_SECONDS))
            while True:
                events.append(self._news.get_nowait())
        except queue.Empty:
            return events


class _Actor:
    """One actor, seen from the driver."""

    def __init__(self, ray: Any, number: int, actor: Any, keywords: Mapping[str, Any]) -> None:
        self.number = number
        self._ray, self._actor = ray, actor
        self.work = actor.open.remote(dict(keywords))
        self.news = actor.news.remote()

    def order(self, spans: Sequence[int] | None) -> None:
        self.work = self._actor.close.remote() if spans is None else self._actor.build.remote(list(spans))

    def said(self, reference: Any) -> Iterator[Any]:
        """What ``reference``, one of its two, has brought."""
        try:
            value = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            yield Death(f"worker {self.number} (a Ray actor) ended: {str(error).strip().splitlines()[0]:.200}")
            return
        if reference == self.news:
            self.news = self._actor.news.remote()
            yield from value
        else:
            yield value

    def end(self) -> None:
        self._ray.kill(self._actor, no_restart=True)


class Actors:
    """Workers that are actors, each with so many cores and GPUs."""

    ahead = 1

    def __init__(self, ray: Any, cores: int, gpus: float) -> None:
        self._ray = ray
        # Not restarted by Ray: an actor begins with opening the part, and the crew knows what it had not committed.
        self._kind = ray.remote(
            num_cpus=cores,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=2,
            runtime_env=runtime_environment(),
        )(Builder)

    def start(self, number: int, keywords: Mapping[str, Any]) -> Hand:
        return _Actor(self._ray, number, self._kind.remote(), keywords)

    def hear(self, hands: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        of_reference = {reference: hand for hand in hands for reference in (hand.work, hand.news)}
        for reference in self._ray.wait(list(of_reference), num_returns=1)[0]:
            hand = of_reference[reference]
            for message in hand.said(reference):
                yield hand, message


def build_on_ray(options: BuildOptions, progress: Progress) -> BuildReport:
    """``ghoststore.build`` by actors of a Ray cluster: ``options.workers`` of them, by default one a GPU, or a core.

    UsageError if the cluster has no room for them.
    """
    with ray_cluster(options.ray_address) as ray:
        have = ray.cluster_resources()
        cores, gpus = int(have.get("CPU", 0)), have.get("GPU", 0)
        a_worker = options.num_gpus
        if a_worker is None:
            a_worker = 1.0 if gpus and options.device in ("auto", "cuda") else 0.0
        at_most = room(ray, 1, a_worker)
        count = options.workers or max(1, at_most)
        if count > at_most:
            raise UsageError(
                f"`workers={count}`: the Ray cluster has room for {at_most} workers of at least one core and "
                f"{a_worker:g} GPU(s); it has {cores} cores and {gpus:g} GPUs"
            )
        # With a GPU for each, one core feeds it; on CPUs they share all.
        return build_by(Actors(ray, 1 if a_worker else cores // count, a_worker), count, options, progress)
