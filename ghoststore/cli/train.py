"""``ghoststore train``."""

from __future__ import annotations

from typing import Any

import click

from ghoststore.cli import options


@click.command("train", short_help="train a GPT-2 and score every sample live")
@click.option("--data", required=True, metavar="PATH", help="Training samples: token shards, or any form of corpus.")
@click.option("--val-set", metavar="PATH", help="Val samples that training samples are scored against.")
@options.store_optional
@click.option("--output-dir", required=True, metavar="PATH", help="Folder for checkpoints (and tokens).")
@click.option("--name", help="Name of the run (default: after architecture and data).")
@click.option("--architecture", metavar="NAME", help="GPT2-Tiny, GPT2-Small, GPT2-Medium or GPT2-Large, from scratch.")
@click.option("--checkpoint", metavar="PATH", help="Go on from this checkpoint instead.")
@click.option("--tokenizer", metavar="PATH", help="Folder of a saved tokenizer (default: the checkpoint's or shards').")
@click.option(
    "--method",
    type=click.Choice(["GradDotProd", "Regular"]),
    default="GradDotProd",
    show_default=True,
    help="Regular trains without scores: the same weights, bit for bit.",
)
@click.option("--batch-size", type=int, default=8, show_default=True, help="Samples of one rank's micro-batch.")
@click.option("--gradient-accumulation-steps", type=int, default=1, show_default=True, help="Micro-batches of a step.")
@click.option("--max-steps", type=int, help="Optimizer steps (default: one pass over the data).")
@click.option("--learning-rate", type=float, default=6e-4, show_default=True, help="Peak learning rate of AdamW.")
@click.option(
    "--min-learning-rate-ratio",
    type=float,
    default=0.1,
    show_default=True,
    help="The cosine ends at this share of the peak.",
)
@click.option("--warmup-steps", type=int, help="Linear warm-up (default: a twentieth of the steps, at most 2,000).")
@click.option("--weight-decay", type=float, default=0.1, show_default=True, help="Of matrices; vectors do not decay.")
@click.option("--adam-beta1", type=float, default=0.9, show_default=True, help="Decay of AdamW's mean.")
@click.option("--adam-beta2", type=float, default=0.95, show_default=True, help="Decay of its squares.")
@click.option("--max-grad-norm", type=float, default=1.0, show_default=True, help="Gradient clipping; 0 for none.")
@click.option("--max-length", type=int, help="Longest row in tokens (default: the model's positions, at most 1024).")
@click.option(
    "--overlong",
    type=click.Choice(["window", "truncate", "skip", "error"]),
    default="window",
    show_default=True,
    help="What becomes of samples that are longer.",
)
@click.option("--domain", "domains", multiple=True, metavar="NAME", help="Train on this domain alone (repeatable).")
@click.option("--max-samples", type=int, help="The first so many samples of the corpus.")
@click.option("--dropout", type=float, default=0.0, show_default=True, help="Of a new model.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights, data order and dropout.")
@click.option(
    "--model-dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="dtype of the parameters.",
)
@click.option(
    "--train-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="dtype of the arithmetic: autocast where it is narrower (default: the parameters').",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Recompute activations in the backward pass.")
@click.option("--eval-interval", type=int, default=100, show_default=True, help="Steps between val losses.")
@click.option("--eval-only", is_flag=True, help="Only the val loss of --checkpoint.")
@click.option("--max-val-samples", type=int, help="The first so many samples of the val set.")
@click.option("--val-batch-size", type=int, default=8, show_default=True, help="Val samples of one val gradient.")
@click.option(
    "--val-refresh-interval", type=int, default=1, show_default=True, help="Steps for which a val gradient is used."
)
@click.option(
    "--val-sampling",
    type=click.Choice(["rotate", "fixed"]),
    default="rotate",
    show_default=True,
    help="Each val gradient takes the next val samples, or always the same.",
)
@click.option("--val-groups", is_flag=True, help="Score against each domain of the val set as well.")
@click.option(
    "--score",
    type=click.Choice(["exact", "sketched"]),
    default="exact",
    show_default=True,
    help="sketched: approximate, through random projections, at a fraction of the cost.",
)
@click.option(
    "--route",
    type=click.Choice(["auto", "direct", "gram"]),
    default="auto",
    show_default=True,
    help="How exact scores are computed; auto takes the cheaper for each parameter.",
)
@click.option("--per-layer", is_flag=True, help="Keep the score of every layer.")
@click.option(
    "--exclude-layers",
    callback=options.patterns,
    metavar="PATTERNS",
    help="Layers whose parameters are left out of the score.",
)
@options.projection
@click.option(
    "--dot-prod-save-interval", type=int, default=10, show_default=True, help="Steps committed to the store together."
)
@click.option("--checkpoint-interval", type=int, help="Steps between checkpoints (default: --eval-interval).")
@click.option(
    "--keep-checkpoints",
    callback=options.number_or("all"),
    default="2",
    show_default=True,
    metavar="N|all",
    help="How many of the newest stay.",
)
@click.option(
    "--on-store-error",
    type=click.Choice(["stop", "continue"]),
    default="stop",
    show_default=True,
    help="If the store cannot be written: stop, or train on without scores.",
)
@click.option("--tensorboard", metavar="PATH", help="Log to this TensorBoard folder.")
@click.option("--wandb", metavar="PROJECT", help="Log to Weights & Biases (offline unless WANDB_MODE is set).")
@options.fields
@options.device
@options.common
def command(as_json: bool, quiet: bool, **values: Any) -> None:
    """Train a GPT-2; score every training sample of every step against the val set, in the training step itself.

    Scores go to a run of the store, live: `ghoststore watch` shows them from another terminal, `ghoststore scores`
    ranks them. Checkpoints are in transformers' format. Run the same command again and it goes on where it stood.
    Several processes: torchrun --nproc-per-node N -m ghoststore train …
    """
    import os

    from ghoststore.cli.terminal import listener, print_json
    from ghoststore.lazy import load

    options.take_fields(values)
    values["projection"] = _projection(values)
    values["keep_checkpoints"] = None if values["keep_checkpoints"] == "all" else values["keep_checkpoints"]
    leads = os.environ.get("RANK", "0") == "0"
    report = load("train")(progress=listener(quiet) if leads else None, **values)
    if not leads:
        return
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)


def _projection(values: dict[str, Any]) -> Any:
    """The projection of a sketched score; None for an exact one. UsageError for options that it would ignore."""
    from ghoststore.errors import UsageError
    from ghoststore.lazy import load

    sketched = values["score"] == "sketched"
    asked = options.take_projection(values, values["exclude_layers"] if sketched else ())
    if sketched:
        values["exclude_layers"] = ()
    elif asked != load("ProjectionConfig")():
        raise UsageError("projection options belong to --score sketched")
    return asked if sketched else None


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import print_facts
    from ghoststore.corpus.repeated import repeated_words

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

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
            ("next", f"ghoststore scores --store {report.store} --run {report.run}"),
            ("", f"ghoststore build --checkpoint {report.checkpoint} --data … --store {report.store}"),
        ]
    print_facts("evaluated" if report.checkpoint is None else "trained", facts)
