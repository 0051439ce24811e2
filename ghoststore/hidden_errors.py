"""Errors of the operating system that libraries hide in words of their own."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

_NUMBER = re.compile(r"\(os error (\d+)\)")
_CLOSING = "error closing file"
"""All that Arrow says where the system refuses to close a file: its number is lost."""


def hidden_error(error: BaseException) -> OSError | None:
    """The error of the system in one of a library (safetensors, tokenizers, Arrow); None if there is none."""
    if isinstance(error, OSError) and error.errno is None and str(error).startswith(_CLOSING):
        return OSError(errno.EIO, os.strerror(errno.EIO))
    number = _NUMBER.search(str(error))
    if number is None or isinstance(error, OSError):
        return None
    return OSError(int(number[1]), os.strerror(int(number[1])))


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise what the system said, not what a library made of it."""
    try:
        yield
    except Exception as error:
        hidden = hidden_error(error)
        if hidden is None:
            raise
        raise hidden from error
