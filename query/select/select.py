"""``ghoststore.select``: the training set for a val set: original rows of the corpus, chosen by their scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ghoststore.corpus import source_name
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import part_of, takes
from ghoststore.settings.question import SelectOptions
from query.common.texts import corpora_behind
from query.common.unchanged import Places, all_unchanged
from query.select.budget import Budget
from query.select.card import card_text
from query.select.files import SelectFiles
from query.select.leaks import named, refuse, report_of
from query.select.report import SelectReport
from query.select.strategy import Strategy
from query.select.subject import OfParts, OfRun


@takes(SelectOptions)
def select(options: SelectOptions) -> SelectReport:
    """Choose samples by their score for a val set, and write their original rows, every field of them, to ``out``.

    What scores are (``store``, ``val_set``, ``part`` or ``run``, ``metric``, …) is as in ``ghoststore.query``. Where
    there are several rankings, the first counts: that over everything.

    Samples are chosen among those that match ``where`` (a long one where any of its windows does), an SQL condition on
    the columns that ``ghoststore.query`` lists; shares are of these.

    How much: one of ``fraction`` (of the samples that can be chosen), ``count``, ``threshold`` (lowest score),
    ``threshold_nats`` (lowest score in nats, where scores have a unit) and ``token_budget``. ``quotas`` deal it out by
    domain: {domain: share or number of samples}, ``proportional`` or ``equal``. ``diversity``: ``mmr``,
    ``facility-location`` or ``greats``, among the best ``candidates`` (default: 4 for each that is asked for), with a
    ``diversity_weight``. ``leaks``: what becomes of near-duplicates of the val set. What these do: ``docs/select.md``.
    The same call writes the same bytes.

    ``out`` is a new path: the form of the corpus, or .jsonl, .parquet or a folder (``save_to_disk``). ``order`` of its
    rows is that of the corpus, or falling ``score``. ``report`` is a new .json file (default: ``out`` and
    ``.report.json``), and a list of the rows lies beside it. ``card`` adds a dataset card of the Hugging Face hub,
    README.md, in a folder ``out`` or beside a file. All of them appear whole or not at all.

    Raises UsageError for what cannot be used or chosen, MismatchError for a corpus that is not the one of the part,
    CorruptError for damaged rows, StorageError if the disk refuses, and what ``ghoststore.query`` raises.
    """
    progress = options.progress or Silent()
    strategy = Strategy(
        budget=part_of(Budget, options),
        quotas=options.quotas,
        diversity=options.diversity,
        diversity_weight=options.diversity_weight,
        candidates=options.candidates,
    )
    files = SelectFiles.of(options.out, options.report, options.order, card=options.card)
    subject = OfParts(options, progress) if options.run is None else OfRun(options, strategy)
    strategy = replace(strategy, budget=strategy.budget.in_unit(subject.unit))
    corpus = corpora_behind(subject.source, options.data)
    files.check(corpus)
    leak_check, places = subject.read_val_set(progress), Places()
    for sample in all_unchanged(corpus, subject.source, progress):
        places.add(sample)
        leak_check.see(sample)
    leaked = list(leak_check.found.values())
    if options.leaks == "error":
        refuse(leaked, source_name(options.val_set))
    samples = subject.samples(progress)
    excluded = np.isin(samples.source_row, list(leak_check.found) if options.leaks == "exclude" else [])
    chosen = strategy.choose(subject.scorer, samples, np.where(excluded, np.nan, samples.score), progress)
    report = SelectReport.of(
        samples,
        chosen,
        store=str(options.store),
        out=str(files.out),
        report=str(files.report),
        rows_file=str(files.rows),
        card=None if files.card is None else str(files.card),
        settings={**subject.settings(), **strategy.settings(), "order": files.order},
        leaks=report_of(None if options.val_set is None else [named(leak, samples) for leak in leaked], options.leaks),
    )
    _note_shortfalls(report, progress)
    card = card_text(report, options, subject.sources()) if options.card else ""
    files.write(report, corpus, places, samples, chosen, card)
    return report


def _note_shortfalls(report: SelectReport, progress: Progress) -> None:
    """Notes on near-duplicates and on quotas that could not be filled."""
    if report.leaks["found"]:
        fate = "left out" if report.leaks["policy"] == "exclude" else "kept where they were chosen"
        progress.note(f"{report.leaks['found']:,} near-duplicate(s) of the val set are in the corpus: {fate}")
    for pool in report.short:
        unit = "tokens" if "token_budget" in report.settings else "samples"
        progress.note(
            f"{pool['domain']}: {pool['asked']:,} {unit} were asked for, there are {pool['chosen']:,}; all are chosen"
        )
