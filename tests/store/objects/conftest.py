"""A lab whose stores are in object storage: a real server on loopback, and processes that know its address."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import Lab, Outcome, open_lab, tree
from tests.support.object_server import Request, Server, contents, serving


@dataclass
class Bucket:
    """The server, and a lab for it. ``whole`` are the files of the store that an undisturbed local build makes."""

    server: Server
    lab: Lab
    environment: dict[str, str]
    """The variables of a process that uses the server."""
    whole: dict[str, bytes] = field(default_factory=dict)

    @contextmanager
    def used_here(self) -> Iterator[None]:
        """This process uses the server: others have a state of their own."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            yield

    def tree(self, name: str) -> dict[str, bytes]:
        """Every object of the store called ``name``."""
        return contents(self.server, name)

    def build(self, name: str, *options: str) -> Outcome:
        return self.lab.build(Path(f"s3:/bucket/{name}"), *options)

    def killed(self, name: str, number: int, *, after: bool = False) -> int:
        """:meth:`killed_command` of a build."""
        words = ["build", "--store", f"s3://bucket/{name}", "--checkpoint", str(self.lab.checkpoint), "--quiet"]
        return self.killed_command(
            [*words, "--data", str(self.lab.corpus), "--span-rows", "6", "--name", "part"], number, after=after
        )

    def killed_command(self, words: Sequence[str], number: int, *, after: bool = False) -> int:
        """Kill a command at its ``number``-th request that writes: before the server gets it, or after it did it.

        Returns the number of such requests; if there were fewer, the command ended by itself.
        """
        pids: list[int] = []
        started, lock, writes = threading.Event(), threading.Lock(), [0]

        def kill(request: Request) -> bool:
            if not request.writes:
                return False
            started.wait()
            with lock:
                writes[0] += 1
                if writes[0] != number:
                    return writes[0] > number and after
            os.kill(pids[0], signal.SIGKILL)
            return True

        if after:
            self.server.lose = kill
        else:
            self.server.refuse = kill
        pids.append(self.lab.start(*words))
        started.set()
        outcome = self.lab.wait(pids[0])
        assert outcome.code == (-signal.SIGKILL if writes[0] >= number else 0), outcome.err
        self.server.reset()
        return writes[0]


@pytest.fixture(scope="session")
def bucket_of_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    folder = tmp_path_factory.mktemp("objects")
    ours = {"XDG_CACHE_HOME": str(folder / "cache"), "XDG_STATE_HOME": str(folder / "state")}
    with serving() as server:
        environment = {**server.environment, **ours}
        lab = open_lab(folder, **environment)
        local = lab.build(folder / "whole")
        assert local.code == 0, local.err
        yield Bucket(server, lab, environment, tree(folder / "whole"))
        lab.close()


@pytest.fixture(autouse=True)
def variables(bucket_of_session: Bucket) -> Iterator[None]:
    """This process uses the server during each of these tests."""
    with bucket_of_session.used_here():
        yield


@pytest.fixture
def bucket(bucket_of_session: Bucket) -> Bucket:
    """The server behaves, and counts from zero."""
    bucket_of_session.server.reset()
    return bucket_of_session


@pytest.fixture(scope="session")
def remote(bucket_of_session: Bucket) -> str:
    """A complete store that nothing changes, with the part ``part``: the copy in object storage of ``whole``."""
    outcome = bucket_of_session.build("remote")
    assert outcome.code == 0, outcome.err
    return "s3://bucket/remote"
