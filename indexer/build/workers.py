"""Processes of one machine that build a part side by side.

Each (:mod:`indexer.build.worker`, a :class:`~ghoststore.piped.PipedProcess`) opens the model and the corpus, then gets
lists of spans and builds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

from ghoststore.machine import CORES
from ghoststore.piped import Ended, PipedProcess
from ghoststore.progress import Progress
from ghoststore.settings.build import BuildOptions
from indexer.build.crew import Death, Hand, build_by
from indexer.build.report import BuildReport


class _Worker:
    """One process, as the crew sees it."""

    def __init__(self, number: int, keywords: Mapping[str, Any], threads: int) -> None:
        self.number = number
        self.process = PipedProcess("indexer.build.worker", OMP_NUM_THREADS=str(threads))
        self.process.send((number, keywords))

    def order(self, spans: Sequence[int] | None) -> None:
        self.process.send(spans)

    def hear(self) -> Any:
        """What it says next."""
        try:
            return self.process.receive()
        except Ended as end:
            return Death(f"worker {self.number} {end}", again=end.killed)

    def end(self) -> None:
        self.process.end()


class Processes:
    """Workers that are processes of this machine, on ``devices`` in turn."""

    ahead = 2

    def __init__(self, count: int, devices: Sequence[str]) -> None:
        self._devices = devices
        self._threads = max(1, CORES // count)

    def start(self, number: int, keywords: Mapping[str, Any]) -> Hand:
        device = self._devices[(number - 1) % len(self._devices)]
        return _Worker(number, {**keywords, "device": device}, self._threads)

    def hear(self, hands: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        of_pipe = {hand.process.pipe: hand for hand in hands}
        for pipe in wait(list(of_pipe)):
            yield of_pipe[pipe], of_pipe[pipe].hear()


def build_side_by_side(options: BuildOptions, progress: Progress) -> BuildReport:
    """``ghoststore.build`` by ``options.workers`` processes of this machine, see :mod:`indexer.build.crew`."""
    assert options.workers is not None
    return build_by(Processes(options.workers, devices_of(options)), options.workers, options, progress)


def devices_of(options: BuildOptions) -> list[str]:
    """The devices of the workers, in turn: those given, or for each the one asked for, see :func:`device_in_turn`."""
    if options.devices:
        return [
            f"cuda:{device}" if device.isdigit() else device for word in options.devices for device in word.split(",")
        ]
    return [options.device]
