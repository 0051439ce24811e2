"""A process that has everything imported and forks a child for each order, so that a test can have dozens of
real processes, each of which may be killed, for one start.

An order is a line of JSON on stdin; the answer is a line of JSON on stdout. Keys of an order:

- ``args``: run ``ghoststore ARGS…``; or ``code``: run this Python.
- ``cwd``, ``stdin`` (a file), ``stdout``, ``stderr`` (files that are written).
- ``fault``: ``{"call": "fsync", "unlink", or "name" for whatever gives a file its name, "path": regular expression on
  the paths it is called with, "number": which match (from 1), "when": "before" or "after" the call, "act": …}``.
  ``act`` is ``kill`` (SIGKILL), ``interrupt`` (SIGINT), ``terminate`` (SIGTERM), ``stop`` (SIGSTOP), or an errno name,
  raised by this and by all later matches: a full disk stays full.
- ``start``: do not wait; the answer has ``pid``. ``{"stopped": pid}`` waits until it has stopped itself and
  ``{"wait": pid}`` until it has ended.

The answer's ``code`` is the exit status, negative for a signal; of ``stopped`` the signal, 0 where it ended instead.

For tests/faults: ``shim``: ``{"FAULT_AT": …}``, what shim.c reads where it was preloaded; ``memory``, ``seconds``:
address space beyond what is there, and time, after which the system ends the child. ``ZYGOTE_IMPORTS`` in the
environment: what else is imported before the forks.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib
import json
import os
import re
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import faiss
import matplotlib.figure
import pandas
import pyarrow.compute
import torch
import zarr
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import ghoststore
import ghoststore.checkpoint.load
import ghoststore.cli.build
import ghoststore.cli.doctor
import ghoststore.cli.evaluate
import ghoststore.cli.fidelity
import ghoststore.cli.full_gradients
import ghoststore.cli.index
import ghoststore.cli.info
import ghoststore.cli.plot_error
import ghoststore.cli.query
import ghoststore.cli.scores
import ghoststore.cli.select
import ghoststore.cli.self_influence
import ghoststore.cli.terminal
import ghoststore.cli.tokenize
import ghoststore.cli.train
import ghoststore.cli.verify
import ghoststore.cli.watch
import indexer.build.alone
import indexer.tokenize.tokenize
import indexer.training.train
import query.ann.command
import query.answer.query
import query.doctor
import query.evaluate.evaluate
import query.exact.full_gradients
import query.fidelity.fidelity
import query.fidelity.plot_error
import query.select.select
import query.training_scores.scores
import query.training_scores.watch

IMPORTED = (
    datasets,
    faiss,
    matplotlib.figure,
    pandas,
    pyarrow.compute,
    torch,
    zarr,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    indexer.build.alone,
    indexer.tokenize.tokenize,
    indexer.training.train,
    query.doctor,
    query.evaluate.evaluate,
    query.fidelity.fidelity,
    query.exact.full_gradients,
    query.ann.command,
    query.fidelity.plot_error,
    query.answer.query,
    query.training_scores.scores,
    query.select.select,
    query.training_scores.watch,
)

CALLS = {"fsync": ("fsync",), "name": ("replace", "rename", "link"), "unlink": ("unlink",)}
SIGNALS = {
    "kill": signal.SIGKILL,
    "interrupt": signal.SIGINT,
    "terminate": signal.SIGTERM,
    "stop": signal.SIGSTOP,
}


def paths_of(arguments: tuple[Any, ...]) -> str:
    """The paths that a function of ``os`` was called with, joined by an arrow; a handle counts as its file."""
    named = [os.readlink(f"/proc/self/fd/{a}") if isinstance(a, int) else os.fspath(a) for a in arguments[:2]]
    return " -> ".join(named)


def install(fault: dict[str, Any]) -> None:
    """Replace functions of ``os`` by themselves with the fault in them."""
    wanted, act = re.compile(fault["path"]), fault["act"]
    number, after, seen, done = fault.get("number", 1), fault.get("when") == "after", 0, False

    def strike() -> None:
        nonlocal done
        if act in SIGNALS:
            if not done:
                done = True
                # To this thread, which then does not get past this line before the signal is there.
                signal.pthread_kill(threading.get_ident(), SIGNALS[act])
        else:
            raise OSError(getattr(errno, act), os.strerror(getattr(errno, act)))

    def call(real: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        nonlocal seen
        if not wanted.search(paths_of(arguments)):
            return real(*arguments, **options)
        seen += 1
        if seen >= number and not after:
            strike()
        result = real(*arguments, **options)
        if seen >= number and after:
            strike()
        return result

    for name in CALLS[fault["call"]]:
        setattr(os, name, partial(call, getattr(os, name)))


def bound(order: dict[str, Any]) -> None:
    """Arm the shim, and limit memory and time."""
    if "shim" in order:
        os.environ.update(order["shim"])
        ctypes.CDLL(os.environ["LD_PRELOAD"]).fault_arm()
    if "memory" in order:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + order["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.alarm(order.get("seconds", 0))


def child(order: dict[str, Any]) -> int:
    """What a forked child does with its order; its exit status."""
    for handle, name, flags in (
        (0, order.get("stdin", os.devnull), os.O_RDONLY),
        (1, order["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, order["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(name, flags, 0o644), handle)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - for as long as it lives
    os.chdir(order["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "fault" in order:
        install(order["fault"])
    bound(order)
    try:
        if "code" in order:
            exec(order["code"], {"__name__": "__main__"})
        else:
            ghoststore.cli.main(order["args"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001 - what the interpreter would do
        traceback.print_exc()
        return 1
    return 0


ENDED: dict[int, int] = {}
"""Exit statuses of processes that ended where they should have stopped."""


def run(order: dict[str, Any]) -> dict[str, int]:
    """Do one order."""
    if "stopped" in order:
        status = os.waitpid(order["stopped"], os.WUNTRACED)[1]
        if os.WIFSTOPPED(status):
            return {"code": os.WSTOPSIG(status)}
        ENDED[order["stopped"]] = os.waitstatus_to_exitcode(status)
        return {"code": 0}
    if order.get("wait") in ENDED:
        return {"code": ENDED.pop(order["wait"])}
    pid = order.get("wait") or os.fork()
    if pid == 0:
        code = 1
        try:
            code = child(order)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    if order.get("start"):
        return {"pid": pid}
    return {"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}


def warm(model: str) -> None:
    """Open a model once: what transformers makes on the first time, the children have of their parent."""
    checkpoint = ghoststore.checkpoint.load.find_checkpoint(model)
    ghoststore.checkpoint.load.load_model(checkpoint)
    ghoststore.checkpoint.load.load_tokenizer(ghoststore.checkpoint.load.find_tokenizer(model))
    for thread in threading.enumerate():  # none of those that read the weights is there at a fork
        if thread is not threading.main_thread():
            thread.join()


if __name__ == "__main__":
    warm(sys.argv[1])
    for module in os.environ.get("ZYGOTE_IMPORTS", "").split():
        importlib.import_module(module)
    gc.freeze()  # no child goes through all of this to look for garbage, and so has it all copied
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(json.loads(line))) + "\n")
        sys.stdout.flush()
    os._exit(0)  # to take all that was imported down again takes a second
