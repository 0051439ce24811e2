"""``ghoststore select``."""

from __future__ import annotations

from typing import Any

import click

from ghoststore.cli import options


def parse_quotas(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """``DOMAIN=0.3`` (a share) and ``DOMAIN=100`` (a number of samples); the last ``=`` counts."""
    quotas: dict[str, float] = {}
    for value in values:
        domain, _, number = value.rpartition("=")
        if not domain:
            raise click.BadParameter(f"{value!r}: expected DOMAIN=SHARE or DOMAIN=SAMPLES", ctx, parameter)
        if domain in quotas:
            raise click.BadParameter(f"{domain!r} has two quotas", ctx, parameter)
        try:
            quotas[domain] = float(number) if "." in number else int(number)
        except ValueError:
            raise click.BadParameter(
                f"{value!r}: {number!r} is neither a share (0.3) nor a number of samples (100)", ctx, parameter
            ) from None
    return quotas


@click.command("select", short_help="a val set to a training set")
@options.question
@click.option(
    "--out",
    required=True,
    metavar="PATH",
    help="New file or folder, in the form of the corpus; or .jsonl, .parquet, or a folder of save_to_disk.",
)
@click.option("--fraction", type=float, help="Choose this share of the samples that can be chosen.")
@click.option("--count", type=int, metavar="N", help="Choose N samples.")
@click.option("--threshold", type=float, help="Choose every sample with at least this score.")
@click.option("--token-budget", type=int, metavar="N", help="Choose from the top while all together have N tokens.")
@click.option(
    "--quota",
    "quota",
    multiple=True,
    metavar="DOMAIN=Q",
    callback=parse_quotas,
    help="What a domain gets: a share of what is chosen (0.3), or a number of samples (100); repeatable. The other "
    "domains share the rest.",
)
@click.option(
    "--quotas",
    type=click.Choice(["proportional", "equal"]),
    help="Or a quota for every domain: as in the corpus, or the same for all.",
)
@click.option(
    "--diversity",
    type=click.Choice(["none", "mmr", "facility-location", "greats"]),
    default="none",
    show_default=True,
    help="Choose what is good together: maximal marginal relevance, facility location, or the GREATS greedy.",
)
@click.option(
    "--diversity-weight",
    type=float,
    metavar="W",
    help="mmr: 0 (score alone) to 1 (diversity alone), default 0.5. greats: 0 or more, default 1.",
)
@click.option(
    "--candidates", type=int, metavar="N", help="With --diversity, consider the N best (default: 4 for each asked for)."
)
@click.option(
    "--leaks",
    type=click.Choice(["exclude", "keep", "error"]),
    default="exclude",
    show_default=True,
    help="What becomes of near-duplicates of the val set in the corpus.",
)
@click.option(
    "--order",
    type=click.Choice(["corpus", "score"]),
    default="corpus",
    show_default=True,
    help="Order of the rows in --out.",
)
@click.option("--report", metavar="FILE", help="New .json file for the report (default: --out and .report.json).")
@options.common
def command(**values: Any) -> None:
    """Choose the samples whose gradients point the way of a val set, and write their original rows: a training set.

    Every row is written as it stands in the corpus, with all its fields; a corpus that has changed since the part was
    built is refused. Give one of --fraction, --count, --threshold and --token-budget.

    \b
      ghoststore select --store ./store --val-set val.jsonl --fraction 0.1 --out best.jsonl
      ghoststore select --store ./store --val-set val.jsonl --count 1000 --diversity mmr --out best.jsonl
      ghoststore select --store ./store --val-set val.jsonl --token-budget 1000000 --quotas equal --out best.parquet
    """
    from ghoststore.cli.terminal import listener, print_json
    from ghoststore.errors import UsageError
    from ghoststore.lazy import load

    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    quota = values.pop("quota")
    if quota and values["quotas"]:
        raise UsageError("--quota names domains, --quotas takes them all: give one of the two")
    values["quotas"] = quota or values["quotas"]
    made = load("select")(progress=listener(quiet), **options.take_fields(values))
    if as_json:
        print_json(made.to_json())
    else:
        _print(made)


def _print(made: Any) -> None:
    from ghoststore.cli.terminal import print_facts, print_table

    print_facts(
        f"{made.samples:,} of {made.available:,} samples, {made.tokens:,} tokens",
        [
            ("rows", made.out),
            ("report", made.report),
            ("list of rows", made.rows_file),
            ("lowest score chosen", f"{made.scores['chosen']['lowest']:.4g}"),
            ("near-duplicates of the val set", f"{made.leaks['found']:,} ({made.leaks['policy']})"),
        ],
    )
    if len(made.domains) > 1 or made.settings["quotas"]:
        columns = [("domain", False), ("chosen", True), ("of", True), ("tokens", True), ("mean score", True)]
        print_table(
            "by domain",
            columns,
            [
                [
                    share.domain,
                    f"{share.chosen:,}",
                    f"{share.available:,}",
                    f"{share.tokens:,}",
                    "–" if share.mean_score is None else f"{share.mean_score:.4g}",
                ]
                for share in made.domains
            ],
        )
    labels = list(made.lengths["all"])
    rows = [
        [f"{what} of {whose}", *(f"{numbers[whose][label]:,.4g}" for label in labels)]
        for what, numbers in (("tokens", made.lengths), ("score", made.scores))
        for whose in ("chosen", "all")
    ]
    print_table("quantiles", [("", False), *((label, True) for label in labels)], rows)
