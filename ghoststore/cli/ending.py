"""The end of a command: an error in a sentence, and its exit code."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Sequence
from typing import Any

import click

from ghoststore.cli.events import current
from ghoststore.errors import GhostStoreError, StorageError, UsageError, reason_of
from ghoststore.hidden_errors import hidden_error
from ghoststore.shown import visible

NAMES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of a name that the user gave: exit code 2. All others are errors of the disk: 6."""

NEAR = 60
"""Characters shown on either side of one that cannot be written."""


def refuse_unreadable(arguments: Sequence[str]) -> None:
    """UsageError for an argument that is not text: with a NUL, or bytes that are not UTF-8."""
    for argument in arguments:
        if "\0" in argument:
            raise UsageError(f"the argument '{visible(argument)}' holds a NUL character")
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the argument '{visible(argument)}' is not UTF-8; names and paths must be") from None


def report_error(error: BaseException) -> int | None:
    """Say what went wrong, in a sentence. Returns the exit code; None for an unforeseen error, which is a bug."""
    if isinstance(error, click.ClickException):
        return _report_click_error(error)
    if isinstance(error, GhostStoreError):
        return say_error(error, str(error), error.exit_code)
    if isinstance(error, ImportError):
        return say_error(error, str(error), 1)
    if (hidden := hidden_error(error)) is not None:
        return say_error(error, *_system_error(hidden))
    if isinstance(error, OSError):
        return say_error(error, *_system_error(error))
    if (sentence := _memory_error(error)) is not None:
        return say_error(error, sentence, 1)
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        near = error.object[max(0, error.start - NEAR) : error.end + NEAR]
        return say_error(error, f"'{visible(near)}' is not text that UTF-8 can hold", UsageError.exit_code)
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return say_error(error, "a name holds a NUL character", UsageError.exit_code)
    return None


def say_error(error: BaseException | str, message: str, exit_code: int, intro: str = "Error: ") -> int:
    """Write ``message`` to stderr, after ``intro``. Returns ``exit_code``. The event names the type of ``error``."""
    log = current()
    if log is None:
        click.echo(intro + visible(message, lines=True), err=True)
    else:
        kind = error if isinstance(error, str) else type(error).__name__
        log.say("error", type=kind, message=message, exit_code=exit_code)
    return exit_code


def say_bug(error: BaseException) -> None:
    """Write an unforeseen error as an event, with its traceback."""
    log = current()
    assert log is not None
    trace = "".join(traceback.format_exception(error))
    log.say("error", type=type(error).__name__, message=str(error), exit_code=1, traceback=trace)


def _report_click_error(error: click.ClickException) -> int:
    log = current()
    if log is None:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            help_flag = error.ctx.help_option_names[0]
            click.echo(f"{error.ctx.get_usage()}\nTry '{error.ctx.command_path} {help_flag}' for help.\n", err=True)
        return say_error(error, error.format_message(), error.exit_code)
    cause = error.__cause__  # the library's error, whose message names flags here
    return say_error(cause if isinstance(cause, GhostStoreError) else error, error.format_message(), error.exit_code)


def _system_error(error: OSError) -> tuple[str, int]:
    """The sentence and exit code of an error of the operating system."""
    if error.errno is None:  # a library made the error, with a sentence of its own
        return str(error), UsageError.exit_code
    name: Any = error.filename2 or error.filename
    what = f"the open file {name}" if isinstance(name, int) else "a file" if name is None else str(os.fsdecode(name))
    unreadable = error.errno in (errno.EACCES, errno.EPERM) and isinstance(name, str) and _is_unreadable(name)
    if error.errno in NAMES or unreadable:
        return f"cannot open {what}: {error.strerror}", UsageError.exit_code
    return f"cannot read or write {what}: {reason_of(error)}", StorageError.exit_code


def _is_unreadable(name: str) -> bool:
    return os.path.exists(name) and not os.access(name, os.R_OK)


def _memory_error(error: BaseException) -> str | None:
    """The sentence for an error of memory; None for another error."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and of_torch):
        return None
    detail = f" ({str(error).splitlines()[0]:.200})" if str(error) else ""
    return f"memory ran out{detail}: give smaller batches or fewer samples, or another machine"
