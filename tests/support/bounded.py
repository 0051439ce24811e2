"""``ghoststore`` in a process that may take little more memory than it has, and that is ended where it hangs."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghoststore.store.base.records import json_digest

if TYPE_CHECKING:
    from tests.conftest import Lab, Outcome

MEMORY = 1 << 30
"""Address space beyond what the process has after its imports: threads reserve some hundred MiB of it."""
HANGS = 120
"""Seconds after which a process that waits, or computes without end, gets SIGALRM: no test waits that long."""

BOUNDED = """
from tests.support.bounded import bound
bound({memory})
from ghoststore.cli import main
main({args!r})
"""


def bound(memory: int = MEMORY) -> None:
    """Let this process take so many more bytes of memory than it has, and end when it hangs."""
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.alarm(HANGS)


def run_bounded(lab: Lab, *args: str | Path, memory: int = MEMORY, **order: Any) -> Outcome:
    """``ghoststore ARGS…`` within ``memory`` more bytes."""
    code = BOUNDED.format(memory=memory, args=[str(arg) for arg in args])
    return lab.run(code=code, **order)


def refused(outcome: Outcome, *words: str, codes: tuple[int, ...] = (2, 3, 4)) -> None:
    """It ended in words, with one of ``codes``: not by a signal, nor with a traceback."""
    assert outcome.code in codes, outcome.err[-3000:]
    assert "Traceback" not in outcome.err, outcome.err[-3000:]
    for word in words:
        assert word in outcome.err, outcome.err[-3000:]


def reseal(folder: Path, change: Any) -> None:
    """Change the attributes of a part or a run as somebody who knows the checksums would."""
    path = folder / "zarr.json"
    metadata = json.loads(path.read_text())
    attributes = metadata["attributes"]
    change(attributes)
    attributes["manifest_sha256"] = json_digest(attributes["manifest"])
    attributes["files_sha256"] = json_digest(attributes["files"])
    path.write_text(json.dumps(metadata))
