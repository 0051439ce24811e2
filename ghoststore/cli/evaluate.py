"""``ghoststore evaluate``."""

from __future__ import annotations

from typing import Any

import click

from ghoststore.cli import options


@click.command("evaluate", short_help="do scores predict what training does?")
@options.store
@click.option("--val-set", required=True, metavar="PATH", help="Val set, in any form of a corpus.")
@click.option("--out", required=True, metavar="FOLDER", help="Folder for what the trainings find; resumes there.")
@click.option(
    "--part",
    multiple=True,
    metavar="NAME",
    callback=options.one_or_several,
    help="Part to evaluate (default: the only one). Repeated: the sums over all of them, too.",
)
@click.option(
    "--part-weights", metavar="W", callback=options.weights, help="Of several --part, as in `ghoststore query`."
)
@click.option("--run", metavar="NAME", help="Evaluate the values of this training run as well.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    help="dot, cosine, preconditioned-dot, preconditioned-cosine, tf-idf, random; repeatable (default: all of these). "
    "Slow, only if named: exact-dot, exact-cosine, exact-layers-dot, exact-layers-cosine.",
)
@click.option(
    "--test",
    "tests",
    multiple=True,
    metavar="NAME",
    help="lds (default), removal, tail-patch; repeatable.",
)
@click.option("--drop", type=float, default=0.1, show_default=True, help="removal: share of samples left out.")
@click.option("--top-k", type=int, default=16, show_default=True, help="tail-patch: samples of a step.")
@click.option("--repeats", type=int, default=3, show_default=True, help="removal, tail-patch: random sets beside it.")
@click.option("--halves", type=int, default=20, show_default=True, help="Models to train, each on a random half.")
@click.option("--max-steps", type=int, default=200, show_default=True, help="Steps of each training.")
@click.option("--batch-size", type=int, default=16, show_default=True, help="Samples of a step.")
@click.option("--learning-rate", type=float, default=3e-3, show_default=True, help="Its peak.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of halves, weights and order.")
@click.option("--damping", type=float, help="Of the preconditioned methods (default: 0.1).")
@click.option("--max-val-samples", type=int, help="Only the first samples of the val set.")
@click.option("--workers", type=int, help="Trainings at once (default: one a processor, at most 4; 1 on a GPU).")
@options.device
@options.fields
@options.common
def command(**values: Any) -> None:
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
    from ghoststore.cli.terminal import listener, print_json
    from ghoststore.lazy import load

    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    for name in ("methods", "tests"):
        if not values[name]:
            del values[name]
    report = load("evaluate")(progress=listener(quiet), **options.take_fields(values))
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import print_table

    settings = report.settings
    if report.lds:
        print_table(
            f"LDS over {settings['halves']} trainings on halves of {settings['samples']:,} samples (95 % interval)",
            [
                ("score", False),
                (f"each of {settings['val_samples']:,} val samples", True),
                (f"{len(settings['groups'])} val groups", True),
            ],
            [[one.method, _shown(one.samples), _shown(one.groups)] for one in report.lds],
        )
    if report.removal:
        print_table(
            f"Val loss after training without {settings['drop']:.0%} of the samples, and against random ones",
            [("the best by", False), ("val loss", True), ("change", True), ("± random", True)],
            [[one.method, f"{one.loss:.4f}", f"{one.change:+.4f}", _number(one.deviation)] for one in report.removal],
        )
    if report.tail_patch:
        print_table(
            f"What one step on {settings['top_k']} samples takes off the loss of the val groups",
            [("the best by", False), ("gain", True), ("random", True), ("± random", True)],
            [
                [one.method, f"{one.gain:+.5f}", f"{one.random:+.5f}", _number(one.deviation)]
                for one in report.tail_patch
            ],
        )


def _shown(score: Any) -> str:
    return "–" if score is None else f"{score.value:+.3f} ({score.low:+.3f} to {score.high:+.3f})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
