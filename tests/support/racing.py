"""Two processes at one thing where flock does nothing, as on many network file systems."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.fault_commands import WRITING
from tests.support.faulting import SECONDS, BrokenPromise, Faults, files_of, unfinished
from tests.support.shim import Fault, counting

if TYPE_CHECKING:
    from tests.conftest import Outcome

RACES = ("build", "build-on", "tokenize", "index", "select", "query-json", "full-gradients", "fidelity", "train")
PAUSE = 2000
"""Microseconds, at most, before each call of the disk."""
OTHER_BITS = """
import ghoststore.cli
from ghoststore.store.spans.writer import SpanData

begin = SpanData.__init__


def other(self, span, arrays, *rest, **named):
    begin(self, span, {{**arrays, "loss": arrays["loss"] + 1}}, *rest, **named)


SpanData.__init__ = other
ghoststore.cli.main({words!r})
"""
"""A build on a machine whose arithmetic is another."""


def named_by_records(folder: Path) -> dict[str, bytes]:
    """Every commit record below ``folder``, and the files they name."""
    found = {}
    for path in folder.rglob("commits/[0-9]*.json"):
        owner = path.parent.parent
        for file in (path, *(owner / name for name in json.loads(path.read_bytes())["files"])):
            found[file.relative_to(folder).as_posix()] = file.read_bytes() if file.exists() else b"missing"
    return found


def together(faults: Faults, case: str, processes: int = 2) -> None:
    """All at once, with a short pause before each call of the disk."""
    faults.reference(case)
    folder = faults.fresh(case)
    words = faults.words(WRITING[case], folder)
    shim = counting(folder) | {"FAULT_NO_FLOCK": "1", "FAULT_PAUSE": str(PAUSE)}
    pids = [faults.lab.start(*words, shim=shim, seconds=SECONDS) for _ in range(processes)]
    ends_well(faults, case, folder, f"{case}, {processes} at once", [faults.lab.wait(pid) for pid in pids])


def overtaken(faults: Faults, case: str, number: int, *, other_bits: bool = False) -> bool:
    """One stops before its call ``number`` while another does all that it may, and goes on. False: it had ended."""
    call = next(call for call in faults.reference(case).calls if call.number == number)
    what = f"{case}, overtaken before call {number} ({call.name} {call.path.replace(str(faults.folder), '')})"
    folder = faults.fresh(case)
    words = faults.words(WRITING[case], folder)
    no_flock = {"FAULT_NO_FLOCK": "1"}
    order: dict[str, object] = {"code": OTHER_BITS.format(words=words)} if other_bits else {}
    shim = Fault("stop", number).settings(folder, faults.folder / "count-race") | no_flock
    (faults.folder / "count-race").unlink(missing_ok=True)
    first = faults.lab.start(*words, shim=shim, seconds=SECONDS, **order)
    stopped = faults.lab.stops(first)
    second = faults.run(WRITING[case], folder, shim=counting(folder) | no_flock)
    before = named_by_records(folder)
    if stopped:
        os.kill(first, signal.SIGCONT)
    outcomes = [faults.lab.wait(first), second]
    after = named_by_records(folder)
    if changed := [name for name, data in before.items() if after.get(name) != data]:
        raise BrokenPromise(3, f"{what}: {changed[:3]}, which a record named, changed")
    ends_well(faults, case, folder, what, outcomes, other_bits=other_bits)
    return stopped


def ends_well(
    faults: Faults, case: str, folder: Path, what: str, outcomes: list[Outcome], *, other_bits: bool = False
) -> None:
    """One truth: each did it, or was refused; what is there verifies, and the same command ends it."""
    codes = [outcome.code for outcome in outcomes]
    errors = "\n".join(outcome.err[-500:] for outcome in outcomes)
    if not set(codes) <= {0, 2, 5} or "Traceback" in errors:
        raise BrokenPromise(3, f"{what}: exit codes {codes}\n{errors}")
    faults.check_sound(f"{what}: ", 3, folder, True)
    done = faults.differences(case, folder) == []
    again = faults.run(WRITING[case], folder)
    if again.code not in ((0, 2) if done else (0,)):
        raise BrokenPromise(
            3, f"{what}: codes {codes}, the same command again ends with {again.code}: {again.err[-500:]}"
        )
    faults.check_sound(f"{what}, again: ", 3, folder, True)
    if other_bits:
        return
    if different := faults.differences(case, folder):
        raise BrokenPromise(3, f"{what}: codes {codes}, then {different[:5]} differ")
    if left := unfinished(files_of(folder)) - unfinished(faults.reference(case).after):
        raise BrokenPromise(3, f"{what}: codes {codes}, {sorted(left)[:5]} are left behind")
