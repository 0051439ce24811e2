"""``ghoststore query``."""

from __future__ import annotations

from collections import Counter
from functools import partial
from math import log1p
from typing import TYPE_CHECKING, Any

from ghoststore.cli import options
from ghoststore.cli.charts import histogram
from ghoststore.settings.question import QueryOptions
from ghoststore.settings.shared import STEP_WEIGHT_SYMBOLS, Printing, ResultFile

if TYPE_CHECKING:
    from ghoststore.cli.ranking import Column
    from query.answer.distribution import Distribution

CHART_LINES = 5


@options.command(
    QueryOptions,
    Printing,
    ResultFile,
    first="store val_set part run top_k each metric group_field report out",
)
def command(keywords: options.Keywords, printing: Printing, file: ResultFile) -> None:
    """The training samples whose gradients point the same way as those of a val set.

    Scores in nats: by how much the val loss is predicted to rise if the row were left out of the training, or to fall
    if it were seen once more; below 0 the other way round. --out and --json have the raw product, too.

    \b
      ghoststore query --store ./store --val-set val.jsonl --report out.html
      ghoststore query --store ./store --val-set val.jsonl --each --top-k 5 --json
      ghoststore query --store ./store --val-set val.jsonl --with-scores my-run --score-weight 0.3
      ghoststore query --store ./store --run my-run --last 1000
      ghoststore query --server http://127.0.0.1:8321 --val-set val.jsonl
    """
    options.run("query", keywords, printing, print_hits, file, also="report")


def print_hits(result: Any) -> None:
    from ghoststore.cli.ranking import print_ranking
    from ghoststore.cli.terminal import preview, say
    from ghoststore.cli.tokens import token_lines
    from query.answer.results import title_of, titles_of
    from query.ask.unit import metric_words, unit_words

    settings = result.settings
    metric, of_run = settings["metric"], "run" in settings
    beside = "value" if "with_scores" in settings else "bm25" if "lexical" in settings else None
    in_nats = any(hit.nats is not None for query in result.results for hit in (*query.hits, *query.bottom))
    about = "" if of_run else f"metric: {metric_words(settings)}"
    titles = titles_of(metric)
    times = Counter(query.query for query in result.results)
    for place, query in enumerate(result.results):
        columns = _columns(settings, in_nats, fused=settings.get("combine") == "rank-fusion" and not place)
        name = title_of(query, settings)
        if times[query.query] > 1:
            name += f" (val row {query.val_row})"
        for title, hits in zip(titles, (query.hits, query.bottom), strict=True):
            rows = []
            for hit in hits:
                similarity = f"{hit.similarity if beside else hit.score:.4g}"
                cells = [similarity if hit.nats is None else f"{hit.nats:.2e}"]
                if beside is not None:
                    value = getattr(hit, beside)
                    cells = [f"{hit.score:.4g}", *cells, "–" if value is None else f"{value:.4g}"]
                cells += [f"{hit.times:,}"] if of_run else []
                about_row = [hit.id, hit.part or "", str(hit.source_row), hit.domain or "", preview(hit.text)]
                rows.append([str(hit.rank), *cells, *about_row])
            if rows:
                print_ranking(title.format(name), about, columns, rows, partial(token_lines, hits))
        if query.histogram is not None:
            _print_histogram(query.histogram, settings if in_nats and not beside else {})
    if "lexical" in settings:
        words = settings["lexical"]
        say(
            f"hybrid: {1 - words:g} × similarity + {words:g} × BM25, each in standard deviations from its mean over "
            "the rows that rank."
        )
    if in_nats:
        say(unit_words(settings))
    if settings.get("tokens") and (first := next((hit for query in result.results for hit in query.hits), None)):
        stored, anew = f"{first.similarity if beside else first.score:.4g}", f"{first.recomputed:.4g}"
        if first.nats is not None:
            unit = settings["unit"]
            stored, anew = (
                f"{number:.2e} {unit['name']}"
                for number in (first.nats, first.recomputed * unit["factor"] / unit["rounding"])
            )
        by_stored = f", {stored} by its stored vector" if settings["rerank"] is None else ""
        say(
            f"Tokens sum to the {metric} of gradients that were computed again and not rounded: "
            f"{anew} for the first row{by_stored}."
        )
    if fewer := _fewer(result):
        say(fewer)
    if settings.get("candidates_left_out"):
        say(f"Left out: {settings['candidates_left_out']:,} candidates that were not trained on.")
    if settings.get("index") == "ann":
        say(_recall(settings))
    if settings.get("fidelity"):
        from ghoststore.store.part.fidelity import fidelity_line

        say(f"fidelity: {fidelity_line(settings['fidelity'])}")


def _print_histogram(found: Distribution, settings: dict[str, Any]) -> None:
    """The scores of all rows as a chart, in nats where ``settings`` have them, and the rows of each domain."""
    unit = settings.get("unit") or {"factor": 1.0, "name": ""}
    low, high = (f"{score * unit['factor']:.3g} {unit['name']}".strip() for score in (found.low, found.high))
    from ghoststore.cli.terminal import say

    say(f"Scores of {found.rows:,} rows, {low} to {high}; bars grow with the logarithm of their rows:")
    for line in histogram([round(100 * log1p(count)) for count in found.counts], CHART_LINES):
        say(line)
    for of in found.domains:
        say(f"  {of.domain or '(no domain)'}: {of.hits:,} listed of {of.rows:,} rows")
    say("")


def _columns(settings: dict[str, Any], in_nats: bool, fused: bool) -> list[Column]:
    """The columns of a table. ``fused``: whether its similarities are those of ``combine=rank-fusion``."""
    metric, symbol = settings["metric"], STEP_WEIGHT_SYMBOLS[settings["weight"]] if "weight" in settings else ""
    similarity = settings["unit"]["name"] if in_nats else "rank fusion" if fused else metric
    scores = [similarity]
    if "run" in settings:
        scores = [similarity if fused else f"Σ {symbol}·{metric}", "times"]
    if "with_scores" in settings:
        scores = ["blend", similarity, f"Σ {symbol}·score"]
    if "lexical" in settings:
        scores = ["hybrid", similarity, "BM25"]
    numbers: list[Column] = [(heading, "number") for heading in ("rank", *scores)]
    return [*numbers, ("id", "id"), ("part", "text"), ("row", "number"), ("domain", "text"), ("text", "text")]


def _fewer(result: Any) -> str:
    """A sentence where a ranking has fewer rows than were asked for; empty otherwise."""
    for name, hits in (("top_k", "hits"), ("bottom_k", "bottom")):
        wanted = result.settings[name]
        least = min((len(getattr(query, hits)) for query in result.results), default=wanted)
        if least < wanted:
            why = "the index found no more" if result.settings.get("index") == "ann" else "no more rows have a score"
            if least >= result.settings.get("rows_matching", least + 1):
                why = "no more rows match --where"
            return f"{least:,} of the {wanted:,} rows that were asked for: {why}."
    return ""


def _recall(settings: dict[str, Any]) -> str:
    """The measured recall of the index, for as many rows as were asked for, or the nearest number that was measured."""
    rows = max(settings["top_k"], settings["bottom_k"], settings["rerank"] or 0)
    at = 10 if rows <= 10 else 100
    recalls = ", ".join(f"{recall[f'at_{at}']:.3f} for {kind}s" for kind, recall in settings["recall"].items())
    more = f" ({rows:,} rows are searched for here; of so many it was not measured)" if rows > 100 else ""
    others = {
        "--layers": bool(settings["layers"] or settings["exclude_layers"]),
        "--precondition": settings["precondition"] != "none",
        "--minus": "minus" in settings,
        "--where": "where" in settings,
    }
    if named := [option for option, given in others.items() if given]:
        more += f", without {' and '.join(named)}"
    return f"Found by index {settings['index_name']}; its recall@{at} when it was built: {recalls}{more}."
