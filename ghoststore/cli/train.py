"""``ghoststore train``."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from functools import partial
from typing import Any

from ghoststore.cli import options
from ghoststore.lazy import load
from ghoststore.settings.fields import Fields
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.settings.shared import Printing
from ghoststore.settings.train import TrainOptions


@options.command(
    TrainOptions,
    Printing,
    first="data val_set store output_dir name architecture checkpoint batch_size max_steps learning_rate",
)
def command(keywords: options.Keywords, printing: Printing) -> None:
    """Train a language model; score every training sample of every step against the val set, in the step itself.

    The model is a new GPT-2, a new one of any --config, or a checkpoint. Scores go to a run of the store, live:
    `ghoststore watch` shows them from another terminal, `ghoststore scores` ranks them. With --keep-gradients so do
    projected gradients, which `ghoststore query --run` searches. Checkpoints are in transformers' format. Run the same
    command again and it goes on where it stood.
    Several processes: torchrun --nproc-per-node N -m ghoststore train …
    """
    keywords["projection"] = _projection(keywords)
    if os.environ.get("RANK", "0") == "0":
        options.run("train", keywords, printing, partial(_print, keywords=keywords))
    else:
        load("train")(**keywords)  # the first rank prints


def _projection(keywords: options.Keywords) -> ProjectionConfig | None:
    """The projection of a sketched score or of kept gradients; None without.

    Options of one ask for sketched scores of candidates, where nothing else asks for exact ones.
    """
    projection: ProjectionConfig = keywords["projection"]
    given = projection != ProjectionConfig()
    keeps = keywords.get("keep_gradients") is not None
    of_candidates = keywords.get("candidates") is not None and keywords.get("policy") != "greats"
    of_exact = keywords.get("route", "auto") != "auto" or keywords.get("score_layers") is not None
    if given and not keeps and of_candidates and not of_exact and "score" not in keywords:
        keywords["score"] = "sketched"
    if keywords.get("score") == "sketched":
        return replace(projection, exclude_layers=keywords.pop("exclude_layers", ()))
    return projection if given or keeps else None


def _print(report: Any, keywords: options.Keywords) -> None:
    from ghoststore.cli.terminal import print_facts, print_next
    from ghoststore.corpus.repeated import repeated_words

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    if report.plan is not None:
        print_facts("would train", _planned(report, report.plan))
        return
    facts = [
        ("model", f"{report.parameters:,} parameters"),
        ("val loss", f"{number(report.val_loss, '.4f')} nats a token"),
        *((f"  {name}", f"{loss:.4f}") for name, loss in report.val_loss_by_domain.items()),
    ]
    if report.checkpoint:
        resumed = f", {report.resumed_from:,} of them before" if report.resumed_from else ""
        facts += [
            ("steps", f"{report.steps:,}{resumed}"),
            ("train loss", f"{number(report.train_loss, '.4f')} (last steps)"),
            *([("ids", words)] if (words := repeated_words(report.repeated_ids)) else []),
            ("speed", f"{number(report.tokens_per_second, ',.0f')} tokens/s"),
            ("checkpoint", report.checkpoint),
        ]
    if report.score_share is not None and report.run:
        facts += [
            ("scoring", f"{report.score_share:.1%} of the time of the steps"),
            ("scores", f"{number(report.negative_share, '.1%')} negative, in run {report.run!r} of {report.store}"),
        ]
    print_facts("evaluated" if report.checkpoint is None else "trained", facts)
    if report.checkpoint and report.run:
        print_next(_next(report, keywords))


def _next(report: Any, keywords: options.Keywords) -> list[str]:
    """Commands that run as they are, if rows are read by no options of their own."""
    store, checkpoint, run = map(shlex.quote, (str(report.store), str(report.checkpoint), report.run))
    data = keywords["data"]
    named = isinstance(data, str) and data != "-" and keywords.get("fields") in (None, Fields())
    corpus = shlex.quote(data) if named else "…"
    if named and data.endswith(".bin"):  # token ids, which do not say whose they are
        corpus += f" --tokenizer {shlex.quote(str(keywords['tokenizer']))}"
    return [
        f"ghoststore scores --store {store} --run {run}",
        f"ghoststore build --checkpoint {checkpoint} --data {corpus} --store {store}",
    ]


def _planned(report: Any, plan: Any) -> list[tuple[str, str]]:
    from ghoststore.cli.terminal import duration, human_bytes, pace
    from ghoststore.corpus.repeated import repeated_words

    done = f", {report.resumed_from:,} of them done" if report.resumed_from else ""
    batch = f"{plan.rows_per_step:,} rows, about {plan.tokens_per_step:,.0f} tokens"
    peak = "" if plan.peak_bytes is None else f"; the first steps took {human_bytes(plan.peak_bytes)}"
    time = "no step is left"
    if plan.seconds_per_step is not None:
        rate = pace(plan.seconds_per_step, "steps")
        time = f"about {duration(plan.seconds_left)} ({rate}), val losses and checkpoints aside"
    first_layers = ", ".join(plan.layers[:4]) + (", …" if len(plan.layers) > 4 else "")
    return [
        ("model", f"{report.parameters:,} parameters"),
        ("rows", f"{plan.usable_rows:,} of {plan.samples:,} samples, {plan.tokens:,} tokens"),
        *([("ids", words)] if (words := repeated_words(report.repeated_ids)) else []),
        ("steps", f"{report.steps:,}{done}, {plan.epochs:.3g} passes over the rows"),
        ("a step", batch),
        ("scored", f"{len(plan.layers):,} layers: {first_layers}" if plan.layers else "nothing"),
        ("memory", f"at least {human_bytes(plan.training_bytes)}, and activations{peak}"),
        ("time", time),
        (
            "disk",
            f"{human_bytes(plan.checkpoint_bytes)} a checkpoint, {human_bytes(plan.run_bytes)} of numbers in the run",
        ),
        *(("would write" if not index else "", path) for index, path in enumerate(plan.writes)),
        ("written", "nothing"),
    ]
