"""Errors of the operating system that libraries hide in words of their own."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

_NUMBER = re.compile(r"\(os error (\d+)\)|^unable to \w+ file <.*\((\d+)\)", re.DOTALL)
"""Of libraries written in Rust, and of torch."""
_LOST = re.compile(r"error closing file|\d+ requested and \d+ written")
"""All that Arrow says where the system refuses to close a file, and NumPy where it refuses to write: the number is
lost."""


def hidden_error(error: BaseException) -> OSError | None:
    """The error of the system in one of a library (safetensors, tokenizers, torch, Arrow, NumPy); None if there is
    none.
    """
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
    """Raise what the system said, not what a library made of it."""
    try:
        yield
    except Exception as error:
        hidden = hidden_error(error)
        if hidden is None:
            raise
        raise hidden from error
