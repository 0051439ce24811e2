"""What every test runs under: no network, one thread a process (set before torch is imported). And a `Lab`: a
tiny saved model, small corpora, and real processes that run the command line and may be killed.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What this user made, and what was computed, is remembered there: of tests, in a folder that goes with them.
_state = tempfile.TemporaryDirectory(prefix="ghoststore-tests-")
os.environ["XDG_STATE_HOME"] = os.environ["XDG_CACHE_HOME"] = _state.name
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's `&` ignores it, and so would what tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sun",
    "moon",
    "river",
    "stone",
    "bird",
    "tree",
    "song",
    "night",
    "day",
    "old",
    "new",
    "red",
    "runs",
    "sees",
    "takes",
    "gives",
    "under",
    "over",
]
POSITIONS = 32
CHEAP_TO_FORK = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "PYTHONMALLOC": "malloc"}
"""Memory in pages of 2 MiB, where the system has such: to copy the table of the small ones is most of a fork."""
Rows = list[dict[str, Any]]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Different sentences of 3 to 8 words."""
    rng = random.Random(seed)
    return [" ".join([*rng.choices(WORDS, k=rng.randint(2, 7)), f"{i}."]) for i in range(count)]


def sample_rows(count: int, seed: int = 0) -> Rows:
    """Rows with an id, a text and one of two domains."""
    texts = sentences(count, seed)
    return [{"id": f"row-{i}", "text": text, "domain": ("sky", "earth")[i % 2]} for i, text in enumerate(texts)]


def write_jsonl(path: Path, rows: Rows) -> Path:
    """``rows`` as a new or replaced jsonl file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def save_model(folder: Path, *, seed: int = 0, layers: int = 1, change: Any = None, **settings: Any) -> Path:
    """A GPT-2 of width 32, random weights, and a byte-level tokenizer; saved after ``change(model, tokenizer)``."""
    import torch
    import transformers

    from query.demo.tokenizer import train_tokenizer

    transformers.utils.logging.disable_progress_bar()
    tokenizer = train_tokenizer(sentences(50), 290)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=32,
        n_layer=layers,
        n_head=2,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(config)
    if change is not None:
        with torch.no_grad():
            change(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its relative path, locks and the records of who writes aside."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock") and path.parent.name != ".writers"
    }


@dataclass(frozen=True)
class Outcome:
    """How a process ended: exit status (negative: the signal), stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The whole of stdout as one JSON document."""
        return json.loads(self.out)


@dataclass
class Lab:
    """What the tests of the store, the query and the command line share."""

    folder: Path
    checkpoint: Path
    corpus: Path
    """jsonl of ``rows``."""
    rows: Rows
    _zygote: subprocess.Popen[str]
    _orders: int = 0
    _started: dict[int, tuple[Path, Path]] = field(default_factory=dict)

    tree = staticmethod(tree)
    model = staticmethod(save_model)
    write = staticmethod(write_jsonl)
    sample_rows = staticmethod(sample_rows)

    def run(self, *args: str | Path, cwd: Path | None = None, **order: Any) -> Outcome:
        """``ghoststore ARGS…`` in a process of its own. ``order`` is described in tests/support/zygote.py."""
        if "code" not in order:
            order["args"] = [str(arg) for arg in args]
        streams = self._streams()
        answer = self._order(cwd=str(cwd or self.folder), stdout=str(streams[0]), stderr=str(streams[1]), **order)
        return Outcome(answer["code"], *(path.read_text() for path in streams))

    def start(self, *args: str | Path, **order: Any) -> int:
        """As :meth:`run`, without waiting; gives what :meth:`wait` takes."""
        streams = self._streams()
        if "code" not in order:
            order["args"] = [str(arg) for arg in args]
        order |= {"cwd": str(self.folder), "start": True}
        pid = self._order(stdout=str(streams[0]), stderr=str(streams[1]), **order)["pid"]
        self._started[pid] = streams
        return pid

    def stopped(self, pid: int) -> None:
        """Wait until a process that was started has stopped itself."""
        assert self.stops(pid)

    def stops(self, pid: int) -> bool:
        """Wait until a process that was started has stopped itself, or ended: False."""
        return self._order(stopped=pid)["code"] == signal.SIGSTOP

    def wait(self, pid: int) -> Outcome:
        """The outcome of a process that was started."""
        code = self._order(wait=pid)["code"]
        return Outcome(code, *(path.read_text() for path in self._started.pop(pid)))

    def build(self, store: Path, *options: str | Path, **order: Any) -> Outcome:
        """The build that most tests use: spans of 6 rows, so that there are several."""
        given = [str(option) for option in options]
        defaults = {"--checkpoint": self.checkpoint, "--data": self.corpus, "--span-rows": 6, "--name": "part"}
        rest = [word for name, value in defaults.items() if name not in given for word in (name, str(value))]
        return self.run("build", "--store", store, *rest, *given, "--quiet", **order)

    def _streams(self) -> tuple[Path, Path]:
        self._orders += 1
        return self.folder / f"{self._orders}.out", self.folder / f"{self._orders}.err"

    def _order(self, **order: Any) -> dict[str, int]:
        pipes: tuple[IO[str] | None, ...] = (self._zygote.stdin, self._zygote.stdout)
        assert pipes[0] is not None
        assert pipes[1] is not None
        pipes[0].write(json.dumps(order) + "\n")
        pipes[0].flush()
        return json.loads(pipes[1].readline())

    def close(self) -> None:
        """End the process that forks the others."""
        self._zygote.communicate()


def diagonal(cases: list[tuple[str, ...]], count: int | None = None) -> set[tuple[str, ...]]:
    """Of a grid (a case is its values on each axis), as many cases as the longest axis has values, or ``count``.

    They are spread over the longest axis, its ends among them, and go round the others.
    """
    axes = [list(dict.fromkeys(values)) for values in zip(*cases, strict=True)]
    longest = max(map(len, axes))
    count = min(count or longest, longest)
    spread = [step * (longest - 1) // max(count - 1, 1) for step in range(count)]
    return {
        tuple(axis[far if len(axis) == longest else step % len(axis)] for axis in axes)
        for step, far in enumerate(spread)
    }


def pytest_configure(config: pytest.Config) -> None:
    """Fewer examples of each property in the fast set."""
    # How fast the machine is at this moment is nothing to test.
    untimed: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
    hypothesis.settings.register_profile("all", max_examples=100, **untimed)
    hypothesis.settings.register_profile("fast", max_examples=20, **untimed)
    hypothesis.settings.load_profile("fast" if "not slow" in config.getoption("markexpr") else "all")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """All that is imported for the tests stays: nothing looks for garbage in it, while it comes and ever after."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


LONGEST = ("test_dotprod_compiled.py", "test_benchmarks.py", "test_pages_that_teach.py")
"""Files of a minute and more. They are begun first: at the end each would leave the other workers idle."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark ``slow`` what ``thin`` says: before ``-m`` is looked at. And the longest files come first."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    grids: dict[str, list[tuple[pytest.Item, tuple[str, ...]]]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("thin"):
            # One a decorator; the public `indices` number the cases.
            grids.setdefault(item.nodeid.partition("[")[0], []).append((item, tuple(item.callspec._idlist)))
    for cases in grids.values():
        mark = cases[0][0].get_closest_marker("thin")
        assert mark is not None
        fast = diagonal([values for _, values in cases], *mark.args)
        for item, values in cases:
            if values not in fast:
                item.add_marker(pytest.mark.slow)


def open_lab(folder: Path, **environment: str) -> Lab:
    """A lab in an empty ``folder``; ``environment`` is that of its processes, beside ours."""
    rows = sample_rows(27)
    corpus, model = write_jsonl(folder / "corpus.jsonl", rows), save_model(folder / "model")
    zygote = subprocess.Popen(
        [sys.executable, Path(__file__).parent / "support" / "zygote.py", model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, **CHEAP_TO_FORK, **environment},
    )
    return Lab(folder=folder, checkpoint=model, corpus=corpus, rows=rows, _zygote=zygote)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One for the whole session: nothing in it is changed by a test."""
    lab = open_lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def built(lab: Lab) -> Iterator[Path]:
    """A store with one complete part called ``part``: copy it before changing it, or asking what keeps a cache."""
    store = lab.folder / "built"
    outcome = lab.build(store)
    assert outcome.code == 0, outcome.err
    before = tree(store)
    yield store
    after = tree(store)
    assert [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)] == []
