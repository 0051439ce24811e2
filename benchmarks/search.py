"""How fast exact search reads a store, beside a plain read of the same files; and the phases of a query."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from shutil import rmtree
from types import NoneType
from typing import Any

import click
import numpy as np
import torch
from common import (
    CORES,
    Clock,
    PeakMemory,
    Results,
    Spread,
    Table,
    folders,
    in_fresh_process,
    machine_facts,
    mebibytes,
    ratios,
    read_texts,
    scratch_folder,
    write_jsonl,
)
from numpy.typing import NDArray
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

import ghoststore
from ghoststore import Corpus, Part, ProjectionConfig, Store
from ghoststore.store import PartLayout
from ghoststore.store.base.manifest import PART
from ghoststore.store.base.own import remember
from ghoststore.store.part.encoding import ENCODINGS
from ghoststore.store.part.part import create_part
from ghoststore.store.part.sealing import seal_vectors
from ghoststore.store.spans.writer import BackgroundWriter, SpanData
from query.demo.tokenizer import train_tokenizer
from query.search.part_score import Term
from query.search.search import search

QUERIES = (1, 64, 1000)
TOP_K = 10
READ, READ_FAR = "plain read, one buffer", "plain read, main memory"
RING_BYTES = 256 << 20
GROWTH = 10
QUERY_RANK_TOTAL = 256
"""48 layers of GPT-2 Small: 12,288 numbers a row."""

Columns = dict[str, NDArray[Any]]
Draw = Callable[[np.random.Generator, int, int], NDArray[np.float32]]
"""Generator, rows, numbers of a row."""


def manifest_of(rows: int, dimension: int, dtype: str) -> dict[str, Any]:
    """The least manifest that a part opens with: its arrays, and that they come from nowhere."""
    layout = PartLayout.choose(rows=rows, dimension=dimension, groups=1, dtype=dtype, span_rows=None, store_text=False)
    storage = {
        "rows": rows,
        "dimension": dimension,
        "dtype": dtype,
        "groups": [["all", 0, dimension]],
        "span_rows": layout.span_rows,
        "chunk_rows": layout.chunk_rows,
        "store_text": False,
    }
    empty: dict[str, Any] = {
        section: {
            name: _least(types)
            for name, types in PART.entries.get(section, {}).items()
            if "." not in name and f"{section}.{name}" not in PART.optional
        }
        for section in (*PART.identity, *PART.description)
    }
    return {**empty, "layers": [], "storage": storage}


def _least(types: tuple[type, ...]) -> Any:
    """Nothing, where an entry may be that; else an empty one."""
    return None if NoneType in types else types[0]()


def normal(rng: np.random.Generator, count: int, dimension: int) -> NDArray[np.float32]:
    return rng.standard_normal((count, dimension), dtype=np.float32)


def random_part(
    store: Store, name: str, manifest: dict[str, Any], columns: Columns | None = None, draw: Draw = normal
) -> Part:
    """A complete part of drawn vectors, written as a build writes. ``columns`` are arrays of all its rows."""
    part = create_part(store.part_path(name), manifest, np.zeros((1, 5), dtype=np.int64))
    rng = np.random.default_rng(0)
    with BackgroundWriter(part) as writer:
        for span in range(part.layout.spans):
            start, stop = part.layout.span_of(span)
            arrays: Columns = {
                spec.name: np.zeros(stop - start, dtype=object if spec.dtype is str else spec.dtype)
                for spec in part.layout.arrays()
            }
            arrays["sample_id"] = np.array([f"row-{row}" for row in range(start, stop)], dtype=object)
            arrays["domain"] -= 1  # none
            arrays |= {column: values[start:stop] for column, values in (columns or {}).items()}
            vectors = draw(rng, stop - start, part.layout.dimension)
            seal_vectors(arrays, vectors, part)
            writer.put(SpanData(span, arrays))
    return Part(part.path)


def chunk_files(part: Part) -> list[Path]:
    spec = part.spec("vectors")
    return [part.path / key for span in part.spans for key in part.layout.chunk_keys(spec, span)]


def read_plainly(part: Part, ring_bytes: int) -> Callable[[], None]:
    """A read of every byte of the vectors, file by file, nothing checked, into a ring of that many bytes.

    A ring of one chunk stays in the processor's cache: no search can be as fast, for it must fetch every
    number once more. A large one ends in main memory, where a search finds its numbers too.
    """
    files = chunk_files(part)
    size = max(path.stat().st_size for path in files)
    places = max(1, min(ring_bytes // size, len(files)))
    ring = memoryview(np.ones(places * size, dtype=np.uint8))

    def read() -> None:
        for number, path in enumerate(files):
            start = number % places * size
            with open(path, "rb", buffering=0) as file:
                while file.readinto(ring[start : start + size]):
                    pass

    return read


def forget(part: Part) -> None:
    """Ask the kernel to drop the files of the vectors from its page cache. They are on the disk already."""
    for path in chunk_files(part):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def search_exactly(part: Part, queries: int, device: str) -> None:
    vectors = torch.randn(queries, part.layout.dimension, generator=torch.Generator().manual_seed(1))
    search([Term.of(part, vectors, metric="cosine")], top_k=TOP_K, device=device)


def measure_search(
    folder: str, part_name: str, device: str, repeats: int, queries: Sequence[int], cold: bool
) -> dict[str, list[float]]:
    """Wall seconds, repeat by repeat, of the plain reads and of each search; they take turns."""
    part = Store.open(folder).part(part_name)
    ways = {READ: read_plainly(part, 0), READ_FAR: read_plainly(part, RING_BYTES)}
    for count in queries:
        ways[f"search, {count:,} queries"] = lambda count=count: search_exactly(part, count, device)
    for run in ways.values():
        run()
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            if cold:
                forget(part)
            began = Clock.now(device)
            run()
            spent[way].append(Clock.now(device).since(began).wall)
    return spent


def measure_memory(folder: str, part_name: str, device: str) -> int:
    """Peak bytes of one search, beyond what was there before it. For a fresh process."""
    part = Store.open(folder).part(part_name)
    torch.ones(256, 256) @ torch.ones(256, 256)  # threads and libraries are there before
    memory = PeakMemory(device)
    memory.start()
    search_exactly(part, 64, device)
    return memory.beyond()


def add_speed(results: Results, store: Path, dtype: str, device: str, repeats: int, threads: int) -> None:
    """Bytes a second of the vectors, warm and cold."""
    part = Store.open(store).part(dtype)
    size = sum(path.stat().st_size for path in chunk_files(part))
    setting = (str(store), dtype, device, repeats)
    warm = in_fresh_process(measure_search, *setting, QUERIES, False, threads=threads)
    cold = in_fresh_process(measure_search, *setting, QUERIES[:1], True, threads=threads)
    rows = []
    for pages, spent in (("warm", warm), ("cold", cold)):
        for way, seconds in spent.items():
            rows.append(
                {
                    "page cache": pages,
                    "way": way,
                    "GB/s": Spread.of([size / s / 1e9 for s in seconds]).show(".2f"),
                    "÷ one buffer": ratios(spent[READ], seconds).show(".2f"),
                    "÷ main memory": ratios(spent[READ_FAR], seconds).show(".2f"),
                    "seconds": f"{Spread.of(seconds).median:.3f}",
                }
            )
    note = (
        f"{size / 1e6:,.0f} MB of vectors, {threads} thread(s), medians of {repeats} repeats (least to largest), in "
        f"turns; cosine, the best {TOP_K}. The plain reads go through the same files and check nothing, one into a "
        "buffer of a chunk that stays in the processor's cache, one into main memory; the search checks every checksum."
    )
    results.add(Table(f"Exact search, {dtype}", rows, note), **{f"search {dtype}": {"warm": warm, "cold": cold}})


def add_memory(results: Results, store: Path, parts: Sequence[str], device: str) -> None:
    found = {name: in_fresh_process(measure_memory, str(store), name, device) for name in parts}
    rows = []
    for name, peak in found.items():
        part = Store.open(store).part(name)
        rows.append({"rows": f"{part.rows:,}", "numbers a row": f"{part.layout.dimension:,}", "peak": mebibytes(peak)})
    note = "64 queries; the most beyond what was there before the search, each in a process of its own."
    results.add(Table("Memory as rows grow", rows, note), memory=found)


def query_store(folder: Path, data: Path, tokenizer: Path | None, rows: int) -> Path:
    """A store that ``ghoststore query`` takes: GPT-2 Small drawn at random, a real manifest, random vectors."""
    texts = read_texts(data)
    corpus = write_jsonl(
        folder / "corpus.jsonl",
        [{"id": f"row-{row}", "text": text} for row, text in enumerate(islice(cycle(texts), rows))],
    )
    loaded: Any = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else train_tokenizer(texts)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder / "checkpoint")
    loaded.save_pretrained(folder / "checkpoint")
    plan = ghoststore.build(
        checkpoint=folder / "checkpoint",
        data=corpus,
        store=folder / "store",
        projection=ProjectionConfig(rank_total=QUERY_RANK_TOTAL, precondition="none"),
        dry_run=True,
    )
    samples = list(Corpus.open(str(corpus)).samples())
    columns = {
        "sample_id": np.array([sample.id for sample in samples], dtype=object),
        "source_row": np.array([sample.source_row for sample in samples], dtype=np.int64),
        "source_file": np.array([sample.file for sample in samples], dtype=np.int32),
        "source_offset": np.array([sample.offset for sample in samples], dtype=np.int64),
        "source_digest": np.array([sample.digest() for sample in samples], dtype=np.uint64),
    }
    part = random_part(Store.create(folder / "store"), "random", plan.manifest, columns)
    remember(part.manifest, plan.manifest["source"], part.path)  # as a build of one's own
    return folder / "store"


def run_query(store: Path, val_set: Path, val_samples: int) -> tuple[float, float]:
    """(wall, CPU) seconds of the whole command."""
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [
            *(sys.executable, "-m", "ghoststore", "query", "--store", str(store), "--val-set", str(val_set)),
            *("--max-samples", str(val_samples), "--quiet", "--json"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    wall, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def run_phases(store: Path, val_set: Path, val_samples: int) -> dict[str, float]:
    """Wall seconds of each phase of the same query, in a fresh Python."""
    script = Path(__file__).with_name("query_phases.py")
    done = subprocess.run(
        [sys.executable, str(script), str(store), str(val_set), str(val_samples)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    phases: dict[str, float] = json.loads(done.stdout)
    return phases


def add_query(results: Results, store: Path, val_set: Path, val_samples: int, repeats: int) -> None:
    whole, again, phases = [], [], []
    caches = store.parent / "caches"  # where the vectors of val sets are kept
    os.environ["XDG_CACHE_HOME"] = str(caches)
    for _ in range(repeats):
        rmtree(caches, ignore_errors=True)
        phases.append(run_phases(store, val_set, val_samples))
        rmtree(caches, ignore_errors=True)
        whole.append(run_query(store, val_set, val_samples))
        again.append(run_query(store, val_set, val_samples))
    floor = ("imports", "model load", "val pass")
    rows = [{"phase": name, "seconds": Spread.of([run[name] for run in phases]).show()} for name in phases[0]]
    beyond = Spread.of([sum(run.values()) - sum(run[name] for name in floor) for run in phases])
    rows.append({"phase": f"**beyond {', '.join(floor)}**", "seconds": beyond.show()})
    for name, runs in {"the whole command": whole, "the same val set again": again}.items():
        for what, seconds in zip(("", ", CPU"), zip(*runs, strict=True), strict=True):
            rows.append({"phase": f"**{name}{what}**", "seconds": Spread.of(seconds).show()})
    part = Store.open(store).part()
    note = (
        f"GPT-2 Small, {part.rows:,} rows × {part.layout.dimension:,} numbers, {val_samples} val samples, warm files; "
        f"medians of {repeats} repeats (least to largest). Phases are timed inside a Python that calls what the "
        "command calls."
    )
    results.add(
        Table("ghoststore query, phase by phase", rows, note), query={"whole": whole, "again": again, "phases": phases}
    )


def known_dtypes(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    names = value.split(",")
    unknown = [name for name in names if name not in ENCODINGS]
    if unknown:
        raise click.BadParameter(f"{unknown} unknown; known: {', '.join(ENCODINGS)}")
    return names


@click.command()
@click.option("--rows", type=int, default=40_000, show_default=True)
@click.option("--dimension", type=int, default=3072, show_default=True, help="Numbers of a vector.")
@click.option("--dtypes", callback=known_dtypes, default="float32,bfloat16", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, default=CORES, help="Threads of the search.  [default: all cores]")
@click.option("--repeats", type=int, default=5, show_default=True)
@click.option("--query-command", is_flag=True, help="Measure the whole `ghoststore query` command instead.")
@click.option("--query-rows", type=int, default=10_000, show_default=True, help="Rows for --query-command.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Corpus for --query-command.")
@click.option("--val-set", type=click.Path(exists=True, path_type=Path), help="Val set for --query-command.")
@click.option("--val-samples", type=int, default=8, show_default=True, help="Val samples for --query-command.")
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), help="Its folder, for --query-command.")
@folders
def main(
    rows: int,
    dimension: int,
    dtypes: list[str],
    device: str,
    threads: int,
    repeats: int,
    query_command: bool,
    query_rows: int,
    data: Path | None,
    val_set: Path | None,
    val_samples: int,
    tokenizer: Path | None,
    scratch: Path | None,
    out: Path,
) -> None:
    """Compare exact search with a plain read of the same files, or time a whole query."""
    disable_progress_bar()
    with scratch_folder(scratch) as folder:
        if query_command:
            if data is None or val_set is None:
                raise click.UsageError("--query-command needs --data and --val-set")
            results = Results(
                name=f"query-{query_rows}x12288",
                title="ghoststore query, end to end",
                settings={"rows": query_rows, "val samples": val_samples, "data": data.name, "val set": val_set.name},
                facts=machine_facts(),
            )
            add_query(results, query_store(folder, data, tokenizer, query_rows), val_set, val_samples, repeats)
        else:
            results = Results(
                name=f"search-{rows}x{dimension}"
                + ("" if device == "cpu" else f"-{device}")
                + ("" if threads == CORES else f"-{threads}-threads"),
                title=f"Exact search of {rows:,} rows × {dimension:,} numbers",
                settings={
                    "rows": rows,
                    "dimension": dimension,
                    "dtypes": dtypes,
                    "threads": threads,
                    "repeats": repeats,
                    "device": device,
                },
                facts=machine_facts(device),
            )
            measure_all(results, folder, rows, dimension, dtypes, device, repeats, threads)
        results.write(out)


def measure_all(
    results: Results,
    folder: Path,
    rows: int,
    dimension: int,
    dtypes: Sequence[str],
    device: str,
    repeats: int,
    threads: int,
) -> None:
    store = Store.create(folder / "store")
    for dtype in dtypes:
        random_part(store, dtype, manifest_of(rows, dimension, dtype))
        add_speed(results, store.path, dtype, device, repeats, threads)
    random_part(store, "small", manifest_of(max(1, rows // GROWTH), dimension, dtypes[0]))
    add_memory(results, store.path, ("small", dtypes[0]), device)


if __name__ == "__main__":
    main()
