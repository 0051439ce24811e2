"""``ghoststore evaluate``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.settings.measure import EvaluateOptions
from ghoststore.settings.shared import Printing


@options.command(
    EvaluateOptions, Printing, first="store val_set out part methods tests halves max_steps workers device"
)
def command(keywords: options.Keywords, printing: Printing) -> None:
    """Do scores predict what training does? Three tests, on your own task.

    lds, the linear datamodeling score: small models of the checkpoint's architecture are trained anew, each on a random
    half of the corpus. For every val sample, the loss of each model is correlated (Spearman) with the sum of the scores
    of the samples that it saw. 1 is perfect, 0 is noise; intervals are from resampling the trainings.

    removal: models are trained without the samples that rank highest, and without random ones.

    tail-patch: one step from the checkpoint on the samples that rank highest, and on random ones.

    \b
      ghoststore evaluate --store ./store --val-set val.jsonl --out ./evaluation
      ghoststore evaluate --store ./store --val-set val.jsonl --out ./evaluation --halves 60 --method cosine
    """
    options.run("evaluate", keywords, printing, _print)


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import print_facts, print_table

    settings, groups = report.settings, len(report.settings["groups"])
    if report.lds:
        print_table(
            f"LDS over {settings['halves']} trainings on halves of {settings['samples']:,} samples (95 % interval)",
            [
                ("score", False),
                (f"each of {settings['val_samples']:,} val samples", True),
                (f"{groups} val group{'s' * (groups != 1)}", True),
            ],
            [[lds.method, _interval(lds.samples), _interval(lds.groups)] for lds in report.lds],
        )
        with_words = [lds for lds in report.lds if lds.words_add is not None]
        if with_words:
            title = f"What words at {settings['lexical']:g} add to each val sample"
            print_facts(title, [(lds.method, _words(lds.words_add, settings["lexical"])) for lds in with_words])
    if report.removal:
        print_table(
            f"Val loss after training without {settings['drop']:.0%} of the samples, and against random ones",
            [("the best by", False), ("val loss", True), ("change", True), ("± random", True)],
            [
                [removal.method, f"{removal.loss:.4f}", f"{removal.change:+.4f}", _number(removal.deviation)]
                for removal in report.removal
            ],
        )
    if report.tail_patch:
        print_table(
            f"What one step on {settings['top_k']} samples takes off the loss of the val groups",
            [("the best by", False), ("gain", True), ("random", True), ("± random", True)],
            [
                [patch.method, f"{patch.gain:+.5f}", f"{patch.random:+.5f}", _number(patch.deviation)]
                for patch in report.tail_patch
            ],
        )


def _words(added: Any, weight: float) -> str:
    """What words add, and what to do."""
    if added.low > 0:
        advice = f"ask with `ghoststore query --lexical {weight:g}`"
    elif added.high < 0:
        advice = "ask without `--lexical`"
    else:
        advice = "it may be chance; more `--halves` tell"
    return f"{_interval(added)}: {advice}"


def _interval(score: Any) -> str:
    return "–" if score is None else f"{score.value:+.3f} ({score.low:+.3f} to {score.high:+.3f})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
