"""Processes that write shards side by side.

Each is a fresh interpreter (``python -m indexer.tokenize.workers``) on one end of a pipe: it gets a job, then lists of
shards, and answers with what it wrote. It ends the moment the other end closes, so that no worker outlives a
process that was killed.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from ghoststore.errors import GhostStoreError, WorkerError
from ghoststore.processes import end_with
from indexer.tokenize.writer import ShardJob, ShardWriter, Written

HANG_UP = (EOFError, BrokenPipeError, ConnectionResetError)


class _Worker:
    """One process, seen from the one that started it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.piece: Sequence[int] = ()
        """The shards it is at."""
        self.pipe: Connection[Any, Any]
        self.pipe, theirs = Pipe()
        with theirs:
            # Its own session: an interrupt reaches the parent alone, which then hangs up.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "indexer.tokenize.workers", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),
                    "TOKENIZERS_PARALLELISM": "false",
                },
            )

    def send(self, order: ShardJob | Sequence[int]) -> None:
        try:
            self.pipe.send(order)
        except HANG_UP:
            raise self.died() from None

    def died(self) -> WorkerError:
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        at = f" while it tokenized shards {self.piece[0]} to {self.piece[-1]}" if self.piece else ""
        return WorkerError(
            f"worker {self.number} (process {self.process.pid}) {how}{at}. What was committed is intact: the same "
            "command resumes. If memory ran out, give fewer `workers` or `shard_samples`"
        )


def write_side_by_side(job: ShardJob, pieces: Sequence[Sequence[int]], workers: int) -> Generator[Written]:
    """Write ``pieces`` (lists of shards), each in one go, by ``workers`` processes; what each wrote, as it comes.

    Raises WorkerError naming a process that died, and the errors of `ShardWriter`; the other workers end, too.
    """
    waiting = deque(pieces)
    started: list[_Worker] = []
    try:
        started.extend(_Worker(number) for number in range(min(workers, len(waiting))))
        at_work: dict[Any, _Worker] = {}
        for worker in started:
            worker.send(job)
            worker.piece = waiting.popleft()
            worker.send(worker.piece)
            at_work[worker.pipe] = worker
        while at_work:
            for pipe in wait(list(at_work)):
                worker = at_work[pipe]
                try:
                    answer = worker.pipe.recv()
                except HANG_UP:
                    raise worker.died() from None
                if isinstance(answer, GhostStoreError):
                    raise answer
                if answer is not None:
                    yield answer
                elif waiting:
                    worker.piece = waiting.popleft()
                    worker.send(worker.piece)
                else:
                    del at_work[pipe]
    finally:
        for worker in started:
            worker.pipe.close()
            worker.process.kill()
        for worker in started:
            worker.process.wait()


def serve(pipe: Connection[Any, Any], parent: int) -> None:
    """What a worker of the process ``parent`` does until the other end of its pipe closes."""
    orders: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                orders.put(pipe.recv())
        except HANG_UP:
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    end_with(parent)
    try:
        try:
            writer = ShardWriter(orders.get())
            while True:
                for written in writer.write(orders.get()):
                    pipe.send(written)
                pipe.send(None)
        except GhostStoreError as error:
            pipe.send(error)
            orders.get()  # the other end hangs up
    except HANG_UP:
        os._exit(0)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
