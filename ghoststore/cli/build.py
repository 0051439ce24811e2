"""``ghoststore build``."""

from __future__ import annotations

import shlex
from typing import Any

from ghoststore.cli import options
from ghoststore.settings.build import BuildOptions
from ghoststore.settings.shared import Printing

QUESTIONS = {
    "text": '{"text": "what the model should do better"}',
    "prompt-completion": '{"prompt": "what it is asked", "completion": " what it should answer"}',
    "messages": '{"messages": [{"role": "user", "content": "what it is asked"}, '
    '{"role": "assistant", "content": "what it should answer"}]}',
}
"""A val sample by the kind of a corpus' content, in place of those of the user. Token ids have none."""


@options.command(
    BuildOptions,
    Printing,
    first="checkpoint data store name max_length batch_tokens projection.layers proj_dtype device dry_run",
    only_given=True,
)
def command(keywords: options.Keywords, printing: Printing) -> None:
    """Each sample's projected gradient at a checkpoint, for every sample of a corpus, into a store.

    Run it again to continue: what is committed is not computed twice.

    \b
      ghoststore build --checkpoint ./model --data train.jsonl --store ./store
      ghoststore build --like model-train --data new.jsonl --store ./store
    """
    options.run("build", keywords, printing, _print)


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, print_facts, print_next

    unit = "would take" if report.dry_run else "take"
    facts = [
        ("part", f"{report.part} in {report.store}"),
        ("rows", f"{report.rows:,}" + (f" ({report.resumed_rows:,} were there)" if report.resumed_rows else "")),
        *([("stream", _stream(report))] if report.head is not None else []),
        *([("share", _share(report))] if report.worker else []),
        *([("workers", _workers(report))] if report.workers is not None else []),
        *((f"  {status.replace('_', ' ')}", f"{count:,}") for status, count in report.statuses.items()),
        ("tokens", f"{report.tokens:,}" if report.tokens is not None else "not counted"),
        ("layers", f"{report.layers}, {report.coverage:.1%} of the model's parameters"),
        ("dimension (D)", f"{report.dimension:,}"),
        ("on disk", f"vectors and numbers {unit} {human_bytes(report.bytes_on_disk)}"),
    ]
    if report.dry_run:
        each = ", in each" if report.workers is not None else ""
        memory = f"about {human_bytes(report.memory_bytes)} beside the model and its activations{each}"
        facts.append(("memory", memory))
    if report.seconds:
        facts.append(("time", _times(report)))
    if report.new_rows:
        facts.append(("new rows", "the corpus goes on behind these, as it has grown: see below"))
    print_facts("dry run" if report.dry_run else "built", facts)
    if next_commands := [*([report.new_rows] if report.new_rows else []), *_next(report)]:
        print_next(next_commands)


def _next(report: Any) -> list[str]:
    """Commands that run as they are, once the part is complete and has rows to ask for."""
    from ghoststore.store import Status, Store
    from query.search.second_moment import LARGEST_BLOCK

    answerable = any(count for name, count in report.statuses.items() if Status[name.upper()].usable)
    if report.dry_run or not answerable or sum(report.statuses.values()) < report.rows:
        return []
    of_part = f"--store {shlex.quote(report.store)} --part {shlex.quote(report.part)}"
    ask = f"ghoststore query {of_part} --val-set "
    question = QUESTIONS.get(report.manifest["corpus"]["fields"]["kind"])
    own = "val.bin" if report.manifest["source"]["form"] == "token-stream" else "val.jsonl"
    part = Store.open(report.store).part(report.part)
    small = max(stop - start for _, start, stop in part.groups) <= LARGEST_BLOCK  # plain gradients are one block
    return [
        f"{ask}{own}" if question is None else f"echo '{question}' | {ask}-",
        *([f"ghoststore self-influence {of_part}"] if small else []),
        f"ghoststore info {of_part}",
    ]


def _stream(report: Any) -> str:
    """What a part of a stream is, and from which rows its projection learned."""
    learned = report.manifest["projection"]["calibration"] is not None
    of_head = f"; the projection was learned from the first {report.head:,} rows" if learned else ""
    return f"read once, in order{of_head if 'like' not in report.manifest['source'] else ''}"


def _share(report: Any) -> str:
    """What a worker has done, and what is left of the part; of a dry run what it would do."""
    if report.dry_run:
        return f"worker {report.worker} would build {report.rows_built:,} rows"
    left = report.rows - sum(report.statuses.values())
    rest = f"{left:,} of the part are with others, or missing" if left else "the part is complete"
    return f"worker {report.worker}: {report.rows_built:,} rows built; {rest}"


def _workers(report: Any) -> str:
    """What a dry run says of workers that would build side by side."""
    if not report.workers:
        return "nothing is left to build"
    return f"{report.workers:,} side by side, each builds at most {report.rows_built:,} rows if all are equally fast"


def _times(report: Any) -> str:
    """The split between learning and building; of a dry run an estimate."""
    learning, computing = report.seconds.get("learning", 0.0), report.seconds["compute"]
    split = f"learning the projection {_seconds(learning)}, " if learning else ""
    if report.dry_run:
        alone = " in one process" if report.workers is not None else ""
        return f"about {_seconds(learning + computing)}{alone}: {split}building {_seconds(computing)}"
    rate = f" ({report.rows_built / computing:,.1f} rows/s)" if computing else ""
    text = f"{_seconds(report.seconds['total'])}: {split}building {_seconds(computing)}{rate}"
    if learning > computing:
        text += ". This corpus is small: plain gradients (--proj-precondition none) take no learning, and rank worse"
    return text


def _seconds(seconds: float) -> str:
    from ghoststore.cli.terminal import duration

    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
