"""The explorer, as its user waits for it: the first answer, the next ones, and the memory after many questions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from shutil import which
from urllib.request import Request, urlopen

import click
import torch
from common import Results, Spread, Table, folders, machine_facts, mebibytes, scratch_folder, write_jsonl
from transformers import GPT2Config, GPT2LMHeadModel

import ghoststore
from query.demo.corpus import read_corpus
from query.demo.tokenizer import train_tokenizer

MODEL = {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 128}
LOOKS = (1, 10, 100)
"""Questions after which the memory is looked at, beside the last one."""
STARTS = 3
MOST_SECONDS = 300
"""For an answer in the page."""


class Server:
    """``ghoststore serve`` in a process of its own, on one thread."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def ask(self, text: str, *, counted: bool) -> tuple[float, float]:
        """Seconds on the wall and of the server's CPU for an answer, with the scores of all rows ``counted`` or not."""
        address, _, token = self.url.partition("?token=")
        body = json.dumps({"val_set": [text], "top_k": 10, "histogram": counted}).encode()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        cpu, began = self.cpu(), time.perf_counter()
        with urlopen(Request(f"{address}api/query", body, headers)) as answer:
            answer.read()
        return time.perf_counter() - began, self.cpu() - cpu

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> int:
        """Bytes in memory that are its own, without files that are mapped."""
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) << 10


@contextmanager
def serving(store: Path) -> Iterator[Server]:
    words = [sys.executable, "-m", "ghoststore", "serve", "--store", str(store)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield Server(process, process.stdout.readline().strip())
        finally:
            process.terminate()


def made(folder: Path, rows: int, texts: list[str]) -> Path:
    """A store with one part of ``rows`` rows of the demo's texts, over and over, by a small model and the default."""
    tokenizer = train_tokenizer(texts)
    checkpoint, corpus = folder / "checkpoint", folder / "corpus.jsonl"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **MODEL)).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    write_jsonl(corpus, [{"id": f"row-{row}", "text": text} for row, text in enumerate(islice(cycle(texts), rows))])
    ghoststore.build(checkpoint=checkpoint, data=corpus, store=folder / "store")
    return folder / "store"


@click.command()
@click.option("--rows", type=int, default=50_000, show_default=True)
@click.option("--questions", type=int, default=1000, show_default=True, help="After which memory is looked at.")
@folders
def main(rows: int, questions: int, scratch: Path | None, out: Path) -> None:
    """Ask the explorer of a part of ROWS rows: what its user waits for, and the memory of the server."""
    corpus = read_corpus()
    texts, asked = ([row["text"] for row in some] for some in (corpus.train, corpus.val_domains))
    with scratch_folder(scratch) as folder:
        store = made(folder, rows, texts)
        (part,) = ghoststore.info(store).parts
        results = Results(
            name="explorer",
            title=f"The explorer of a part of {rows:,} rows",
            settings={"rows": rows, "numbers a row": part.dimension, "dtype": part.dtype, "questions": questions},
            facts=machine_facts(),
        )
        add_waits(results, store, asked)
        add_memory(results, store, asked, questions)
    results.write(out)


def add_waits(results: Results, store: Path, texts: list[str]) -> None:
    firsts, plain, counted, pages = [], [], [], []
    for _ in range(STARTS):
        with serving(store) as server:
            firsts.append(server.ask(texts[0], counted=True))
            for text in texts[1:11]:
                plain.append(server.ask(text, counted=False))
                counted.append(server.ask(text, counted=True))
        with serving(store) as server:
            pages.append(from_the_page(server.url, texts[0]))
    rows = [
        line("the first answer by /api/query: the model is loaded", firsts),
        line("a later one: hits alone", plain),
        line("a later one: with the scores of all rows, as the page asks", counted),
    ]
    if pages[0] is not None:
        rows.append(
            {"what": "the first answer in the page, from the click", "seconds": shown(pages), "CPU seconds": ""}
        )
    note = "The server on one thread. Medians (least to largest)."
    results.add(Table("Seconds to an answer", rows, note), firsts=firsts, plain=plain, counted=counted, pages=pages)


def add_memory(results: Results, store: Path, texts: list[str], questions: int) -> None:
    memory = []
    with serving(store) as server:
        for number in range(1, questions + 1):
            server.ask(texts[number % len(texts)], counted=True)
            if number in (*LOOKS, questions):
                memory.append((number, server.resident()))
    rows = [{"questions": f"{number:,}", "memory of the server": mebibytes(size)} for number, size in memory]
    results.add(Table("Memory after many questions", rows, "Anonymous memory that is resident."), memory=memory)


def shown(seconds: list[float]) -> str:
    return Spread.of(seconds).show(".2f")


def line(what: str, spent: list[tuple[float, float]]) -> dict[str, str]:
    wall, cpu = zip(*spent, strict=True)
    return {"what": what, "seconds": shown(list(wall)), "CPU seconds": shown(list(cpu))}


def from_the_page(url: str, text: str) -> float | None:
    """Seconds from the click to the hits, in Chromium; None where there is none."""
    browser_path = which("chromium") or which("chromium-browser") or which("google-chrome")
    if browser_path is None or importlib.util.find_spec("playwright") is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#view-ask:not([hidden])")
        page.locator("#text").fill(text)
        began = time.perf_counter()
        page.locator("#go").click()
        page.wait_for_selector(".hit", timeout=MOST_SECONDS * 1000)
        took = time.perf_counter() - began
        browser.close()
    return took


if __name__ == "__main__":
    main()
