"""One command for a GPU: its tests, and what a build, a training step and a search reach of what the machine can do.

Each section stands by itself: one that fails is told as failed, and the others go on.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import torch
from choosing import Choosing
from common import (
    BuildWatch,
    Clock,
    PeakMemory,
    Results,
    Spread,
    Table,
    folders,
    machine_facts,
    mebibytes,
    scratch_folder,
    wait_for,
    write_jsonl,
)
from dot_product import REFRESH, VOCABULARY, Setting
from search import QUERIES, READ, chunk_files, manifest_of, measure_search, random_part
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

import ghoststore
from ghoststore import ProjectionConfig, Store
from indexer.training.architectures import ARCHITECTURES
from query.demo.corpus import read_corpus
from query.demo.tokenizer import train_tokenizer

KERNELS = 12
TEST_SECONDS = 180
PLAIN = {"precondition": "none"}
SECTIONS = ("tests", "machine", "build", "step", "kernels", "search", "index")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much of everything."""

    builds: dict[str, int]
    """Rows by architecture."""
    length: int
    step: str
    """Architecture of the training step."""
    vocabulary: int
    batch: int
    val: int
    repeats: int
    rows: int
    """Of the search."""
    dimension: int
    matrix: int
    copied: int
    """Bytes."""


FULL = Size(
    builds={"GPT2-Small": 2048, "GPT2-Large": 384}, length=1024, step="GPT2-Small",
    vocabulary=VOCABULARY, batch=16, val=8, repeats=5, rows=100_000, dimension=3072, matrix=8192, copied=1 << 30,
)  # fmt: skip
TINY = Size(
    builds={"GPT2-Tiny": 8}, length=32, step="GPT2-Tiny", vocabulary=1024, batch=2, val=2, repeats=1, rows=500,
    dimension=64, matrix=128, copied=1 << 20,
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Pack:
    """What the sections share: sizes, device, folder, what the machine reached, and the results."""

    size: Size
    device: str
    folder: Path
    results: Results
    flops: float = float("nan")
    """A second, of a product of two bfloat16 matrices."""
    to_device: float = float("nan")
    """Bytes a second, from pinned memory."""
    failed: list[str] = field(default_factory=list)

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")


def timed(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Wall seconds of one call, after one that is not measured."""
    work()
    wait_for(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    wait_for(device)
    return (time.perf_counter() - begun) / repeats


def tests(pack: Pack) -> None:
    """The tests that need a GPU."""
    several = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", *several, "-p", "no:cacheprovider"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=TEST_SECONDS)
    told = done.stdout.strip().splitlines()
    print(done.stdout[-6000:], file=sys.stderr)
    summary = told[-1] if told else done.stderr[-300:]
    wrong = [line for line in told if line.startswith(("FAILED ", "ERROR "))]
    rows = [{"summary": line} for line in (summary.strip("= "), *wrong)]
    pack.results.add(Table("Tests that need a GPU", rows), tests=summary, tests_that_failed=wrong)
    if done.returncode:
        raise RuntimeError(f"pytest: {summary}")


def machine(pack: Pack) -> None:
    """The rates that the others are compared with."""
    size, device = pack.size, pack.device
    one, other = (torch.randn(size.matrix, size.matrix, device=device, dtype=torch.bfloat16) for _ in range(2))
    pack.flops = 2 * size.matrix**3 / timed(lambda: one @ other, device, 10)
    source = torch.ones(size.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    on_device = size.copied / timed(lambda: target.copy_(source), device, 10)
    host = torch.ones(size.copied, dtype=torch.uint8, pin_memory=pack.on_cuda)
    pack.to_device = size.copied / timed(lambda: target.copy_(host, non_blocking=True), device, 10)
    rates = {
        f"product of bfloat16 matrices, {size.matrix:,} × {size.matrix:,}": f"{pack.flops / 1e12:,.0f} TFLOP/s",
        "copy on the device, bytes read": f"{on_device / 1e9:,.0f} GB/s",
        "copy from pinned memory to the device": f"{pack.to_device / 1e9:,.1f} GB/s",
    }
    rows = [{"what": name, "rate": rate} for name, rate in rates.items()]
    pack.results.add(
        Table("The machine", rows), flops=pack.flops, copy_on_device=on_device, copy_to_device=pack.to_device
    )


def saved(pack: Pack, architecture: str, rows: int) -> tuple[Path, Path]:
    """(checkpoint in bfloat16, corpus of ``rows`` samples of more than the length)."""
    texts = [row["text"] for row in read_corpus().train]
    tokenizer = train_tokenizer(texts, 1024)
    counts = [len(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    source, samples = cycle(zip(texts, counts, strict=True)), []
    for row in range(rows):
        drawn = [next(source)]
        while sum(count for _, count in drawn) < pack.size.length + 8:
            drawn.append(next(source))
        samples.append({"id": f"row-{row:06d}", "text": "\n".join(text for text, _ in drawn)})
    shape, end = ARCHITECTURES[architecture], tokenizer.eos_token_id
    torch.manual_seed(0)
    with torch.device(pack.device):
        model = GPT2LMHeadModel(
            GPT2Config(
                n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, vocab_size=pack.size.vocabulary,
                n_positions=max(1024, pack.size.length), bos_token_id=end, eos_token_id=end,
            )
        )  # fmt: skip
    folder = pack.folder / architecture
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, write_jsonl(pack.folder / f"{architecture}.jsonl", samples)


def flops_a_token(architecture: str, length: int, vocabulary: int) -> float:
    """Of a forward pass and a backward one without weight gradients, and of the two sides of the projection."""
    shape = ARCHITECTURES[architecture]
    block = 12 * shape.width**2
    passes = 4 * (shape.layers * block + vocabulary * shape.width)
    attention = 12 * shape.layers * shape.width * length / 2  # half of the pairs: it is causal
    sides = 2 * 64 * 18 * shape.width * shape.layers  # (in + out) of four linears: (4 + 2 + 5 + 5) × width, and blocks
    return passes + attention + sides


def build(pack: Pack) -> None:
    """Builds to disk: by default, and without learning."""
    rows, numbers = [], {}
    for architecture, count in pack.size.builds.items():
        checkpoint, corpus = saved(pack, architecture, count)
        for label, projection in {"default": None, "precondition none": ProjectionConfig(**PLAIN)}.items():
            watch = BuildWatch(pack.device)
            report = ghoststore.build(
                checkpoint=checkpoint, data=corpus, store=pack.folder / "built", name=f"{architecture}-{len(rows)}",
                max_length=pack.size.length, device=pack.device, model_dtype="bfloat16", projection=projection,
                progress=watch,
            )  # fmt: skip
            assert report.tokens == count * pack.size.length, "the rows have another length"
            rate = report.tokens / watch.seconds().wall
            learning = (report.seconds or {}).get("learning", 0.0)
            share = rate * flops_a_token(architecture, pack.size.length, pack.size.vocabulary) / pack.flops
            learnt = ProjectionConfig().calibration_samples
            rows.append({
                "model": architecture,
                "build": label,
                "tokens": f"{report.tokens:,}",
                "tokens/s to disk": f"{rate:,.0f}",
                "of the matrix rate": f"{share:.0%}",
                "learning, s": f"{learning:.1f}" if learning else "",
                "÷ building as many rows": f"{learning * rate / (min(learnt, count) * pack.size.length):.1f}"
                if learning else "",
                "all, s": f"{report.seconds['total']:.1f}" if report.seconds else "",
                "peak": mebibytes(watch.memory.beyond()),
            })  # fmt: skip
            numbers[f"{architecture}, {label}"] = {
                "rate": rate,
                "share": share,
                "spent": {name: clock.wall for name, clock in watch.spent.items()},
                "seconds": report.seconds,
            }
    note = (
        f"Rows of {pack.size.length:,} tokens, bfloat16. To disk: tokens, vectors, writing, fsync and commits. Of the "
        "matrix rate: multiplications that any method does (two passes without weight gradients, attention, both "
        "sides) at the rate of the product above. Peak beyond the loaded model."
    )
    pack.results.add(Table("Build", rows, note), builds=numbers)


SCORED: dict[str, dict[str, Any]] = {"exact": {}, "sketched": {"projection": ProjectionConfig()}}
BLOCKS: dict[str, Any] = {"score_layers": "blocks"}
CHOSEN: dict[str, tuple[bool, dict[str, Any]]] = {
    # Whether one pass is all, and how candidates are scored.
    "two passes, sketched": (False, SCORED["sketched"]),
    "two passes, exact": (False, BLOCKS),
    "one pass, sketched": (True, SCORED["sketched"]),
    "one pass, exact": (True, BLOCKS),
}


def step_setting(pack: Pack) -> Setting:
    size = pack.size
    return Setting(
        architecture=size.step, batch=size.batch, length=size.length, val=size.val, dtype="bfloat16",
        device=pack.device, repeats=size.repeats, vocabulary=size.vocabulary,
    )  # fmt: skip


def step(pack: Pack) -> None:
    """Training steps: plain, scored, and choosing among twice the samples; in turns."""
    setting = step_setting(pack)
    bench = Choosing(setting)
    ways: dict[str, tuple[Any, Callable[[Any], Clock]]] = {"plain": (None, bench.step)}
    for name, options in SCORED.items():
        ways[f"{name} scores"] = (bench.engine(options, REFRESH), bench.step)
    for name, (one, options) in CHOSEN.items():
        ways[f"choosing, {name}"] = (
            bench.engine(options, 1),
            lambda engine, one=one: bench.chosen(engine, one_pass=one),
        )
    fresh: dict[str, list[float]] = {way: [] for way in ways}
    cached: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, int] = {}
    for turn in range(setting.repeats + 1):
        for way, (engine, run) in ways.items():
            memory = PeakMemory(pack.device)
            memory.start()
            if engine is None:
                seconds = [run(None).wall, run(None).wall]
            else:
                with engine:
                    engine.set_validation(engine.val_batches)
                    seconds = [run(engine).wall, run(engine).wall]
            peaks[way] = memory.beyond()
            if turn:  # the first is a warm-up
                fresh[way].append(seconds[0])
                cached[way].append(seconds[1])
    rows = []
    for way in ways:
        choosing = way.startswith("choosing")
        spent = fresh[way] if choosing or way == "plain" else [
            (one + (REFRESH - 1) * other) / REFRESH for one, other in zip(fresh[way], cached[way], strict=True)
        ]  # fmt: skip
        over = Spread.of([one / other for one, other in zip(spent, fresh["plain"], strict=True)])
        tokens = setting.batch * setting.length
        rows.append({
            "step": way,
            "ms": f"{Spread.of(spent).median * 1e3:.1f}",
            "÷ plain": over.show(".2f"),
            "tokens/s": f"{tokens / Spread.of(spent).median:,.0f}",
            "peak": mebibytes(peaks[way]),
        })  # fmt: skip
    note = (
        f"{setting.told}, bfloat16, AdamW and clipping included. Scored steps: one of {REFRESH} with a val gradient. "
        f"Choosing: {setting.batch} of {2 * setting.batch}, over the block linears, a val gradient in every step; the "
        "tokens are those trained on. Peak beyond model and optimizer."
    )
    pack.results.add(Table("Training step", rows, note), fresh=fresh, cached=cached, peaks=peaks)


def kernels(pack: Pack) -> None:
    """What the device's time goes to, in a scored step."""
    bench = Choosing(step_setting(pack))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if pack.on_cuda else [])]
    for name, options in SCORED.items():
        with bench.engine(options, REFRESH) as engine:
            for _ in range(2):
                bench.step(engine)
            with profile(activities=activities) as profiled:
                bench.step(engine)
        spent = [
            (event.key, float(event.self_device_time_total if pack.on_cuda else event.self_cpu_time_total) / 1e3)
            for event in profiled.key_averages()
        ]
        most = sorted(spent, key=lambda pair: -pair[1])[:KERNELS]
        lines = [{"operation or kernel": kernel[:80], "ms": f"{ms:.2f}"} for kernel, ms in most]
        pack.results.add(
            Table(f"Where the time of a step goes: {name} scores", lines, "Of one step; operations and their kernels.")
        )


def search(pack: Pack) -> None:
    """Exact search over warm files."""
    size, rows, numbers = pack.size, [], {}
    store = Store.create(pack.folder / "searched")
    for dtype in ("float32", "int8", "onebit"):
        part = random_part(store, dtype, manifest_of(size.rows, size.dimension, dtype))
        stored = sum(path.stat().st_size for path in chunk_files(part))
        spent = measure_search(str(store.path), dtype, pack.device, min(3, size.repeats), QUERIES, False)
        here = measure_search(str(store.path), dtype, "cpu", min(3, size.repeats), QUERIES, False)
        spent |= {f"{way}, by the CPU": seconds for way, seconds in here.items() if way.startswith("search")}
        numbers[dtype] = {"bytes": stored, **spent}
        for way, seconds in spent.items():
            rate = stored / Spread.of(seconds).median
            rows.append({
                "numbers": dtype,
                "way": way,
                "GB/s": f"{rate / 1e9:.2f}",
                "÷ plain read": f"{Spread.of(spent[READ]).median / Spread.of(seconds).median:.2f}",
                "÷ copy to the device": f"{rate / pack.to_device:.2f}",
                "rows/s": f"{size.rows / Spread.of(seconds).median:,.0f}",
            })  # fmt: skip
    note = (
        f"{size.rows:,} rows × {size.dimension:,} numbers, cosine, files in the page cache; checksums checked. By the "
        "CPU: with all of its cores."
    )
    pack.results.add(Table("Exact search", rows, note), search=numbers)


def index(pack: Pack) -> None:
    """FAISS on the GPU beside FAISS on the CPU, where a FAISS for GPUs is installed."""
    from query.ann.command import index as make_index
    from query.ann.engine import load_faiss

    faiss = load_faiss()
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        rows = [{"index": "not measured: this FAISS is not one for GPUs (faiss-gpu, faiss-gpu-cuvs)"}]
        pack.results.add(Table("Index", rows))
        return
    rows = []
    for device in ("cpu", "cuda"):
        begun = time.perf_counter()
        make_index(store=pack.folder / "searched", part="float32", name=f"on-{device}", device=device)
        rows.append({"index": device, "seconds to make": f"{time.perf_counter() - begun:.1f}"})
    pack.results.add(Table("Index", rows, "The default kind."))


def run(pack: Pack, names: Sequence[str], out: Path) -> None:
    """The sections, each with its seconds."""
    spent = {}
    for name in names:
        begun = time.perf_counter()
        try:
            globals()[name](pack)
        except Exception:  # noqa: BLE001  what fails is told, and the other sections are measured
            traceback.print_exc()
            pack.failed.append(name)
        spent[name] = time.perf_counter() - begun
        if pack.on_cuda:
            torch.cuda.empty_cache()
        print(f"{name}: {spent[name]:.0f} s", file=sys.stderr, flush=True)
        pack.results.write(out)  # what was measured so far stays, should the time run out
    rows = [
        {"section": name, "seconds": f"{seconds:.0f}", "": "failed" if name in pack.failed else ""}
        for name, seconds in spent.items()
    ]
    pack.results.add(Table("Sections", rows), sections=spent, failed=pack.failed)


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="Sizes that a CPU does in seconds: for the code, not for figures.")
@click.option("--section", "sections", multiple=True, type=click.Choice(SECTIONS), help="Only these. Repeatable.")
@folders
def main(device: str, tiny: bool, sections: tuple[str, ...], scratch: Path | None, out: Path) -> None:
    """Test and measure on a GPU, in at most eight minutes."""
    disable_progress_bar()
    size = TINY if tiny else FULL
    names = [name for name in SECTIONS if name in sections or (not sections and (name != "tests" or not tiny))]
    names = list(dict.fromkeys(["machine", *names])) if "machine" not in names and sections else names
    with scratch_folder(scratch) as folder:
        results = Results(
            name=f"gpu-{device}{'-tiny' if tiny else ''}",
            title=f"What a machine with {device} reaches",
            settings=asdict(size),
            facts=machine_facts(device),
        )
        pack = Pack(size=size, device=device, folder=folder, results=results)
        run(pack, names, out)
        results.write(out)
    if pack.failed:
        raise click.ClickException(f"failed: {', '.join(pack.failed)}")


if __name__ == "__main__":
    main()
