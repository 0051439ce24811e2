"""Ray clusters of several nodes on this machine, of which some die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ghoststore.progress import Silent, Task

SHARED_MEMORY = 80 << 20
"""Bytes of Ray's object store, which little here uses: the least that Ray allows."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes of one core each."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    settings = {"num_cpus": 1, "object_store_memory": SHARED_MEMORY, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=settings)
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=SHARED_MEMORY)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class Striking(Silent):
    """Calls ``strike`` when a bar called ``at`` advances for the first time."""

    def __init__(self, strike: Any, at: str = "building") -> None:
        self.strike, self.at = strike, at
        self.notes: list[str] = []

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Task:
        listener = self

        class Bar(type(super().task("", None))):  # type: ignore[misc]
            def advance(self, rows: int, tokens: int = 0) -> None:
                if description == listener.at and listener.strike is not None:
                    listener.strike()
                    listener.strike = None

        return Bar()

    def note(self, message: str) -> None:
        self.notes.append(message)


def kill_one(name: bytes) -> None:
    """Kill a process of this machine whose command line holds ``name``."""
    names = (path for path in Path("/proc").glob("[0-9]*/cmdline") if name in bytes_of(path))
    os.kill(int(next(names).parent.name), signal.SIGKILL)


def bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
