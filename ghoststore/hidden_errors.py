"""Finds errors of the operating system that libraries hide in errors of their own."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

_NUMBER = re.compile(r"\(os error (\d+)\)|^unable to \w+ file <.*\((\d+)\)", re.DOTALL)
"""The error number in messages of Rust libraries and of torch."""
_LOST = re.compile(r"error closing file|\d+ requested and \d+ written")
"""Messages without the number: of Arrow if closing a file fails, of NumPy if writing fails."""


def hidden_error(error: BaseException) -> OSError | None:
    """The operating system's error behind one of safetensors, tokenizers, torch, Arrow or NumPy; None if none is."""
    if isinstance(error, OSError):
        lost = error.errno is None and _LOST.match(str(error))
        return OSError(errno.EIO, os.strerror(errno.EIO)) if lost else None
    number = _NUMBER.search(str(error))
    if number is None:
        return None
    code = int(number[1] or number[2])
    return OSError(code, os.strerror(code))


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise the operating system's error in place of the library's that hides it."""
    try:
        yield
    except Exception as error:
        hidden = hidden_error(error)
        if hidden is None:
            raise
        raise hidden from error
