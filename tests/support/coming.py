"""A process that comes and goes as a writer of folders, as fast as it can."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from ghoststore.store.base.writers import FOLDER

WRITER = """
import os, sys
from contextlib import suppress
print(flush=True)
while True:
    for folder in sys.argv[1:]:
        for make in (os.mkdir, os.rmdir):
            with suppress(OSError):
                make(folder)
"""


@contextmanager
def coming_and_going(folders: Iterable[Path]) -> Generator[None]:
    """While the block runs, the folder of records of each of ``folders`` is made and removed."""
    words = [sys.executable, "-c", WRITER, *(str(folder / FOLDER) for folder in folders)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
            assert process.poll() is None, "it did not go on to the end"
        finally:
            process.kill()
