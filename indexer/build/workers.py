"""Processes of one machine that build a part side by side.

Each is a fresh interpreter (:mod:`indexer.build.worker`) on one end of a pipe. It opens the model and the
corpus, then gets lists of spans and builds them. It ends the moment the other end closes, so that none outlives a
process that was killed.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ghoststore.machine import CORES
from ghoststore.progress import Progress
from ghoststore.settings.build import BuildOptions
from indexer.build.crew import Death, Hand, build_by
from indexer.build.report import BuildReport

HANG_UP = (EOFError, BrokenPipeError, ConnectionResetError)


class _Process:
    """One process, seen from the one that started it."""

    def __init__(self, number: int, keywords: Mapping[str, Any], threads: int) -> None:
        self.number = number
        self.pipe: Connection[Any, Any]
        self.pipe, theirs = Pipe()
        with theirs:
            # Its own session: an interrupt reaches the parent alone, which then hangs up.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "indexer.build.worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
                env={
                    "OMP_NUM_THREADS": str(threads),
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),
                    "TOKENIZERS_PARALLELISM": "false",
                },
            )
        self._send(keywords)

    def order(self, spans: Sequence[int] | None) -> None:
        self._send(spans)

    def hear(self) -> Any:
        """What it says next."""
        try:
            return self.pipe.recv()
        except (*HANG_UP, pickle.UnpicklingError, OSError):  # the last two if it was killed while it wrote
            code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return Death(f"worker {self.number} (process {self.process.pid}) {how}")

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.wait()

    def _send(self, order: Any) -> None:
        with suppress(*HANG_UP):  # it has died: the pipe says so to whoever reads it
            self.pipe.send(order)


class Processes:
    """Workers that are processes of this machine, on ``devices`` in turn."""

    def __init__(self, count: int, devices: Sequence[str]) -> None:
        self._devices = devices
        self._threads = max(1, CORES // count)

    def start(self, number: int, keywords: Mapping[str, Any]) -> Hand:
        device = self._devices[(number - 1) % len(self._devices)]
        return _Process(number, {**keywords, "device": device}, self._threads)

    def hear(self, hands: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        of_pipe = {hand.pipe: hand for hand in hands}
        for pipe in wait(list(of_pipe)):
            yield of_pipe[pipe], of_pipe[pipe].hear()


def build_side_by_side(options: BuildOptions, progress: Progress) -> BuildReport:
    """``ghoststore.build`` by ``options.workers`` processes of this machine, see :mod:`indexer.build.crew`."""
    assert options.workers is not None
    return build_by(Processes(options.workers, devices_of(options)), options.workers, options, progress)


def devices_of(options: BuildOptions) -> list[str]:
    """The devices of the workers, in turn: those given; every GPU where GPUs are asked for and none by its number."""
    if options.devices:
        return [
            f"cuda:{device}" if device.isdigit() else device for word in options.devices for device in word.split(",")
        ]
    if options.device in ("auto", "cuda") and torch.cuda.is_available():
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [options.device]
