"""Files that Zarr still writes when a write of an array has failed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 60.0
"""The most that they are waited for."""
_one_at_a_time = threading.Lock()
"""Two that wait would wait for each other."""


@contextmanager
def settled() -> Iterator[None]:
    """If the block fails, end only when Zarr's threads write no more: where one of an array's files fails, the others
    are still written, and a folder that is removed meanwhile is made again.
    """
    try:
        yield
    except BaseException:
        _wait()
        raise


def _wait() -> None:
    sync = sys.modules.get("zarr.core.sync")
    if sync is None or sync.loop[0] is None:
        return
    import asyncio

    async def others() -> None:
        if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(tasks, timeout=SECONDS)

    with _one_at_a_time:
        sync.sync(others())
