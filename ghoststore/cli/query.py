"""``ghoststore query``."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ghoststore.cli import options
from ghoststore.settings.question import QueryOptions
from ghoststore.settings.shared import STEP_WEIGHT_SYMBOLS, Printing, ResultFile


@options.command(
    QueryOptions,
    Printing,
    ResultFile,
    first="store val_set part run top_k each metric group_field report out",
)
def command(keywords: options.Keywords, printing: Printing, file: ResultFile) -> None:
    """The training samples whose gradients point the same way as those of a val set.

    \b
      ghoststore query --store ./store --val-set val.jsonl --report out.html
      ghoststore query --store ./store --val-set val.jsonl --each --top-k 5 --json
      ghoststore query --store ./store --val-set val.jsonl --with-scores my-run --score-weight 0.3
      ghoststore query --store ./store --run my-run --last 1000
    """
    options.run("query", keywords, printing, print_hits, file, also="report")


def print_hits(result: Any) -> None:
    from ghoststore.cli.terminal import preview, print_table, say

    metric, blended = result.settings["metric"], "with_scores" in result.settings
    of_run = "run" in result.settings
    symbol = STEP_WEIGHT_SYMBOLS.get(result.settings.get("weight"))
    heading = f"Σ {symbol}·{metric}" if of_run else metric
    scores = [("blend", True), (metric, True), (f"Σ {symbol}·score", True)] if blended else [(heading, True)]
    times_seen = [("times", True)] if of_run else []
    columns = [("rank", True), *scores, *times_seen, ("id", False), ("row", True), ("domain", False), ("text", False)]
    titles = ("nearest to {0}", "farthest from {0}") if metric in ("cosine", "dot") else ("highest {1}", "lowest {1}")
    times = Counter(query.query for query in result.results)
    for query in result.results:
        if of_run and result.settings["mode"] == "own":
            name = "each step's own val gradient"
        else:
            name = query.query if times[query.query] == 1 else f"{query.query} (val row {query.val_row})"
        for title, hits in zip(titles, (query.hits, query.bottom), strict=True):
            rows = []
            for hit in hits:
                numbers = [hit.score, hit.similarity, hit.value] if blended else [hit.score]
                cells = ["–" if number is None else f"{number:.4g}" for number in numbers]
                cells += [f"{hit.times:,}"] if of_run else []
                rows.append([str(hit.rank), *cells, hit.id, str(hit.source_row), hit.domain or "", preview(hit.text)])
            if rows:
                print_table(title.format(name, metric), columns, rows, fold=False)
    if result.settings.get("candidates_left_out"):
        say(f"Left out: {result.settings['candidates_left_out']:,} candidates that were not trained on.")
    if result.settings.get("index") == "ann":
        recalls = ", ".join(f"{recall['at_10']:.3f} for {kind}s" for kind, recall in result.settings["recall"].items())
        say(f"Found by index {result.settings['index_name']}; its recall@10 when it was built: {recalls}.")
    if result.settings.get("fidelity"):
        from ghoststore.store.part.fidelity import fidelity_line

        say(f"fidelity: {fidelity_line(result.settings['fidelity'])}")
