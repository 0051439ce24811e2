"""A process that builds spans of a part for another, on one end of a pipe: see :mod:`indexer.build.workers`."""

from __future__ import annotations

import os
import queue
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from ghoststore.errors import GhostStoreError
from ghoststore.processes import end_with
from ghoststore.settings.build import BuildOptions
from ghoststore.store import Part
from indexer.build.build import opened
from indexer.build.crew import Done, Ready
from indexer.build.report import BuildReport
from indexer.build.sent import Sent
from indexer.build.spans import compute_spans
from indexer.build.workers import HANG_UP


def serve(pipe: Connection[Any, Any], parent: int) -> None:
    """What a worker of the process ``parent`` does until the other end of its pipe closes."""
    orders: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                orders.put(pipe.recv())
        except HANG_UP:
            os._exit(0)

    end_with(parent)
    sent = Sent(pipe.send)
    options = BuildOptions(**pipe.recv())
    threading.Thread(target=listen, daemon=True).start()
    try:
        try:
            # What is committed was checked by the process that started this one.
            with opened(options, sent, lambda spans: []) as (job, part):
                sent.send(Ready(report=BuildReport.of(job), learning=job.learning_seconds))
                while (spans := orders.get()) is not None:
                    compute_spans(Part(part.path), job, sent, spans)
                    sent.send(Done())
        except GhostStoreError as error:
            sent.send(error)
            orders.get()  # the other end hangs up
    except HANG_UP:
        os._exit(0)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
