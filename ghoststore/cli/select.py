"""``ghoststore select``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ghoststore.cli import options
from ghoststore.errors import UsageError
from ghoststore.settings.question import QuotaOption, SelectOptions
from ghoststore.settings.shared import Printing


@options.command(
    SelectOptions,
    Printing,
    QuotaOption,
    first="store val_set run out fraction count token_budget metric diversity quotas",
)
def command(keywords: options.Keywords, printing: Printing, given: QuotaOption) -> None:
    """Choose the samples whose gradients point the way of a val set, and write their original rows: a training set.

    Every row is written as it stands in the corpus, with all its fields; a corpus that has changed since the part was
    built is refused. Give one of --fraction, --count, --threshold and --token-budget.

    \b
      ghoststore select --store ./store --val-set val.jsonl --fraction 0.1 --out best.jsonl
      ghoststore select --store ./store --val-set val.jsonl --count 1000 --diversity mmr --out best.jsonl
      ghoststore select --store ./store --run my-run --fraction 0.1 --out best.jsonl
      ghoststore select --store ./store --val-set val.jsonl --token-budget 1000000 --quotas equal --out best.parquet
    """
    if given.quota:
        if "quotas" in keywords:
            raise UsageError("`quota` names domains, `quotas` takes them all: give one of the two")
        keywords["quotas"] = _quotas(given.quota)
    options.run("select", keywords, printing, _print)


def _quotas(quotas: Sequence[tuple[str, float]]) -> dict[str, float]:
    """UsageError for a domain that has two."""
    domains = [domain for domain, _ in quotas]
    for domain in domains:
        if domains.count(domain) > 1:
            raise UsageError(f"`quota`: {domain!r} has two quotas")
    return dict(quotas)


def _print(made: Any) -> None:
    from ghoststore.cli.terminal import print_facts, print_table

    leaks = made.leaks["found"]
    left_out = made.settings.get("candidates_left_out")
    print_facts(
        f"{made.samples:,} of {made.available:,} samples, {made.tokens:,} tokens",
        [
            ("rows", made.out),
            ("report", made.report),
            ("list of rows", made.rows_file),
            ("lowest score chosen", f"{made.scores['chosen']['lowest']:.4g}"),
            (
                "near-duplicates of the val set",
                "not looked for" if leaks is None else f"{leaks:,} ({made.leaks['policy']})",
            ),
            *([("left out", f"{left_out:,} candidates that were not trained on")] if left_out else []),
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
