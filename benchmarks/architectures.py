"""Every language model class of transformers: are its vectors and scores those of its samples run alone?

Each class is made small, with random weights, and held against batch-of-one autograd in three respects, in a process of
its own.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import textwrap
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from common import Results, Table, machine_facts
from respects import RESPECTS, WRONG, Respect, Samples, Subject
from small_models import LEFT_OUT, Architecture, architectures, small_model
from torch import nn

from ghoststore.errors import GhostStoreError

NAMED = 5
"""Layers of a message whose last names are shown with its cause."""
ROUNDS = 2
"""How often the advice of a refusal is followed."""
MEMORY = 6 << 30
"""Address space of a class's process: one whose sizes are not small ends, and the run goes on."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of one attempt at a respect."""

    word: str
    """exact; wrong: finite numbers, and others; refused: an error of ghoststore; foreign: any other exception."""
    error: float = 0.0
    where: str = ""
    """The block or parameter with the largest error; of a foreign exception the places in the code."""
    kind: str = ""
    message: str = ""
    covered: float = 0.0
    """Share of the model's numbers in the vectors or scores."""


@dataclass(slots=True, kw_only=True)
class Finding:
    """What came of a respect: as it is, and with the advice of its refusal followed."""

    first: Outcome
    advice: list[str] = field(default_factory=list)
    """Patterns of ``exclude_layers`` that the refusals named, of all rounds."""
    last: Outcome | None = None
    """None without advice."""
    seconds: float = 0.0
    """Of the first attempt, the gradients that it is held against included."""


def attempt(respect: Respect, subject: Subject, exclude: Sequence[str]) -> Outcome:
    """One respect of a batch of ordinary lengths, and of one that has as many samples as tokens."""
    outcome = attempt_with(respect, subject, exclude, subject.samples)
    if outcome.word != "exact":
        return outcome
    square = attempt_with(respect, subject, exclude, subject.square)
    if square.word == "exact":
        return outcome
    square.message = f"with as many samples as tokens: {square.message}"
    return square


def attempt_with(respect: Respect, subject: Subject, exclude: Sequence[str], samples: Samples) -> Outcome:
    try:
        found = respect(subject, exclude, samples)
    except GhostStoreError as problem:
        return Outcome(word="refused", kind=type(problem).__name__, message=str(problem))
    except Exception as problem:  # noqa: BLE001 (that it is no error of ghoststore is the finding)
        message = str(problem)[:1000]
        return Outcome(word="foreign", kind=type(problem).__name__, message=message, where=place_of(problem))
    finally:
        subject.release()
    word = "exact" if found.error <= WRONG else "wrong"
    return Outcome(word=word, error=found.error, where=found.where, covered=found.covered)


def finding(respect: Respect, subject: Subject) -> Finding:
    """The respect as it is; where it is refused, again with what the refusal advises."""
    began = time.perf_counter()
    outcome = attempt(respect, subject, ())
    result = Finding(first=outcome, seconds=time.perf_counter() - began)
    for _ in range(ROUNDS):
        new = [pattern for pattern in advice_in(outcome.message, subject.model) if pattern not in result.advice]
        if outcome.word != "refused" or not new:
            break
        result.advice += new
        result.last = outcome = attempt(respect, subject, result.advice)
    return result


def advice_in(message: str, model: nn.Module) -> list[str]:
    """The patterns that ``message`` says to leave out: those it quotes, else the modules of ``model`` that it names."""
    for form in (r"exclude_layers=\[([^\]]*)\]", r"`exclude_layers`:? ('[^']+')"):
        quoted = re.findall(form, message)
        if quoted:
            patterns = [pattern for group in quoted for pattern in re.findall(r"'([^']+)'", group)]
            return [piece for pattern in patterns for piece in pattern.split(",")]
    names = {name for name, _ in model.named_modules() if name}
    _, told, behind = message.partition("exclude_layers")
    named = [word for word in re.findall(r"[\w.]*\w", behind) if word in names]
    return named or [word for word in re.findall(r"\w+(?:\.\w+)+", message) if told and word in names]


def place_of(problem: BaseException) -> str:
    """Where ``problem`` was raised, and the last place of this project on the way there."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [frame for frame in frames if {"indexer", "ghoststore"} & set(Path(frame.filename).parts)]
    shown = dict.fromkeys(f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}" for frame in own + frames[-1:])
    return " > ".join(list(shown)[-2:])


# Processes: a class that crashes, or takes all the memory, does not end the run.


def examine(architecture: Architecture) -> dict[str, Any]:
    """All respects of one class, as JSON."""
    found: dict[str, Any] = {"task": architecture.task, "model_type": architecture.model_type}
    began = time.perf_counter()
    try:
        subject = Subject(small_model(architecture), architecture.task)
    except Exception as problem:  # noqa: BLE001 (whatever transformers raises of a configuration)
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:400]
        return found | {"not made": f"{reason} ({place_of(problem)})"}
    found |= {
        "parameters": subject.numbers,
        "padding_changes": subject.padding_changes,
        "mixing": subject.mixing,
        "oracle_seconds": time.perf_counter() - began,
    }
    return found | {name: asdict(finding(respect, subject)) for name, respect in RESPECTS.items()}


def start(architecture: Architecture, path: Path, limit: int) -> int:
    """The id of a process that writes what it finds to ``path`` within ``limit`` seconds."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        signal.alarm(limit)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        warnings.simplefilter("ignore")
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(examine(architecture)))
        unfinished.replace(path)
    except BaseException:  # noqa: BLE001 (the parent tells it by the missing file)
        traceback.print_exc()
    finally:
        os._exit(0)


def examine_all(wanted: Sequence[Architecture], work: Path, jobs: int, limit: int) -> None:
    """Fill ``work`` with a file for each class. A file that is there stays."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    running: dict[int, Architecture] = {}

    def finish() -> None:
        child, status = os.wait()
        architecture = running.pop(child)
        path = work / f"{architecture.name}.json"
        if not path.exists():
            ended = f"its process ended by signal {status}" if status else "its process ended with an error"
            path.write_text(json.dumps({"task": architecture.task, "not made": ended}))
        found = json.loads(path.read_text())
        print(architecture.name, *(f"| {value}" for value in row_of(found).values()), file=sys.stderr, flush=True)

    for architecture in wanted:
        path = work / f"{architecture.name}.json"
        if path.exists():
            continue
        if len(running) >= jobs:
            finish()
        running[start(architecture, path, limit)] = architecture
    while running:
        finish()


# What was found, in words.


def cell_of(found: dict[str, Any]) -> str:
    first, last = found["first"], found["last"]
    if first["word"] in ("exact", "wrong"):
        text = f"{first['word']} {first['error']:.0e}"
        return text if first["covered"] == 1.0 or first["word"] == "wrong" else f"{text}, {first['covered']:.0%}"
    if last is None:
        return first["word"] if first["word"] == "foreign" else "refused, no advice"
    if last["word"] == "exact":
        return f"refused; exact as advised, {last['covered']:.0%}"
    return f"refused; {last['word']} as advised" if last["word"] != "refused" else "refused"


def row_of(found: dict[str, Any]) -> dict[str, str]:
    if "not made" in found:
        return {"task": found["task"], **dict.fromkeys(RESPECTS, "–"), "note": f"not made: {found['not made']}"}
    notes = []
    if found["padding_changes"] > WRONG:
        notes.append("changes under padding: in batches of one length")
    if found["mixing"] > WRONG:
        notes.append("mixes the samples of a batch")
    return {"task": found["task"], **{name: cell_of(found[name]) for name in RESPECTS}, "note": "; ".join(notes)}


def cause_of(outcome: dict[str, Any]) -> str:
    """What ``outcome`` has in common with others: its message without names and numbers, the module's class kept."""
    message, kind = outcome["message"], outcome["kind"]
    module = re.search(r"is an? (\w+) with (?:trainable )?parameters? (\[.*?\])", message)
    if module:
        return f"no layer type: {module[1]} {module[2]}"
    if outcome["word"] == "wrong":
        return outcome["where"].split(".")[-2] if "." in outcome["where"] else outcome["where"]
    first = re.sub(r"\[[^\]]*\]", "[…]", message.split("\n")[0])
    dotted = re.findall(r"(?!torch|module\.)\b[A-Za-z_]\w*(?:\.\w+)+", message)
    parts = dict.fromkeys(name.rpartition(".")[2] for name in dotted[:NAMED])
    text = re.sub(r"'?\w+(\.\w+)+'?", "…", first)
    text = re.sub(r"(…, )+…", "…", re.sub(r"\d+", "N", text))
    text = text[:140] + (f" ({', '.join(parts)})" if parts and outcome["word"] == "refused" else "")
    shown = f"{kind}: {text}"
    return f"{shown} ({outcome['where']})" if outcome["word"] == "foreign" else shown


def counts(found: dict[str, dict[str, Any]]) -> Iterator[dict[str, str]]:
    """A row for each task and respect."""
    for task in ("causal", "seq2seq", "masked"):
        of_task = [one for one in found.values() if one["task"] == task]
        made = [one for one in of_task if "not made" not in one]
        for name in RESPECTS if made else ():
            words = Counter(one[name]["first"]["word"] for one in made)
            advised = [one[name]["last"] for one in made if one[name]["last"] is not None]
            yield {
                "task": task,
                "classes": str(len(of_task)),
                "made": str(len(made)),
                "respect": name,
                **{word: str(words[word]) for word in ("exact", "refused", "wrong", "foreign")},
                "exact as advised": str(sum(last["word"] == "exact" for last in advised)),
                "wrong or foreign then": str(sum(last["word"] in ("wrong", "foreign") for last in advised)),
            }


def causes(found: dict[str, dict[str, Any]]) -> Iterator[dict[str, str]]:
    """What is not exact, grouped by cause, those of most classes first. ``*``: exact once the advice was followed."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for architecture, one in found.items():
        for respect in RESPECTS if "not made" not in one else ():
            first, last = one[respect]["first"], one[respect]["last"]
            if first["word"] != "exact":
                star = "*" if last is not None and last["word"] == "exact" else ""
                groups[first["word"], cause_of(first)][architecture].append(respect.split()[0] + star)
            if last is not None and last["word"] in ("wrong", "foreign"):
                groups[f"{last['word']} as advised", cause_of(last)][architecture].append(respect.split()[0])
    for (word, cause), classes in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        shown = [f"{name} ({', '.join(respects)})" for name, respects in classes.items()]
        yield {"outcome": word, "cause": cause.replace("|", "\\|"), "classes": f"{len(classes)}: {', '.join(shown)}"}


def seconds_of(found: dict[str, dict[str, Any]]) -> int:
    """Of the models, their own gradients and all first attempts; starting processes and importing are not in it."""
    made = [one for one in found.values() if "not made" not in one]
    return round(sum(one["oracle_seconds"] + sum(one[name]["seconds"] for name in RESPECTS) for one in made))


LONGEST, MOST = 160, 6
"""Characters of a message, and patterns of an advice, that the results keep; ``--work`` has all."""


def compact(value: Any) -> Any:
    """``value`` without what is empty, in few digits."""
    if isinstance(value, dict):
        return {key: compact(item) for key, item in value.items() if item not in (None, "", [], 0.0)}
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, list):
        return value[:MOST]
    return value[:LONGEST] if isinstance(value, str) else value


def report(found: dict[str, dict[str, Any]], settings: dict[str, Any]) -> Results:
    results = Results(
        name="architectures",
        title="Every language model class of transformers, beside batch-of-one autograd",
        settings=settings,
        facts=machine_facts(),
    )
    note = (
        f"Exact: no block of a sample, and no score of a parameter, is further than {WRONG:g} of its size from that of "
        "the sample alone. As advised: with the layers left out that the refusal names, in up to "
        f"{ROUNDS} rounds."
    )
    results.add(Table("Summary", list(counts(found)), note), classes=compact(found))
    grouped = list(causes(found))
    if grouped:
        note = "`*`: exact once the advice was followed. A refusal names one cause; behind it there may be others."
        results.add(Table("What is not exact, by cause", grouped, note))
    rows = [{"class": name, **row_of(one)} for name, one in found.items()]
    note = "The largest relative error. A share: that of the model's numbers in the vectors or scores, if not all."
    results.add(Table("By class", rows, note))
    out = [{"class": name, "why": why} for name, why in LEFT_OUT.items()]
    results.add(Table("Left out", out, "Classes that are not tried."))
    return results


COLUMNS = 120
"""Of a line of the page."""
MARK = "<!-- From here on written by benchmarks/architectures.py --page -->"


def write_page(page: Path, found: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    """Replace what stands in ``page`` behind :data:`MARK` by a table of ``found``. ClickException without the mark."""
    text = page.read_text(encoding="utf-8")
    if MARK not in text:
        raise click.ClickException(f"{page} has no line {MARK!r}, behind which the table goes")
    head = text[: text.index(MARK) + len(MARK)]
    made = {name: one for name, one in found.items() if "not made" not in one}
    marked = {
        name: "¹" * (one["padding_changes"] > WRONG) + "²" * (one["mixing"] > WRONG) for name, one in made.items()
    }
    exact = [name for name, one in made.items() if all(word_of(one[respect]) == "exact" for respect in RESPECTS)]
    rows = [
        [name + marked[name], *(word_of(one[respect]) for respect in RESPECTS)]
        for name, one in made.items()
        if name not in exact
    ]
    lines = [
        *textwrap.wrap(
            f"Of {len(made)} classes (transformers {facts['transformers']}, torch {facts['torch']}) {len(exact)} are "
            f"exact in all three: {', '.join(name + marked[name] for name in exact)}.",
            COLUMNS,
            break_long_words=False,
            break_on_hyphens=False,
        ),
        "",
        *(f"| {' | '.join(cells)} |" for cells in (["the others", *RESPECTS], ["---"] * (1 + len(RESPECTS)), *rows)),
    ]
    page.write_text("\n\n".join([head, "\n".join(lines)]) + "\n", encoding="utf-8")


def word_of(found: dict[str, Any]) -> str:
    """A cell of the page: exact, or what else."""
    first, last = found["first"], found["last"]
    if last is not None and last["word"] == "exact" and last["covered"] > 0.005:
        return f"exact for {min(last['covered'], 0.999):.1%}"
    return f"refused; {last['word']} as advised" if last is not None and last["word"] == "wrong" else str(first["word"])


@click.command(help=__doc__)
@click.option("--only", default="", metavar="PATTERN", help="Classes whose name this regular expression finds.")
@click.option("--task", type=click.Choice(["causal", "seq2seq", "masked"]), help="Classes of this task alone.")
@click.option("--jobs", default=1, show_default=True, help="Processes at a time, of one thread each.")
@click.option("--limit", default=120, show_default=True, help="Seconds for a class.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Keeps each class: a later run goes on.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
@click.option("--page", type=click.Path(path_type=Path, exists=True), help="A page whose table is written anew.")
def main(only: str, task: str | None, jobs: int, limit: int, work: Path, out: Path, page: Path | None) -> None:
    wanted = [a for a in architectures() if re.search(only, a.name) and task in (None, a.task)]
    if not wanted:
        raise click.ClickException(f"no class is called like {only!r}")
    examine_all(wanted, work, jobs, limit)
    found = {a.name: json.loads((work / f"{a.name}.json").read_text()) for a in wanted}
    results = report(found, {"only": only or "all", "task": task or "all", "seconds of all classes": seconds_of(found)})
    results.write(out)
    if page is not None:
        write_page(page, found, results.facts)


if __name__ == "__main__":
    main()
