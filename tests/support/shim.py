"""The shim of tests/faults/shim.c: building it, and what it is told."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parent.parent / "faults" / "shim.c"
ERRORS = ("ENOSPC", "EIO", "EROFS", "EDQUOT", "ESTALE")
WRITES = ("write", "pwrite", "pwrite64", "writev", "sendfile", "sendfile64", "copy_file_range", "fwrite")
"""Calls that may be done in part."""


def build_shim(folder: Path) -> Path | None:
    """The shared object, made in ``folder``; None where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    made = folder / "shim.so"
    words = [compiler, "-O1", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-o", str(made), str(SOURCE), "-ldl"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(words)}:\n{done.stderr}")
    return made


class Call(NamedTuple):
    """A counted call."""

    number: int
    name: str
    path: str

    @property
    def kind(self) -> str:
        """The call and the path without what numbers and digests make different."""
        return f"{self.name} {re.sub(r'[0-9a-f]{8,}|[0-9]+', '#', self.path)}"


@dataclass(frozen=True)
class Fault:
    """What befalls a process at one of its calls."""

    act: str
    """``kill``, ``stop``, ``short`` or the name of an errno."""
    number: int
    when: str = "before"
    lasting: bool = False
    reads: bool = False

    def settings(self, below: Path, count: Path) -> dict[str, str]:
        """What the shim reads; ``count`` is a new file for the number of calls."""
        return counting(below, count=count, reads=self.reads) | {
            "FAULT_AT": str(self.number),
            "FAULT_ACT": self.act,
            "FAULT_WHEN": self.when,
            "FAULT_LASTING": str(int(self.lasting)),
        }

    @property
    def error(self) -> int | None:
        """The errno that it gives; None for none."""
        return getattr(errno, self.act, None)

    def __str__(self) -> str:
        words = [self.act, self.when, f"{'read' if self.reads else 'call'} {self.number}"]
        return " ".join([*words, *["and all later ones"] * self.lasting])


def counting(below: Path, *, count: Path | None = None, log: Path | None = None, reads: bool = False) -> dict[str, str]:
    """Settings that count, and strike nothing. All of them are named: a process forgets those of its parent."""
    return {
        "FAULT_BELOW": str(below),
        "FAULT_CALLS": "read" if reads else "write",
        "FAULT_AT": "0",
        "FAULT_ACT": "",
        "FAULT_WHEN": "before",
        "FAULT_LASTING": "0",
        "FAULT_COUNT": str(count or ""),
        "FAULT_LOG": str(log or ""),
        "FAULT_NO_FLOCK": "0",
        "FAULT_PAUSE": "0",
    }


def calls_of(log: Path) -> list[Call]:
    """The calls of a log, in order."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    pieces = [line.split(" ", 2) for line in lines]
    return sorted(Call(int(number), name, path) for number, name, path in pieces)
