"""accelerate's state, of which a process has one: who wants another precision than the test before needs a new one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState


@contextmanager
def fresh_accelerator() -> Iterator[None]:
    """No state before the block, and none after it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
