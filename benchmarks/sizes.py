"""A part of many short rows, built, searched and verified from the shell; and one of many times as many, copied."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import Results, Table, folders, machine_facts, mebibytes, read_texts, scratch_folder

WORDS = 8
"""Words of a row, beside its number."""
LOOK = 0.02
"""Seconds between two looks at the memory of a command."""
LAYERS, NUMBERS = 48, 2048
"""Of GPT-2 Small by default: projected layers, and one-bit numbers of each."""
ROW_TOKENS, TOKENS_A_SECOND = 1024, 150_000
"""Of a row, and built by an H100 in bfloat16 (results/gpu-cuda.md)."""
ROWS_A_CPU_SECOND = 179_000
"""Searched exactly with the extra ``fast`` (results/search-paired.md)."""
READS_OF_A_BUILD, OTHER_READS, OTHER_WRITES = 10, 10, 7
"""Requests a span: reads of a build; of a query, beside one a chunk of vectors (354 for 32 spans of one chunk); writes
of a build, beside two a file (docs/object-storage.md, counted by the server)."""
DELAY, AT_ONCE = 0.02, 16
"""Seconds until an answer comes, and requests at once."""
WRITE, READ, GIGABYTE_MONTH = 5e-6, 4e-7, 0.023
"""Dollars: list prices of S3 Standard in one region, as an example."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command took."""

    wall: float
    cpu: float
    peak: int
    """Bytes: the most that was resident."""
    printed: Any

    @classmethod
    def command(cls, caches: Path, *words: str | Path) -> Ran:
        """``ghoststore WORDS…`` in a process of its own, of one whose folder for caches is ``caches``."""
        env = {**os.environ, "XDG_CACHE_HOME": str(caches)}
        began, peak = time.perf_counter(), 0
        shell = [sys.executable, "-m", "ghoststore", *map(str, words), "--json"]
        with tempfile.TemporaryFile("w+") as printed:
            process = subprocess.Popen(shell, stdout=printed, stderr=subprocess.DEVNULL, env=env)
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                peak = max(peak, resident(process.pid))
                time.sleep(LOOK)
            wall, (_, status, used) = time.perf_counter() - began, ended
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{' '.join(shell)} ended with {process.returncode}")
            printed.seek(0)
            return cls(wall, used.ru_utime + used.ru_stime, peak, json.load(printed))


def resident(process: int) -> int:
    """Bytes: the most that was resident so far. Not ru_maxrss, which a process inherits."""
    with suppress(OSError):
        for entry in Path(f"/proc/{process}/status").read_text().splitlines():
            if entry.startswith("VmHWM:"):
                return int(entry.split()[1]) << 10
    return 0


def short_rows(data: Path, rows: int, out: Path) -> Path:
    """A corpus of ``rows`` rows of some words of ``data``, no two alike."""
    words = cycle(word for text in read_texts(data) for word in text.split())
    with out.open("w", encoding="utf-8") as file:
        for row in range(rows):
            text = " ".join(islice(words, WORDS))
            file.write(json.dumps({"id": f"row-{row}", "text": f"{text} {row}", "domain": f"domain-{row % 7}"}) + "\n")
    return out


def model(folder: Path, tokenizer: Path, width: int) -> Path:
    """A GPT-2 of one layer with random weights, and the tokenizer. In a process of its own: it takes memory."""
    code = (
        "import sys, torch, transformers\n"
        "folder, tokenizer, width = sys.argv[1:]\n"
        "words = transformers.AutoTokenizer.from_pretrained(tokenizer)\n"
        "config = transformers.GPT2Config(vocab_size=len(words), n_layer=1, n_embd=int(width), n_head=2,"
        " n_positions=64, bos_token_id=0, eos_token_id=0)\n"
        "torch.manual_seed(0)\n"
        "transformers.GPT2LMHeadModel(config).save_pretrained(folder)\n"
        "words.save_pretrained(folder)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(tokenizer), str(width)], check=True)
    return folder


def copied(store: Path, name: str, times: int) -> None:
    """A part ``NAME-copied`` of the whole spans of part ``name``, each ``times`` over, as a build writes them."""
    from ghoststore.store import Store
    from ghoststore.store.part.part import SPAN_TABLE, create_part, fixed_array, span_table
    from ghoststore.store.spans.writer import BackgroundWriter, SpanData

    part = Store.open(store).part(name)
    names = [spec.name for spec in part.layout.arrays()]
    learned = {path.parent.name for path in part.path.glob("*/zarr.json") if '"array"' in path.read_text()}
    fixed = {name: fixed_array(part, name) for name in learned - {*names, SPAN_TABLE}}
    whole = part.layout.rows // part.layout.span_rows
    manifest = json.loads(json.dumps(part.manifest))
    manifest["storage"]["rows"] = whole * times * part.layout.span_rows
    made = create_part(
        part.path.with_name(f"{name}-copied"), manifest, np.tile(span_table(part)[:whole], (times, 1)), fixed
    )
    with BackgroundWriter(made) as writer:
        for span in range(whole):
            arrays = {name: part.read(name, *part.layout.span_of(span)) for name in names}
            for again in range(times):
                writer.put(SpanData(again * whole + span, arrays))


def files_and_bytes(folder: Path) -> tuple[int, int]:
    sizes = [os.path.getsize(os.path.join(where, name)) for where, _, names in os.walk(folder) for name in names]
    return len(sizes), sum(sizes)


def computed() -> Table:
    """Bytes, objects, requests, seconds and money of a part of GPT-2 Small by default, by arithmetic."""
    from ghoststore.store.part.layout import PartLayout

    lines = []
    for rows in (10**6, 10**7, 10**8, 10**9):
        layout = PartLayout.choose(
            rows=rows, dimension=LAYERS * NUMBERS, groups=LAYERS, dtype="onebit", span_rows=None, store_text=False
        )
        files = sum(len(layout.chunk_keys(spec, 0)) for spec in layout.arrays())
        vectors = len(layout.chunk_keys(layout.arrays()[0], 0))
        writes, reads = layout.spans * (2 * files + OTHER_WRITES), layout.spans * READS_OF_A_BUILD
        asked, size = layout.spans * (vectors + OTHER_READS), rows * LAYERS * (NUMBERS // 8 + 8)
        lines.append(
            {
                "rows": f"{rows:,}",
                "bytes": f"{size / 1e9:,.0f} GB",
                "objects": f"{layout.spans * (files + 1):,}",
                "build: requests": f"{writes + reads:,}",
                "build: money": f"${writes * WRITE + reads * READ:,.2f}",
                "build: H100 hours": f"{rows * ROW_TOKENS / TOKENS_A_SECOND / 3600:,.1f}",
                "kept for a month": f"${size / 1e9 * GIGABYTE_MONTH:,.2f}",
                "query: requests": f"{asked:,}",
                "query: money": f"${asked * READ:,.2f}",
                "query: CPU seconds": f"{rows / ROWS_A_CPU_SECOND:,.0f}",
                "query: hours of waiting": f"{asked * DELAY / AT_ONCE / 3600:,.1f}",
            }
        )
    note = (
        f"By arithmetic, for GPT-2 Small by default ({LAYERS} layers of {NUMBERS:,} one-bit numbers, each with a norm "
        f"and a scale) and rows of {ROW_TOKENS:,} tokens; none of these was built. Files and spans are those that a "
        f"build chooses. Measured elsewhere: {TOKENS_A_SECOND:,} tokens a second of an H100, {ROWS_A_CPU_SECOND:,} "
        f"rows a CPU second, requests a span. Waiting: {1000 * DELAY:g} ms a request, {AT_ONCE} at once, one process. "
        f"Money: ${WRITE * 1000:g} for 1,000 requests that write, ${READ * 1000:g} for 1,000 that read, "
        f"${GIGABYTE_MONTH:g} a GB and month."
    )
    return Table("Arithmetic", lines, note)


class Commands:
    """The commands that were run, a line of the table each."""

    def __init__(self, store: Path, checkpoint: Path, val_set: Path) -> None:
        self.store = store
        self._asked = ("--checkpoint", checkpoint, "--val-set", val_set, "--no-text", "--device", "cpu")
        self.lines: list[dict[str, str]] = []
        self.numbers: list[dict[str, Any]] = []

    def run(self, what: str, rows: int, *words: str | Path) -> Any:
        """What the command printed."""
        ran = Ran.command(self.store.parent / "caches", words[0], "--store", self.store, *words[1:])
        self.lines.append(
            {
                "command": what,
                "rows": f"{rows:,}",
                "wall seconds": f"{ran.wall:,.1f}",
                "CPU seconds": f"{ran.cpu:,.1f}",
                "rows a second": f"{rows / ran.wall:,.0f}",
                "peak memory": mebibytes(ran.peak),
            }
        )
        self.numbers.append({"command": what, "rows": rows, "wall": ran.wall, "cpu": ran.cpu, "peak": ran.peak})
        return ran.printed

    def ask(self, part: str, rows: int) -> None:
        """Open, search, and check a part."""
        self.run("info", rows, "info", "--part", part)
        first = self.run("query", rows, "query", "--part", part, *self._asked)
        again = self.run("query, the same val set again", rows, "query", "--part", part, *self._asked)
        assert first == again
        assert self.run("verify", rows, "verify", "--part", part)["sound"]


@click.command()
@click.option(
    "--data", required=True, type=click.Path(exists=True, path_type=Path), help="Corpus whose words rows have."
)
@click.option("--tokenizer", required=True, type=click.Path(exists=True, path_type=Path), help="Its folder.")
@click.option("--rows", default=1_000_000, show_default=True, help="Rows that are built; before them a tenth.")
@click.option("--times", default=10, show_default=True, help="How often each span is copied.")
@click.option("--width", default=64, show_default=True, help="Of the model, a GPT-2 of one layer.")
@folders
def main(data: Path, tokenizer: Path, rows: int, times: int, width: int, scratch: Path | None, out: Path) -> None:
    """Time, memory, files and bytes of parts of very many rows."""
    settings = {"rows": rows, "words a row": WORDS + 1, "model": f"GPT-2, 1 layer, width {width}", "times": times}
    results = Results(name="sizes", title="Many rows", settings=settings, facts=machine_facts())
    with scratch_folder(scratch) as folder:
        checkpoint, val_set = model(folder / "model", tokenizer, width), short_rows(data, 64, folder / "val.jsonl")
        commands = Commands(folder / "store", checkpoint, val_set)
        for name, count in {"tenth": rows // 10, "whole": rows}.items():
            corpus = short_rows(data, count, folder / f"{name}.jsonl")
            made = ("--checkpoint", checkpoint, "--data", corpus, "--name", name, "--device", "cpu")
            commands.run("build", count, "build", *made)
            commands.ask(name, count)
        began = time.perf_counter()
        script = "import sys, sizes; sizes.copied(sys.argv[1], 'whole', int(sys.argv[2]))"
        copying = [sys.executable, "-c", script, str(commands.store), str(times)]
        subprocess.run(copying, check=True, cwd=Path(__file__).parent)
        took = time.perf_counter() - began
        (part,) = commands.run("info", rows * times, "info", "--part", "whole-copied")["parts"]
        commands.ask("whole-copied", part["rows"])
        commands.run("info of all parts", part["rows"] + rows + rows // 10, "info")
        parts = []
        for name in ("tenth", "whole", "whole-copied"):
            files, size = files_and_bytes(commands.store / "parts" / name)
            parts.append({"part": name, "files": files, "bytes": size})
    note = (
        "Each in a process of its own, from the shell, with starting Python and, unless the val set was asked about "
        "before, loading the model. Peak memory is what was resident at most, with libraries and files that are mapped."
    )
    results.add(Table("Commands", commands.lines, note), commands=commands.numbers)
    lines = [{"part": one["part"], "files": f"{one['files']:,}", "bytes": f"{one['bytes']:,}"} for one in parts]
    note = f"whole-copied are the whole spans of the part before it, {times} times over, written in {took:,.0f} s."
    results.add(Table("On the disk", lines, note), parts=parts, copying=took)
    results.add(computed())
    results.write(out)


if __name__ == "__main__":
    main()
