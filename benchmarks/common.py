"""What every benchmark needs: clocks, spreads, peak memory, fresh processes, machine facts, result files.

Linux only: peak memory is read from ``/proc``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import click

import ghoststore
from ghoststore.machine import CORES, computes_bfloat16, processor, total_memory

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Clock(NamedTuple):
    """Seconds: of all threads of this process, and on the wall."""

    cpu: float
    wall: float

    @classmethod
    def now(cls, device: str = "cpu") -> Clock:
        """This moment, when ``device`` has finished what it was given."""
        wait_for(device)
        return cls(time.process_time(), time.perf_counter())

    def since(self, earlier: Clock) -> Clock:
        return Clock(self.cpu - earlier.cpu, self.wall - earlier.wall)


def wait_for(device: str) -> None:
    """Return when a CUDA ``device`` is idle; at once for a CPU."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and the least and the largest of the repeats."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def show(self, form: str = ".3f") -> str:
        """``0.742 (0.738 to 0.751)``."""
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The spread of ``over / under``, repeat by repeat: what drifts between repeats cancels."""
    return Spread.of([x / y for x, y in zip(over, under, strict=True)])


class SelfTimes:
    """Seconds by ``clock`` spent in wrapped functions, each without the wrapped functions that it calls."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._lock = threading.Lock()
        self._open = threading.local()

    @contextmanager
    def wrapped(self, *places: tuple[Any, str, str]) -> Iterator[SelfTimes]:
        """Wrap each (owner, attribute, label) until the block ends. AttributeError for what is not there."""
        with ExitStack() as restore:
            for owner, attribute, label in places:
                original = getattr(owner, attribute)
                own = attribute in vars(owner)
                setattr(owner, attribute, self._timed(original, label))
                if own:
                    restore.callback(setattr, owner, attribute, original)
                else:
                    restore.callback(delattr, owner, attribute)
            yield self

    def _timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            stack: list[float] = self._open.__dict__.setdefault("stack", [])
            began = self._clock()
            stack.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = self._clock() - began
                inner = stack.pop()
                if stack:
                    stack[-1] += whole
                with self._lock:
                    self.seconds[label] = self.seconds.get(label, 0.0) + whole - inner

        return timed


class PeakMemory:
    """The most memory in use beyond what was in use at :meth:`start`, in bytes: resident, or CUDA's."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.before = 0

    def start(self) -> None:
        """Give freed memory back, and count from here."""
        gc.collect()
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far becomes what is resident now
        self.before = _resident("VmRSS")

    def beyond(self) -> int:
        """Peak minus what was there at the start."""
        if self.device.startswith("cuda"):
            import torch

            return int(torch.cuda.max_memory_allocated(self.device)) - self.before
        # Not ru_maxrss: a process inherits that from the one that started it.
        return _resident("VmHWM") - self.before


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")


class BuildWatch:
    """A progress listener that times the building itself and its memory.

    The time runs from the first row to the last commit: tokens, gradients, writing and fsync are inside,
    loading the model and scanning the corpus are not. The memory counts from when the model is loaded.
    """

    def __init__(self, device: str = "cpu", at_building: Callable[[], None] = lambda: None) -> None:
        self.device = device
        self.memory = PeakMemory(device)
        self.spent: dict[str, Clock] = {}
        """By task that has ended."""
        self._at_building = at_building
        """Called when the building itself begins."""

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> _WatchedTask:
        if description == "scanning corpus":
            self.memory.start()
        if description == "building":
            self._at_building()
        return _WatchedTask(self, description, Clock.now(self.device))

    def note(self, message: str) -> None:
        print(message, file=sys.stderr)

    def seconds(self) -> Clock:
        """CPU and wall seconds of the building."""
        assert "building" in self.spent, "the build told of no task called 'building'"
        return self.spent["building"]


@dataclass(slots=True)
class _WatchedTask:
    watch: BuildWatch
    description: str
    began: Clock

    def say(self, text: str) -> None:
        pass

    def advance(self, rows: int, tokens: int = 0) -> None:
        pass

    def close(self) -> None:
        self.watch.spent[self.description] = Clock.now(self.watch.device).since(self.began)


def in_fresh_process(function: Callable[..., Any], *arguments: Any, threads: int = CORES) -> Any:
    """``function(*arguments)`` in a new Python whose libraries compute on ``threads`` threads."""
    wanted = dict.fromkeys(THREAD_VARIABLES, str(threads))
    if threads == 1:
        wanted["TOKENIZERS_PARALLELISM"] = "false"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), _set_threads, (threads,)) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def folders(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options ``--scratch`` and ``--out``."""
    folder = click.Path(path_type=Path)
    scratch = click.option("--scratch", type=folder, help="Where to write stores: the disk to measure.")
    out = click.option("--out", type=folder, default=Path("benchmarks/results"), show_default=True)
    return scratch(out(command))


@contextmanager
def scratch_folder(parent: Path | None) -> Iterator[Path]:
    """A new folder in ``parent`` (default: the system's temporary folder), removed at the end."""
    with tempfile.TemporaryDirectory(dir=parent, prefix="ghoststore-benchmark-") as name:
        yield Path(name)


def read_texts(path: Path, limit: int | None = None) -> list[str]:
    """The texts of the first ``limit`` samples of a corpus that have one."""
    from itertools import islice

    from ghoststore import Corpus

    texts = (" ".join(sample.texts()) for sample in Corpus.open(str(path)).samples())
    return list(islice((text for text in texts if text), limit))


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def machine_facts(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on besides the code. No paths."""
    import torch

    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": CORES,
        "processor": processor(),
        "bfloat16 in hardware": computes_bfloat16(),
        "memory GiB": round(total_memory() / 2**30, 1),
        "load before": round(os.getloadavg()[0], 2),
        **{name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "ghoststore": ghoststore.__version__,
        **{name: version(name) for name in ("torch", "transformers", "numpy", "zarr")},
    }
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


@dataclass(frozen=True, slots=True)
class Table:
    """One Markdown table: a title, rows of cells that are text already, and what a reader must know."""

    title: str
    rows: list[dict[str, str]]
    note: str = ""

    def markdown(self) -> str:
        columns = list(self.rows[0])
        lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in self.rows)]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"## {self.title}\n\n{table}\n" + (f"\n{self.note}\n" if self.note else "")


@dataclass(slots=True, kw_only=True)
class Results:
    """What a run found; :meth:`write` prints it and keeps it as ``<name>.md`` and ``<name>.json``."""

    name: str
    title: str
    settings: dict[str, Any]
    facts: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    """Every measured number, repeat by repeat."""

    def add(self, table: Table, **numbers: Any) -> None:
        self.tables.append(table)
        self.numbers.update(numbers)
        print(f"\n{table.markdown()}", flush=True)

    def write(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        told = [f"{name}: {value}" for name, value in {**self.settings, **self.facts}.items()]
        text = "\n".join([f"# {self.title}\n", ", ".join(told) + ".\n", *(table.markdown() for table in self.tables)])
        (out / f"{self.name}.md").write_text(text, encoding="utf-8")
        (out / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        print(f"written: {out / self.name}.md and .json", file=sys.stderr)


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
