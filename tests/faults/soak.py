"""The suite of faults at length: ``make soak``.

Every call of every command's disk, every file of a store with every harm, long histories, hostile files, races, for as
many minutes as it is given; what it does is a function of the seed, how far it comes of the time. Ends with the table
of promises: how often each was tried, and how often it was lost. Exit code 1 if one was.

    python -m tests.faults.soak --minutes 30
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.campaigns import CAMPAIGNS, Step
from tests.support.faulting import BrokenPromise, Faults, open_faults

ROOT = Path(__file__).resolve().parent.parent.parent
PROMISES = {
    1: "Killed at any write, it resumes to the same bytes",
    2: "Nothing partly written is ever visible",
    3: "Two at once: no loss, one truth",
    4: "Disk full or broken: exit 6, what was committed is intact, it resumes",
    5: "A flipped, cut or missing file is named, never data; repair rebuilds it",
    6: "Another checkpoint, tokenizer, projection or corpus is refused",
    7: "A row's vector is the same alone, padded, in another order",
    8: "NaN or infinity never enters a result",
    9: "Hostile files are refused in bounded memory; no code runs from data",
    10: "Reading while writing gives the state of some moment",
    11: "A training killed at any step resumes",
    12: "Scores never change training; a store that cannot be written stops it or not, as asked",
    13: "Every released format opens",
}
BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"
Tables = dict[str, Any]


@dataclass
class Tally:
    """What was tried, and what was lost."""

    tried: Counter[int] = field(default_factory=Counter)
    campaigns: dict[str, Counter[str]] = field(default_factory=dict)
    lost: list[dict[str, Any]] = field(default_factory=list)

    def do(self, campaign: str, step: Step) -> None:
        """One step, counted."""
        counts = self.campaigns.setdefault(campaign, Counter())
        try:
            for promise, times in step.act().items():
                self.tried[promise] += times
            counts["tried"] += step.cases
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
            promise = error.promise if isinstance(error, BrokenPromise) else step.promise
            self.tried[promise] += 1
            counts["tried"] += step.cases
            counts["lost"] += 1
            text = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
            self.lost.append({"promise": promise, "campaign": campaign, "step": step.name, "text": text[-6000:]})
            print(f"LOST {promise} in {campaign}: {step.name}\n{text[-3000:]}\n", flush=True)  # noqa: T201


def _raise(text: str) -> dict[int, int]:
    raise AssertionError(text)


def soak(faults: Faults, seed: int, worker: int, workers: int, until: float) -> Tally:
    """Steps of all campaigns, each in its share of the time, until it is over or nothing is left."""
    tally = Tally()
    lines: dict[str, Iterator[Step]] = {
        name: campaign.steps(faults, random.Random(f"{seed} {name}"), worker, workers)
        for name, campaign in CAMPAIGNS.items()
    }
    spent, told = dict.fromkeys(lines, 0.0), time.monotonic()
    while lines and time.monotonic() < until:
        name = min(lines, key=lambda name: spent[name] / CAMPAIGNS[name].share)
        try:
            step = next(lines[name], None)
        except Exception:  # noqa: BLE001 - what a campaign does before its steps failed
            step = Step(f"{name} begins", 0, partial(_raise, traceback.format_exc()))
            tally.do(name, step)
            del lines[name]
            continue
        if step is None:
            del lines[name]
            tally.campaigns.setdefault(name, Counter())["done"] = 1
            continue
        begun = time.monotonic()  # what comes before the steps of a campaign serves others, too
        tally.do(name, step)
        spent[name] += time.monotonic() - begun
        if time.monotonic() > told + 60:
            told = time.monotonic()
            left, tried = (until - told) / 60, {name: counts["tried"] for name, counts in tally.campaigns.items()}
            print(f"{left:.0f} minutes left, {len(tally.lost)} lost, {tried}", flush=True)  # noqa: T201
    return tally


def work(arguments: argparse.Namespace) -> None:
    """One process of the soak; its tally goes to a file."""
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir=arguments.folder))
    until = time.monotonic() + 60 * arguments.minutes
    faults = open_faults(folder)
    if faults is None:
        raise SystemExit("the soak needs a C compiler (gcc or cc)")
    tally = soak(faults, arguments.seed, arguments.worker, arguments.workers, until)
    faults.lab.close()
    shutil.rmtree(folder)
    tables = {"tried": tally.tried, "campaigns": tally.campaigns, "lost": tally.lost}
    Path(arguments.out, f"soak-{arguments.worker}.json").write_text(json.dumps(tables, indent=1))


def merged(parts: list[Tables], seed: int, minutes: float) -> Tables:
    """The tallies of all processes as one."""
    tried: Counter[str] = Counter()
    campaigns: dict[str, Counter[str]] = {}
    lost = [entry for part in parts for entry in part["lost"]]
    for part in parts:
        tried.update(part["tried"])
        for name, counts in part["campaigns"].items():
            campaigns.setdefault(name, Counter()).update(counts)
    rows = [
        {
            "promise": number,
            "name": name,
            "tried": tried[str(number)],
            "lost": sum(entry["promise"] == number for entry in lost),
        }
        for number, name in PROMISES.items()
    ]
    done = [
        {
            "campaign": name,
            "what": CAMPAIGNS[name].what,
            "tried": counts["tried"],
            "lost": counts["lost"],
            "all": counts.get("done", 0) == len(parts),
        }
        for name, counts in campaigns.items()
    ]
    head = {"seed": seed, "minutes": minutes, "processes": len(parts)}
    return {**head, "promises": rows, "campaigns": done, "lost": lost}


def markdown(tables: Tables) -> str:
    """The tables as they stand in docs/reliability.md."""
    import torch

    import ghoststore

    head = (
        f"{tables['minutes']:g} minutes in {tables['processes']} processes, seed {tables['seed']}, ghoststore "
        f"{getattr(ghoststore, '__version__', '')}, torch {torch.__version__}, Python {sys.version.split()[0]}."
    ).replace("ghoststore ,", "ghoststore,")
    lines = [head, "", "| promise | tried | lost |", "| --- | ---: | ---: |"]
    lines += [f"| {r['promise']}. {r['name']} | {r['tried']:,} | {r['lost']:,} |" for r in tables["promises"]]
    lines += ["", "| campaign | cases | lost |", "| --- | ---: | ---: |"]
    lines += [
        f"| {c['what']} | {c['tried']:,}{' (all)' if c['all'] else ''} | {c['lost']:,} |" for c in tables["campaigns"]
    ]
    return "\n".join(lines) + "\n"


def between_markers(page: str, text: str) -> str:
    """``page`` with ``text`` between the markers."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Start the processes, merge what they found, write and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("SOAK_MINUTES", 30)))
    parser.add_argument("--seed", type=int, default=None, help="default: of the clock; printed")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; default: one a core")
    parser.add_argument("--out", default="soak-results", help="folder for soak.md and soak.json")
    parser.add_argument("--folder", default=None, help="where the stores are made; default: the system's")
    parser.add_argument("--docs", default=None, help="a page whose part between the markers is replaced")
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments)
        return
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}, {arguments.minutes:g} minutes, {arguments.workers} processes", flush=True)  # noqa: T201
    words = [sys.executable, "-m", "tests.faults.soak", "--seed", str(seed), "--minutes", str(arguments.minutes)]
    words += ["--workers", str(arguments.workers), "--out", str(out)]
    words += ["--folder", arguments.folder] if arguments.folder else []
    started = [subprocess.Popen([*words, "--worker", str(worker)], cwd=ROOT) for worker in range(arguments.workers)]
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"the processes of the soak ended with {codes}")
    parts = [json.loads((out / f"soak-{worker}.json").read_text()) for worker in range(arguments.workers)]
    tables = merged(parts, seed, arguments.minutes)
    (out / "soak.json").write_text(json.dumps(tables, indent=1) + "\n")
    text = markdown(tables)
    (out / "soak.md").write_text(text)
    if arguments.docs:
        page = Path(arguments.docs)
        page.write_text(between_markers(page.read_text(), text))
    print(text)  # noqa: T201
    raise SystemExit(1 if tables["lost"] else 0)


if __name__ == "__main__":
    main()
