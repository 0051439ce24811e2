"""A build by W processes ÷ one by one process, one thread each: wall time in turns, and whether the bytes are equal."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
from common import Results, Table, folders, machine_facts, scratch_folder

ONE, APART = "one process", "builds apart, at once"


def built(store: Path, words: list[str]) -> tuple[float, dict[str, float]]:
    """(wall seconds from the shell, what the build itself says) of a build with ``words``."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "ghoststore", "build", "--store", str(store), "--name", "part", *words]
    done = subprocess.run(
        [*command, "--json", "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    return time.perf_counter() - began, json.loads(done.stdout)["seconds"]


def at_once(stores: list[Path], words: list[str]) -> tuple[float, float]:
    """(wall seconds, mean seconds of the spans) of a build into each of ``stores``, all at once."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(stores)) as pool:
        seconds = [inside["compute"] for _, inside in pool.map(lambda store: built(store, words), stores)]
    return time.perf_counter() - began, statistics.mean(seconds)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a part."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def saved_model(folder: Path, tokenizer: str, layers: int, width: int) -> Path:
    """A GPT-2 with random weights, and the tokenizer."""
    import torch
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_layer=layers, n_embd=width, n_head=width // 32, n_positions=512
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@click.command()
@click.option("--data", required=True, help="Corpus.")
@click.option("--tokenizer", required=True, help="Folder of a tokenizer.")
@click.option("--layers", default=4, show_default=True)
@click.option("--width", default=256, show_default=True)
@click.option("--rows", default=2000, show_default=True, help="Rows of the corpus.")
@click.option("--workers", default=2, show_default=True, help="W.")
@click.option("--turns", default=3, show_default=True)
@click.option("--engine", "engines", multiple=True, default=("processes",), show_default=True, help="processes, ray")
@folders
def main(
    data: str,
    tokenizer: str,
    layers: int,
    width: int,
    rows: int,
    workers: int,
    turns: int,
    engines: tuple[str, ...],
    scratch: Path | None,
    out: Path,
) -> None:
    """W workers beside one, on the same corpus, in turns."""
    with scratch_folder(scratch) as folder:
        words = ["--checkpoint", str(saved_model(folder / "model", tokenizer, layers, width)), "--data", data]
        words += ["--max-samples", str(rows), "--span-rows", "32", "--device", "cpu"]
        ways = {ONE: []} | {
            engine: ["--workers", str(workers), *(["--engine", "ray"] if engine == "ray" else [])] for engine in engines
        }
        walls: dict[str, list[float]] = {way: [] for way in (*ways, APART)}
        inside: dict[str, list[dict[str, float]]] = {way: [] for way in walls}
        bytes_of: dict[str, bool] = {}
        for turn in range(turns):
            first: dict[str, bytes] = {}
            for way, more in ways.items():
                store = folder / f"{way} {turn}"
                wall, seconds = built(store, [*words, *more])
                walls[way].append(wall)
                inside[way].append(seconds)
                files = tree(store / "parts/part")
                first = first or files
                bytes_of[way] = bytes_of.get(way, True) and files == first
            wall, seconds = at_once([folder / f"apart {turn} {number}" for number in range(workers)], words)
            walls[APART].append(wall / workers)
            inside[APART].append({"compute": seconds / workers})
        facts = {
            "rows": rows,
            "model": f"GPT-2, {layers} layers, width {width}",
            "turns": turns,
            "threads a process": 1,
        }
        results = Results(name="workers", title=f"A build by {workers} workers", settings=facts, facts=machine_facts())
        lines = []
        for way in walls:
            whole = [one / other for one, other in zip(walls[way], walls[ONE], strict=True)]
            spans = [one["compute"] / other["compute"] for one, other in zip(inside[way], inside[ONE], strict=True)]
            lines.append(
                {
                    "by": way if way == ONE else f"{workers} {'of Ray' if way == 'ray' else way}",
                    "wall seconds": f"{statistics.median(walls[way]):.1f}",
                    "÷ one process": f"{statistics.median(whole):.2f} ({min(whole):.2f} to {max(whole):.2f})",
                    "its spans alone ÷": f"{statistics.median(spans):.2f} ({min(spans):.2f} to {max(spans):.2f})",
                    "same bytes": "" if way == APART else "yes" if bytes_of[way] else "NO",
                }
            )
        note = (
            "Wall time from the shell, with starting Python, loading the model, the scan of the corpus and learning "
            "the projection, which one worker does while the others wait. Its spans alone: after that. Builds apart: "
            "as many whole builds at once, each of a store of its own, ÷ their number: what the cores give to work "
            "that has nothing in common. No division of one build can take less."
        )
        results.add(Table(title="A build from nothing", rows=lines, note=note), walls=walls, inside=inside)
        results.write(out)


if __name__ == "__main__":
    main()
