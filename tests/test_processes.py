"""What a process asks of its system."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ghoststore.cli.serve import command

PLACES = """
import ctypes, sys, threading
from ghoststore.processes import share_memory_among_threads
if sys.argv[2] == "shared":
    share_memory_among_threads()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.fopen.argtypes, libc.fclose.argtypes = (ctypes.c_char_p, ctypes.c_char_p), (ctypes.c_void_p,)
libc.malloc_info.argtypes = (ctypes.c_int, ctypes.c_void_p)
met = threading.Barrier(4)
def work():
    met.wait()
    libc.malloc(1000)
    met.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="needs glibc")
def test_threads_share_memory(tmp_path: Path) -> None:
    places = {}
    for how in ("apart", "shared"):
        subprocess.run([sys.executable, "-c", PLACES, tmp_path / how, how], check=True)
        places[how] = (tmp_path / how).read_text().count("<heap nr=")
    assert places["shared"] == 1 < places["apart"]


def test_the_explorer_asks_for_that_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghoststore.processes.share_memory_among_threads", lambda: sys.exit(77))
    asked = CliRunner().invoke(command, ["--store", str(tmp_path)])
    assert asked.exit_code == 77
