"""Encoding and training steps before and after a change: two checkouts, each in processes of its own, in turns.

Besides seconds it counts what does not depend on the machine: operations, tensors kept for the backward pass, calls.
"""

from __future__ import annotations

import cProfile
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import Results, Table, folders, machine_facts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from ghoststore import GradDotProdEngine, ProjectionConfig
from ghoststore.corpus import Sample
from ghoststore.store.part.status import Status
from indexer.encode.encoder import RowEncoder
from indexer.encode.tokens import Row
from indexer.projection.matrices import Projection

MODELS: dict[str, dict[str, int]] = {
    "GPT-2, 4 layers of 8": {"n_layer": 4, "n_embd": 8, "n_head": 2, "vocab_size": 16},
    "GPT-2, 4 layers of 256": {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 1000},
    "GPT-2 Small": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
}
BATCHES = {
    "GPT-2, 4 layers of 8": (2, 4),
    "GPT-2, 4 layers of 256": (8, 128),
    "GPT-2 Small": (2, 64),
}
"""Samples and tokens of each."""
ENCODING, STEP, PLAIN = "encoding", "step with scores", "plain step"
VAL_SAMPLES, REFRESH = 4, 10
BEFORE, AGAIN, AFTER = "before", "before again", "after"
WARM_UP = 5
RESAMPLED = 10_000
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
"""glibc keeps what is freed: no page is touched for the first time again."""


class _Counted(TorchDispatchMode):
    """Counts the operations that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return function(*args, **(kwargs or {}))


class Bench:
    """One model and one batch, and the ways through it, with the code of this process."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        samples, tokens = BATCHES[name]
        drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(n_positions=tokens, bos_token_id=0, eos_token_id=0, **drop, **MODELS[name])
        self.model: Any = GPT2LMHeadModel(config)
        self.model.loss_type = "ForCausalLM"  # what transformers takes anyway, after a warning
        self.ids = torch.randint(0, config.vocab_size, (samples, tokens))
        self.val = torch.randint(0, config.vocab_size, (VAL_SAMPLES, tokens))
        self.rows = [
            Row(
                sample=Sample(source_row=place, id=str(place), domain=None, content=None, offset=0, file=0),
                window=0,
                window_start=0,
                tokens=ids.numpy().astype("int32"),
                first_target=1,
                status=Status.OK,
            )
            for place, ids in enumerate(self.ids)
        ]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    @contextmanager
    def way(self, name: str) -> Iterator[Callable[[], Any]]:
        """What is repeated for the way ``name``."""
        self.model.train(name != ENCODING)
        with ExitStack() as stack:
            if name == ENCODING:
                encoder = RowEncoder(self.model, Projection.for_model(self.model, ProjectionConfig()))
                stack.enter_context(encoder)
                yield lambda: encoder(self.rows).vectors
            elif name == PLAIN:
                yield lambda: self._step(None)
            else:
                engine = GradDotProdEngine(
                    self.model, (self.val, self.val), optimizer=self.optimizer, val_refresh_interval=REFRESH
                )
                stack.enter_context(engine)
                yield lambda: self._step(engine)

    def _step(self, engine: GradDotProdEngine | None) -> Any:
        if engine is not None:
            engine.prepare(len(self.ids), tokens=self.ids.numel())
        loss: Tensor = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        if engine is not None:
            engine.watch(loss, labels=self.ids)
        loss.backward()
        scores = None if engine is None else engine.collect().total
        self.optimizer.step()
        self.optimizer.zero_grad()
        return scores


def counts(run: Callable[[], Any]) -> dict[str, int]:
    """What one run does that no other process disturbs."""
    kept = [0, 0]

    def keep(tensor: Tensor) -> Tensor:
        kept[0] += 1
        kept[1] += tensor.numel()
        return tensor

    with _Counted() as counted:
        run()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    profile = cProfile.Profile()
    profile.enable()
    run()
    profile.disable()
    calls = sum(entry.callcount for entry in profile.getstats())
    return {"operations": counted.operations, "kept tensors": kept[0], "kept numbers": kept[1], "calls": calls}


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def serve(model: str, way: str) -> None:
    """Answer ``counts`` or a number of runs, a line each, until standard input ends."""
    torch.set_num_threads(1)
    with Bench(model).way(way) as run:
        for _ in range(WARM_UP):
            answer = run()
        digest = None if answer is None else float(answer.double().norm())
        for line in sys.stdin:
            if line.strip() == "counts":
                found: dict[str, Any] = {**counts(run), "norm": digest}
            else:
                found = {"cpu": [], "faults": []}
                for _ in range(int(line)):
                    faults, began = _faults(), time.process_time()
                    run()
                    found["cpu"].append(time.process_time() - began)
                    found["faults"].append(_faults() - faults)
            print(json.dumps(found), flush=True)


class Child:
    """A process with the code of a checkout that goes one way when it is told to."""

    def __init__(self, tree: Path, model: str, way: str) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = f"{tree}{os.pathsep}{Path(__file__).parent}"
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--serve", model, way],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | threads | MALLOC | {"PYTHONPATH": path},
        )

    def ask(self, what: str | int) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(what, file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        self._process.communicate()


def measure(trees: dict[str, Path], model: str, way: str, processes: int, turns: int, runs: int) -> dict[str, Any]:
    """The least CPU seconds of each turn's runs and the median of their page faults, by set of processes; the counts.

    The least, because what others do on the machine only adds.
    """
    found: dict[str, Any] = {"cpu": [], "faults": [], "counts": {}}
    for _ in range(processes):
        children = {name: Child(tree, model, way) for name, tree in trees.items()}
        found["counts"] = {name: child.ask("counts") for name, child in children.items()}
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
        for turn in range(turns):
            for name in trees if turn % 2 == 0 else reversed(trees):
                answers[name].append(children[name].ask(runs))
        for child in children.values():
            child.close()
        found["cpu"].append({name: [min(x["cpu"]) for x in each] for name, each in answers.items()})
        found["faults"].append(
            {name: float(np.median([y for x in each for y in x["faults"]])) for name, each in answers.items()}
        )
    return found


def log_ratios(seconds: Sequence[dict[str, list[float]]], name: str) -> list[list[float]]:
    """ln(seconds of ``name`` ÷ before), turn by turn, for each set of processes."""
    return [[float(np.log(x / y)) for x, y in zip(run[name], run[BEFORE], strict=True)] for run in seconds]


def percent(ratios: Sequence[Sequence[float]]) -> str:
    """The mean over processes of the median ratio as a difference in per cent, with its 95 % interval: processes are
    drawn again, and turns within each.
    """
    rng = np.random.default_rng(0)
    each = [np.array(run) for run in ratios]
    drawn = np.empty(RESAMPLED)
    for place in range(RESAMPLED):
        chosen = rng.integers(len(each), size=len(each))
        drawn[place] = np.mean([np.median(each[c][rng.integers(len(each[c]), size=len(each[c]))]) for c in chosen])
    middle = float(np.mean([np.median(run) for run in each]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{np.expm1(middle):+.2%} ({np.expm1(low):+.2%} to {np.expm1(high):+.2%})"


def extra(found: dict[str, Any]) -> float:
    """Milliseconds that a run after takes beyond one before: the median of all turns."""
    pairs = [zip(run[AFTER], run[BEFORE], strict=True) for run in found["cpu"]]
    return 1e3 * float(np.median([x - y for turns in pairs for x, y in turns]))


def row(model: str, way: str, found: dict[str, Any]) -> dict[str, str]:
    samples, tokens = BATCHES[model]
    mine = [x for run in found["cpu"] for x in run[BEFORE]]
    return {
        "model": f"{model}, {samples} × {tokens} tokens",
        "way": way,
        "before, CPU ms": f"{float(np.median(mine)) * 1e3:.1f}",
        "after": percent(log_ratios(found["cpu"], AFTER)),
        "before again": percent(log_ratios(found["cpu"], AGAIN)),
        "a batch, ms": f"{extra(found):+.3f}",
        "page faults": " → ".join(
            f"{np.mean([run[name] for run in found['faults']]):,.0f}" for name in (BEFORE, AFTER)
        ),
    }


def counted(model: str, way: str, found: dict[str, Any]) -> dict[str, str]:
    line = {"model": model, "way": way}
    for what in ("operations", "kept tensors", "kept numbers", "calls"):
        line[what] = " → ".join(f"{found['counts'][name][what]:,}" for name in (BEFORE, AFTER))
    return line


@click.command()
@click.option("--before", type=click.Path(exists=True, path_type=Path), help="Another checkout.")
@click.option("--processes", type=int, default=4, show_default=True, help="Sets of processes, one after another.")
@click.option("--turns", type=int, default=40, show_default=True, help="Turns of each set.")
@click.option("--runs", type=int, default=5, show_default=True, help="Runs in a turn; the least counts.")
@click.option("--model", "models", type=click.Choice(list(MODELS)), multiple=True, default=tuple(MODELS))
@click.option("--way", "ways", type=click.Choice([ENCODING, STEP, PLAIN]), multiple=True, default=(ENCODING, STEP))
@click.option("--serve", "served", type=(str, str), hidden=True)
@folders
def main(
    before: Path | None,
    processes: int,
    turns: int,
    runs: int,
    models: tuple[str, ...],
    ways: tuple[str, ...],
    served: tuple[str, str] | None,
    scratch: Path | None,
    out: Path,
) -> None:
    """Encode and train with the code of BEFORE and of this checkout, in turns."""
    if served is not None:
        serve(*served)
        return
    if before is None:
        raise click.UsageError("give --before, a checkout to compare with")
    trees = {BEFORE: before, AFTER: Path(__file__).resolve().parent.parent, AGAIN: before}
    results = Results(
        name="probes-paired",
        title="Encoding and training steps before and after",
        settings={"processes": processes, "turns": turns, "runs": runs, "threads": 1},
        facts=machine_facts(),
    )
    found = {f"{model}, {way}": measure(trees, model, way, processes, turns, runs) for model in models for way in ways}
    pairs = [(model, way) for model in models for way in ways]
    kept = " ".join(f"{name}={value}" for name, value in MALLOC.items())
    note = (
        f"CPU seconds of one thread; {processes} sets of three processes, {turns} turns of each: before, after, before "
        f"again, and back. A turn's time is the least of {runs} runs, since others on the machine only add. A ratio is "
        "of two neighbours of a turn; shown is the mean over processes of their medians, with a 95 % interval "
        "(processes and turns drawn again). *Before again* is the code of before in another process: what it differs "
        "by cannot be told from nothing. *A batch* is the difference, after less before. Encoding is `RowEncoder`, as "
        f"in a build; a step has AdamW, and a val gradient of {VAL_SAMPLES} samples every {REFRESH} steps. Memory is "
        f"kept ({kept}): else the pages that glibc gives back and takes again, thousands a batch and never as many in "
        "two processes, hide what is measured."
    )
    results.add(Table("Time", [row(*pair, found[", ".join(pair)]) for pair in pairs], note), **found)
    note = (
        "Of one batch: operations that torch dispatches in both passes, tensors that autograd keeps between them and "
        "their numbers, and calls of functions that Python's profiler counts."
    )
    results.add(Table("Counts", [counted(*pair, found[", ".join(pair)]) for pair in pairs], note))
    results.write(out)


if __name__ == "__main__":
    main()
