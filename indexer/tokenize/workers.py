"""Processes that write shards side by side.

Each is a :class:`~ghoststore.piped.PipedProcess`: it gets a job, then lists of shards, and answers with what it wrote.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from multiprocessing.connection import wait
from typing import Any

from ghoststore.errors import GhostStoreError, WorkerError
from ghoststore.piped import Ended, PipedProcess, orders
from indexer.tokenize.writer import ShardJob, ShardWriter, Written


class _Worker:
    """One process, seen from the one that started it."""

    def __init__(self, number: int, job: ShardJob) -> None:
        self.number = number
        self.piece: Sequence[int] = ()
        """The shards it is at."""
        self.process = PipedProcess("indexer.tokenize.workers")
        self.process.send(job)

    def write(self, shards: Sequence[int]) -> None:
        """Have it write ``shards``."""
        self.piece = shards
        self.process.send(shards)

    def hear(self) -> Any:
        """What it says next. WorkerError if it has ended."""
        try:
            return self.process.receive()
        except Ended as end:
            raise WorkerError(
                f"worker {self.number} {end} while it tokenized shards {self.piece[0]} to {self.piece[-1]}. What was "
                "committed is intact: the same command resumes. If memory ran out, give fewer `workers` or "
                "`shard_samples`"
            ) from None


def write_side_by_side(job: ShardJob, pieces: Sequence[Sequence[int]], workers: int) -> Generator[Written]:
    """Write ``pieces`` (lists of shards), each in one go, by ``workers`` processes; what each wrote, as it comes.

    Raises WorkerError naming a process that died, and the errors of `ShardWriter`; the other workers end, too.
    """
    waiting = deque(pieces)
    started: list[_Worker] = []
    try:
        started.extend(_Worker(number, job) for number in range(min(workers, len(waiting))))
        for worker in started:
            worker.write(waiting.popleft())
        at_work: dict[Any, _Worker] = {worker.process.pipe: worker for worker in started}
        while at_work:
            for pipe in wait(list(at_work)):
                answer = at_work[pipe].hear()
                if isinstance(answer, GhostStoreError):
                    raise answer
                if answer is not None:
                    yield answer
                elif waiting:
                    at_work[pipe].write(waiting.popleft())
                else:
                    del at_work[pipe]
    finally:
        for worker in started:
            worker.process.end()


def main() -> None:
    """Write the shards of each order after the first, which is the job."""
    with orders() as coming:
        writer = ShardWriter(coming.next())
        while True:
            for written in writer.write(coming.next()):
                coming.answer(written)
            coming.answer(None)


if __name__ == "__main__":
    main()
