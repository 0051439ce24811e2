"""``ghoststore select``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.errors import UsageError
from ghoststore.settings.question import QuotaOption, SelectOptions, quotas_of
from ghoststore.settings.shared import Printing


@options.command(
    SelectOptions,
    Printing,
    QuotaOption,
    first="store val_set run out fraction count token_budget metric diversity quotas",
)
def command(keywords: options.Keywords, printing: Printing, quota_option: QuotaOption) -> None:
    """Choose the samples whose gradients point the way of a val set, and write their original rows: a training set.

    Every row is written as it stands in the corpus, with all its fields; a corpus that has changed since the part was
    built is refused. Give one of --fraction, --count, --threshold and --token-budget.

    \b
      ghoststore select --store ./store --val-set val.jsonl --fraction 0.1 --out best.jsonl
      ghoststore select --store ./store --val-set val.jsonl --count 1000 --diversity mmr --out best.jsonl
      ghoststore select --store ./store --run my-run --fraction 0.1 --out best.jsonl
      ghoststore select --store ./store --val-set val.jsonl --token-budget 1000000 --quotas equal --out best.parquet
    """
    if quota_option.quota:
        if "quotas" in keywords:
            raise UsageError("`quota` names domains, `quotas` takes them all: give one of the two")
        keywords["quotas"] = quotas_of(quota_option.quota)
    options.run("select", keywords, printing, _print)


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import print_facts, print_table, say

    leaks, unit = report.leaks["found"], report.settings.get("unit")
    score, factor, form = ("score", 1.0, ".4g") if unit is None else (unit["name"], unit["factor"], ".2e")
    left_out = report.settings.get("candidates_left_out")
    print_facts(
        f"{report.samples:,} of {report.available:,} samples, {report.tokens:,} tokens",
        [
            ("rows", report.out),
            ("report", report.report),
            ("list of rows", report.rows_file),
            *([("dataset card", report.card)] if report.card else []),
            (
                "lowest score chosen",
                f"{report.scores['chosen']['lowest'] * factor:{form}}{' ' + score if unit else ''}",
            ),
            (
                "near-duplicates of the val set",
                "not looked for" if leaks is None else f"{leaks:,} ({report.leaks['policy']})",
            ),
            *([("left out", f"{left_out:,} candidates that were not trained on")] if left_out else []),
        ],
    )
    if len(report.domains) > 1 or report.settings["quotas"]:
        columns = [("domain", False), ("chosen", True), ("of", True), ("tokens", True), (f"mean {score}", True)]
        print_table(
            "by domain",
            columns,
            [
                [
                    share.domain,
                    f"{share.chosen:,}",
                    f"{share.available:,}",
                    f"{share.tokens:,}",
                    "–" if share.mean_score is None else f"{share.mean_score * factor:{form}}",
                ]
                for share in report.domains
            ],
        )
    labels = list(report.lengths["all"])
    rows = [
        [f"{what} of {whose}", *(f"{numbers[whose][label] * times:{shape}}" for label in labels)]
        for what, numbers, times, shape in (
            ("tokens", report.lengths, 1, ",.4g"),
            (score, report.scores, factor, form if unit else ",.4g"),
        )
        for whose in ("chosen", "all")
    ]
    print_table("quantiles", [("", False), *((label, True) for label in labels)], rows)
    if unit is not None:
        from query.ask.unit import unit_words

        say(unit_words(report.settings))
