"""``ghoststore demo``."""

from __future__ import annotations

import shlex
from typing import Any

from ghoststore.cli import options
from ghoststore.settings.measure import DemoOptions
from ghoststore.settings.shared import Printing


@options.command(DemoOptions, Printing)
def command(keywords: options.Keywords, printing: Printing) -> None:
    """Take a small corpus with planted facts, train a small GPT-2 on it with every sample scored live, build a store,
    and ask both: what helped, and where the facts came from.

    Under three minutes on two cores; nothing is downloaded.
    """
    options.run("demo", keywords, printing, _print)


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import print_facts, print_next, print_table, say

    names = sorted(next(iter(report.values.values())))
    scored = report.scored
    print_table(
        "While training: mean cumulative score of a sample of each domain, against each val domain",
        [("val domain", False), *((name, True) for name in names)],
        [[val, *(f"{values[name]:.3g}" for name in names)] for val, values in report.values.items()],
    )
    say(
        f"Every sample of every step was scored as it was trained on; {scored['negative_share']:.0%} of the scores\n"
        f"are negative, and scoring took {scored['share_of_time']:.0%} of the time (a val gradient every "
        f"{scored['val_refresh_interval']} steps).\n"
    )
    names = list(next(iter(report.domains.values())))
    print_table(
        "The ten rows nearest to each val domain, by domain",
        [("val domain", False), *((name, True) for name in names)],
        [[val, *(str(counts[name]) for name in names)] for val, counts in report.domains.items()],
    )
    from query.demo.demo import QUESTIONS

    rows = []
    for name, recall in report.recall.items():
        questions, method = name.split("/", 1)
        rows.append([QUESTIONS[questions], method, f"{recall.at_1:.2f}", f"{recall.at_10:.2f}"])
    rows.append(["", "chance", f"{report.chance_at_10 / 10:.4f}", f"{report.chance_at_10:.3f}"])
    print_table(
        f"Finding the one row of {report.rows:,} that states a fact",
        [("question", False), ("ranked by", False), ("recall@1", True), ("recall@10", True)],
        rows,
    )
    say(
        "The invented names stand in one row each, so matching words finds that row, until each name has another\n"
        "ending. Gradients see no words, only what the model would learn.\n"
    )
    for example in report.examples:
        verdict = "the source" if example["is_source"] else "not the source"
        print_facts(
            f"asked: {example['question']}",
            [
                ("nearest row", str(example["nearest"])),
                ("", f"{verdict}; without it the answer's loss should be {example['nats']:.2g} nats higher"),
            ],
        )
        say()
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.seconds.items())
    folder = shlex.quote(report.folder)
    query = f"ghoststore query --store {folder}/store --val-set {folder}"
    print_facts(
        "Now yours",
        [
            ("time", spent),
            ("plots", report.plot),
            ("", report.scores_plot),
        ],
    )
    print_next(
        [
            f"ghoststore info --store {folder}/store",
            f"ghoststore scores --store {folder}/store --top-k 5 --bottom-k 5",
            f"{query}/val_recipe.jsonl",
            f"{query}/facts_inflected.jsonl --each --top-k 3",
            f"{query}/val.jsonl --group-field domain --combine max --report {folder}/report.html",
            f"ghoststore select --store {folder}/store --val-set {folder}/val_recipe.jsonl --count 100 "
            f"--out {folder}/best.jsonl",
        ]
    )
