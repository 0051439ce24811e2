"""Errors of ghoststore. Each names the object, what was expected, what was found and what to do.

Every error inherits the builtin that a Python user would catch, and has the exit code of the command line (documented
in ``docs/cli.md``).
"""

from __future__ import annotations

import errno
import os


class GhostStoreError(Exception):
    """Base of all errors that ghoststore raises on purpose. ``exit_code`` is the exit code of the command line."""

    exit_code = 1


class UsageError(GhostStoreError, ValueError):
    """An input or an option cannot be used as given (exit code 2)."""

    exit_code = 2


class CorpusError(UsageError):
    """A corpus cannot be read: missing, malformed (with the row or line), or without a needed field."""


class CheckpointError(UsageError):
    """A checkpoint cannot be used: missing files, unsafe format, missing or non-finite weights."""


class LayerError(UsageError):
    """A layer cannot be projected: unknown pattern, unsupported type, or a rank that does not fit."""

    unsupported: tuple[str, ...] = ()
    """Layers that can be left out with `exclude_layers`, where that mends it."""


class CaptureError(GhostStoreError, RuntimeError):
    """What the taps saw of a batch is incomplete or wrong. No vector and no score of that batch may be used."""

    unsupported: tuple[str, ...] = ()
    """Layers that can be left out with `exclude_layers`, where that mends it."""


class DivergedError(GhostStoreError, ArithmeticError):
    """A loss, a gradient or a weight in training is NaN or infinite. That step leaves no checkpoint and no score."""

    @classmethod
    def at(cls, step: int, what: str) -> DivergedError:
        """``what`` happened at ``step`` (from 1)."""
        return cls(
            f"step {step}: {what}. Nothing of this step is stored; try a lower `learning_rate` or `max_grad_norm`, "
            "with another `output_dir` and `name`"
        )


class WorkerError(GhostStoreError, RuntimeError):
    """A worker process ended before its work was done. What was committed stays intact; the same command resumes."""


class MismatchError(GhostStoreError, ValueError):
    """The settings do not fit what is stored; the message has both values (exit code 3)."""

    exit_code = 3


class CorruptError(GhostStoreError, OSError):
    """Stored bytes are missing, or differ from those that were committed (exit code 4)."""

    exit_code = 4


class BusyError(GhostStoreError, RuntimeError):
    """Another process is writing the same part, run or file (exit code 5)."""

    exit_code = 5


class StorageError(GhostStoreError, OSError):
    """The store cannot be written: no space, or an input/output error (exit code 6).

    What was committed before stays intact, and the same command resumes.
    """

    exit_code = 6


class UnsoundError(GhostStoreError, ValueError):
    """``ghoststore doctor`` found something that would make a store wrong (exit code 7). It printed the findings."""

    exit_code = 7


def reason_of(error: OSError) -> str:
    """Why the operating system refused, and what to do if that is known."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space is left on the device; free some"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{os.strerror(error.errno)}; make it writable"
    return str(error) if error.errno is None else f"{os.strerror(error.errno)} (errno {error.errno})"
