"""A Hugging Face dataset card for a selected subset: README.md, which says how its rows were chosen.

All text that comes from a corpus, a store or an option is escaped: it can be neither markup nor YAML.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, cast

from ghoststore.settings.flags import entries_of, flag_words
from ghoststore.settings.question import QuotaOption, SelectOptions
from ghoststore.settings.shared import in_memory, is_paths
from ghoststore.shown import visible
from ghoststore.software import versions_of
from query.select.report import SelectReport

SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
"""The bounds of the hub's names of sizes, each ten times the one before."""
TAGS = ("ghoststore", "data-selection", "data-attribution")
MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~:@^$-])")
MOST_CHARACTERS = 200
"""Of a name in the card."""
OBJECTS = ("data", "val_set", "minus", "checkpoint", "tokenizer")
"""Options that take objects in memory, too."""
BESIDE_SCORES = {"part", "run", "val_set", "checkpoint", "out", "unit", "repeated_ids", "val_rows", "rows", "ranking"}
"""Settings that the table of settings does not repeat."""


def escaped(text: object) -> str:
    """``text`` as markdown that shows it, on one line, cut where it is long."""
    shown = visible(str(text))
    shown = shown if len(shown) <= MOST_CHARACTERS else f"{shown[: MOST_CHARACTERS - 1]}…"
    shown = MARKUP.sub(r"\\\1", shown)
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def card_text(report: SelectReport, options: SelectOptions, sources: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The card. ``sources`` are (name, manifest) of the parts or the run."""
    from huggingface_hub import DatasetCardData

    out = Path(options.out)
    data = DatasetCardData(
        size_categories=[_size(report.samples)],
        tags=list(TAGS),
        # `load_dataset` refuses what `save_to_disk` wrote, whatever a card says.
        configs=_configs(out.name) if out.suffix else None,
    )
    parts: Iterable[Iterable[str]] = (
        ["---", data.to_yaml(), "---", "", f"# {escaped(out.name)}", ""],
        _summary(report),
        _how(report, options, sources),
        _by_domain(report),
        _scores(report),
        _near_duplicates(report),
    )
    return "\n".join(line for part in parts for line in part) + "\n"


def _configs(file: str) -> list[dict[str, Any]]:
    return [{"config_name": "default", "data_files": [{"split": "train", "path": file}]}]


def _size(rows: int) -> str:
    """The hub's name for so many rows."""
    at = max(0, len(str(rows)) - 3)
    if at >= len(SIZES):
        return f"n>{SIZES[-1]}"
    return f"{SIZES[at - 1]}<n<{SIZES[at]}" if at else f"n<{SIZES[0]}"


def _summary(report: SelectReport) -> Iterator[str]:
    share, version = report.samples / report.available, versions_of("ghoststore")["ghoststore"]
    yield f"{report.samples:,} of {report.available:,} samples ({share:.1%}), {report.tokens:,} tokens, chosen by their"
    yield f"gradients with ghoststore {version}: those whose training helps the model at a val set most."
    if not Path(report.out).suffix:
        yield "`datasets.load_from_disk` opens them; `push_to_hub` of what it returns makes a dataset of the hub."
    yield ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _how(
    report: SelectReport, options: SelectOptions, sources: Sequence[tuple[str, Mapping[str, Any]]]
) -> Iterator[str]:
    settings = report.settings
    yield "## How it was chosen"
    yield ""
    rows = [("store", escaped(Path(report.store).name or report.store))]
    for name, manifest in sources:
        rows.append(("run" if options.run is not None else "part", escaped(name)))
        checkpoint = manifest.get("checkpoint") or {}
        for what, section in (("checkpoint", checkpoint), ("corpus", manifest.get("corpus") or {})):
            if section.get("fingerprint"):
                rows.append((f"{what}, fingerprint", escaped(section["fingerprint"])))
    if settings.get("val_set") is not None:
        rows.append(("val set", f"{escaped(settings['val_set'])}, {settings.get('val_rows', '?')} rows"))
    rows += [
        (escaped(name), escaped(value))
        for name, value in settings.items()
        if name not in BESIDE_SCORES and value not in (None, [], {}, False, "none")
    ]
    yield from _table(("", ""), rows)
    line = visible(command_line(options))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", line)), default=0))
    yield from (f"{fence}bash", line, fence, "")


def command_line(options: SelectOptions) -> str:
    """``ghoststore select …`` for a shell; what was given in memory, or has no flag, is ``…``."""
    words = ["ghoststore", "select"]
    for entry in entries_of(SelectOptions):
        name = entry.spec.name
        value: Any = reduce(_within, entry.path, cast(Any, options))
        if value is None or value == entry.spec.default:
            continue
        if name == "quotas" and not isinstance(value, str):
            (quota,) = entries_of(QuotaOption)
            words += flag_words(quota, [f"{domain}={share}" for domain, share in value.items()])
        elif name == "checkpoint" and isinstance(value, list | tuple):
            words += flag_words(entry, ["…" if in_memory(one) else one for one in value])
        elif name in OBJECTS and (in_memory(value) or (is_paths(value) and not entry.option.repeated)):
            words += [entry.flag, "…"]
        else:
            words += flag_words(entry, value)
    return shlex.join(words)


def _within(holder: Any, name: str) -> Any:
    return None if holder is None else getattr(holder, name)


def _by_domain(report: SelectReport) -> Iterator[str]:
    all_tokens = sum(share.tokens for share in report.domains) or 1
    if len(report.domains) < 2:
        return
    yield "## By domain"
    yield ""
    yield from _table(
        ("domain", "chosen", "of", "tokens", "share of the tokens"),
        (
            (
                escaped(share.domain),
                f"{share.chosen:,}",
                f"{share.available:,}",
                f"{share.tokens:,}",
                f"{share.tokens / all_tokens:.1%}",
            )
            for share in report.domains
        ),
    )


def _scores(report: SelectReport) -> Iterator[str]:
    unit = report.settings.get("unit")
    factor, name = (1.0, "score") if unit is None else (float(unit["factor"]), str(unit["name"]))
    labels = list(report.scores["all"])
    yield f"## Scores ({escaped(name)}) and lengths"
    yield ""
    yield from _table(
        ("", *labels),
        (
            (f"{what} of {whose}", *(f"{numbers[whose][label] * times:.4g}" for label in labels))
            for what, numbers, times in ((name, report.scores, factor), ("tokens", report.lengths, 1.0))
            for whose in ("chosen", "all")
        ),
    )


def _near_duplicates(report: SelectReport) -> Iterator[str]:
    leaks = report.leaks
    yield "## Near-duplicates of the val set"
    yield ""
    if leaks["found"] is None:
        yield "No val set was given, so none were looked for."
        return
    fate = "were left out" if leaks["policy"] == "exclude" else "were kept where they were chosen"
    yield (
        f"{leaks['found']:,} rows of the corpus hold at least {leaks['least_overlap']:.0%} of the runs of "
        f"{leaks['shingle_words']} words of a val sample, and {fate}. Paraphrases are not found. A model that is "
        "trained on these rows is to be measured on other samples than the val set, which chose them."
    )
