"""Every command that writes, struck at calls of its disk: killed, refused, cut short.

What was there stays, nothing is ever partly there, the error is exit code 6 without a traceback, and the same command
again ends as if nothing had happened. Here a thin sample of the calls; ``make soak`` walks them all.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from ghoststore.cli import COMMANDS
from tests.support.fault_commands import LONG, READ_ONLY, WRITING
from tests.support.faulting import faults_at, spread
from tests.support.shim import WRITES, Fault

if TYPE_CHECKING:
    from tests.support.faulting import Faults

pytestmark = [pytest.mark.slow, pytest.mark.kill]
WAYS = 2
"""Of the ways to strike a call (kills before and after it, errors, half of a write), those that are tried here."""
CASES = [case for case, command in WRITING.items() if not command.heavy]


def test_every_command_is_struck() -> None:
    """A command that comes has a line in tests/support/fault_commands.py, or is known to write nothing."""
    assert {command.name for command in WRITING.values()} | {*READ_ONLY, *LONG} == set(COMMANDS)


@pytest.mark.parametrize("case", CASES)
def test_struck(faults: Faults, case: str) -> None:
    rng = random.Random(case)
    reference = faults.reference(case)
    (call,) = spread(reference.calls, 1, rng)
    kill, *others = faults_at(call, rng)
    for fault in (kill, *rng.sample(others, WAYS - 1)):
        faults.strike(case, fault)
    for call in spread([call for call in reference.calls if call.name in WRITES], 1, rng):
        faults.strike(case, Fault("ENOSPC", call.number, lasting=True))


@pytest.mark.parametrize(
    ("case", "act", "when", "call", "path"),
    [
        # Arrow keeps no number of what the system said, NumPy neither; torch hides it in an error of its own.
        ("query-parquet", "ESTALE", "before", "close", ".parquet"),
        ("export-parquet", "ESTALE", "after", "close", ".parquet"),
        ("index", "ESTALE", "after", "fwrite", ".begun.rows"),
        ("query-parquet", "ESTALE", "before", "open64", "second_moment-"),
        ("evaluate", "EDQUOT", "before", "unlink", ".half-"),  # what is left there goes with the next evaluation
    ],
)
def test_what_a_soak_has_found(faults: Faults, case: str, act: str, when: str, call: str, path: str) -> None:
    reference = faults.reference(case)
    reads = call == "open64"
    calls = [
        each for each in (reference.reads if reads else reference.calls) if each.name == call and path in each.path
    ]
    faults.strike(case, Fault(act, calls[-1].number, when, reads=reads))


@pytest.mark.parametrize("case", [case for case in CASES if WRITING[case].base == "store"])
def test_a_file_that_cannot_be_read(faults: Faults, case: str) -> None:
    """EIO where the store is read: exit code 4 or 6, no traceback, nothing changed."""
    rng = random.Random(case)
    for call in spread(faults.reference(case).reads, 1, rng):
        faults.strike(case, Fault(rng.choice(("EIO", "ESTALE", "EACCES")), call.number, reads=True))
