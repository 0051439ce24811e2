"""``ghoststore scores``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.settings.shared import STEP_WEIGHT_SYMBOLS, Printing, ResultFile
from ghoststore.settings.store import ScoresOptions


@options.command(
    ScoresOptions,
    Printing,
    ResultFile,
    first="store run top_k bottom_k sample by steps value domains plot",
)
def command(keywords: options.Keywords, printing: Printing, file: ResultFile) -> None:
    """Which training samples helped the val set while the model trained, by the scores of a training run.

    A score is the inner product of a sample's gradient with that of the val loss, at one step. The value of a sample
    is the sum over steps of score ÷ the step's mean |score|, or of another --weight × score. Works while the run
    trains.

    \b
      ghoststore scores --store ./store --top-k 20 --bottom-k 20
      ghoststore scores --store ./store --by domain --steps -1000: --weight learning-rate
      ghoststore scores --store ./store --sample row-17
    """
    options.run("scores", keywords, printing, _print, file, also="plot")


def _print(result: Any) -> None:
    _print_summary(result)
    if result.history is not None:
        _print_history(result)
    elif result.domains is not None:
        _print_domains(result)
    else:
        _print_hits(result)


def _print_summary(result: Any) -> None:
    from ghoststore.cli.terminal import print_facts
    from ghoststore.corpus.repeated import repeated_words

    summary = result.summary
    left_out = [
        f"{count:,} {what}"
        for count, what in (
            (summary.unscored, "not scored (NaN)"),
            (summary.not_finite, "not finite"),
            (summary.without_learning_rate, "at steps without a learning rate"),
            (summary.not_chosen, "candidates that were not trained on"),
        )
        if count
    ]
    what = "samples" if result.settings["unit"] == "sample" else "windows"
    facts = [
        ("steps", f"{summary.steps:,} committed, {summary.first:,} to {summary.last:,}, of {summary.planned:,}"),
        (what, f"{summary.seen:,} of {summary.rows:,} seen, {summary.times:,} times"),
        ("scores", f"{summary.scored:,}, {_share(summary.negative_share)} negative"),
    ]
    if left_out:
        facts.append(("left out", ", ".join(left_out)))
    if words := repeated_words(summary.repeated_ids):
        facts.append(("ids", words))
    if summary.gaps:
        first_gaps = ", ".join(f"{start:,} to {stop - 1:,}" for start, stop in summary.gaps[:5])
        more = f" and {len(summary.gaps) - 5} more" * (len(summary.gaps) > 5)
        facts.append(("steps missing", first_gaps + more))
    print_facts(result.settings["run"], facts)


def _print_hits(result: Any) -> None:
    from ghoststore.cli.ranking import Column, print_ranking
    from ghoststore.cli.terminal import preview

    windows = result.settings["unit"] == "window"
    numbers: list[Column] = [(heading, "number") for heading in ("rank", _title(result), "times", "negative")]
    place: list[Column] = [("row", "number"), ("token", "number")] if windows else [("row", "number")]
    columns = [*numbers, ("id", "id"), *place, ("domain", "text"), ("text", "text")]
    for title, hits in (("highest", result.hits), ("lowest", result.bottom)):
        rows = [
            [
                str(hit.rank),
                f"{hit.value:.4g}",
                f"{hit.times:,}",
                _share(hit.negative_share),
                hit.id,
                str(hit.source_row),
                *([str(hit.window_start)] if windows else []),
                hit.domain or "",
                preview(hit.text),
            ]
            for hit in hits
        ]
        if rows:
            print_ranking(title, "", columns, rows)


def _print_domains(result: Any) -> None:
    from ghoststore.cli.terminal import print_table

    value = _title(result)
    columns = [
        ("domain", False),
        ("rows", True),
        ("times", True),
        (f"{value} a row", True),
        ("a time", True),
        ("sum", True),
        ("negative", True),
        ("mean score", True),
        ("± standard error", True),
    ]
    rows = [
        [
            domain.domain or "(none)",
            f"{domain.scored_rows:,} of {domain.rows:,}",
            f"{domain.times:,}",
            _number(domain.value_per_row),
            _number(domain.value_per_time),
            _number(domain.value_sum),
            _share(domain.negative_share),
            _number(domain.mean_score),
            _number(domain.standard_error),
        ]
        for domain in result.domains
    ]
    print_table("by domain", columns, rows)


def _print_history(result: Any) -> None:
    from ghoststore.cli.terminal import print_table

    columns = [
        ("step", True),
        ("rank", True),
        ("token", True),
        ("loss", True),
        ("learning rate", True),
        ("score", True),
        (f"{_symbol(result)}·score", True),
        ("cumulative", True),
    ]
    samples = sorted({entry.source_row for entry in result.history})
    for source_row in samples or [None]:
        rows = [
            [
                f"{entry.step:,}",
                str(entry.rank),
                str(entry.window_start),
                _number(entry.loss),
                _number(entry.learning_rate),
                _number(entry.score),
                _number(entry.weighted),
                _number(entry.cumulative),
            ]
            for entry in result.history
            if entry.source_row == source_row
        ]
        which = f", row {source_row}" if (result.same_id or 1) > 1 and source_row is not None else ""
        print_table(f"sample {result.settings['sample']}{which}", columns, rows)


NAMES = {"cumulative": "Σ {}·score", "mean": "mean {}·score", "sum": "Σ score", "last": "last score"}


def _title(result: Any) -> str:
    """The heading of the value."""
    return NAMES[result.settings["value"]].format(_symbol(result))


def _symbol(result: Any) -> str:
    """The factor of the scores."""
    return STEP_WEIGHT_SYMBOLS.get(result.settings["weight"], "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
