"""How a command ends: an error in a sentence, and its exit code."""

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
"""Refusals of a name that was given: exit code 2. All others are the disk's: 6."""

NEAR = 60
"""Characters that are shown on either side of one that cannot be written."""


def refuse_unreadable(words: Sequence[str]) -> None:
    """UsageError for an argument that is not text: with a NUL, or bytes that are not UTF-8."""
    for word in words:
        if "\0" in word:
            raise UsageError(f"the argument '{visible(word)}' holds a NUL character")
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the argument '{visible(word)}' is not UTF-8; names and paths must be") from None


def told(error: BaseException) -> int | None:
    """Say what went wrong, in a sentence; its exit code. None for an error that nobody foresaw: it is a bug."""
    if isinstance(error, click.ClickException):
        return _told_by_click(error)
    if isinstance(error, GhostStoreError):
        return say_error(error, str(error), error.exit_code)
    if isinstance(error, ImportError):
        return say_error(error, str(error), 1)
    if (hidden := hidden_error(error)) is not None:
        return say_error(error, *_of_the_system(hidden))
    if isinstance(error, OSError):
        return say_error(error, *_of_the_system(error))
    if (words := _memory(error)) is not None:
        return say_error(error, words, 1)
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        near = error.object[max(0, error.start - NEAR) : error.end + NEAR]
        return say_error(error, f"'{visible(near)}' is not text that UTF-8 can hold", UsageError.exit_code)
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return say_error(error, "a name holds a NUL character", UsageError.exit_code)
    return None


def say_error(error: BaseException | str, message: str, exit_code: int, intro: str = "Error: ") -> int:
    """``message`` on stderr, after ``intro``; gives ``exit_code``. ``error``, or the word for it, is its type."""
    log = current()
    if log is None:
        click.echo(intro + visible(message, lines=True), err=True)
    else:
        kind = error if isinstance(error, str) else type(error).__name__
        log.say("error", type=kind, message=message, exit_code=exit_code)
    return exit_code


def say_bug(error: BaseException) -> None:
    """An error that nobody foresaw, as an event."""
    log = current()
    assert log is not None
    where = "".join(traceback.format_exception(error))
    log.say("error", type=type(error).__name__, message=str(error), exit_code=1, traceback=where)


def _told_by_click(error: click.ClickException) -> int:
    log = current()
    if log is None:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            help_flag = error.ctx.help_option_names[0]
            click.echo(f"{error.ctx.get_usage()}\nTry '{error.ctx.command_path} {help_flag}' for help.\n", err=True)
        return say_error(error, error.format_message(), error.exit_code)
    cause = error.__cause__  # of an error of the library that was put in the words of the command line
    return say_error(cause if isinstance(cause, GhostStoreError) else error, error.format_message(), error.exit_code)


def _of_the_system(error: OSError) -> tuple[str, int]:
    """The sentence and exit code of an error of the operating system."""
    if error.errno is None:  # a library's own words, on what it could not read
        return str(error), UsageError.exit_code
    name: Any = error.filename2 or error.filename
    what = f"the open file {name}" if isinstance(name, int) else "a file" if name is None else str(os.fsdecode(name))
    unreadable = error.errno in (errno.EACCES, errno.EPERM) and isinstance(name, str) and _is_unreadable(name)
    if error.errno in NAMES or unreadable:
        return f"cannot open {what}: {error.strerror}", UsageError.exit_code
    return f"cannot read or write {what}: {reason_of(error)}", StorageError.exit_code


def _is_unreadable(name: str) -> bool:
    return os.path.exists(name) and not os.access(name, os.R_OK)


def _memory(error: BaseException) -> str | None:
    """The sentence where memory ran out; None for another error."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and of_torch):
        return None
    detail = f" ({str(error).splitlines()[0]:.200})" if str(error) else ""
    return f"memory ran out{detail}: give smaller batches or fewer samples, or another machine"
