"""``ghoststore.select``: the training set for a val set: original rows of the corpus, chosen by their scores."""

from __future__ import annotations

from itertools import islice

import numpy as np

from ghoststore.corpus import open_corpus
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import part_of, takes
from ghoststore.settings.question import SelectOptions
from query.ask.question import Question
from query.ask.scorer import open_scorer
from query.common.texts import corpus_behind
from query.common.unchanged import Places, read_unchanged
from query.search.parts import note_repeated, open_parts
from query.select.budget import Budget
from query.select.files import SelectFiles
from query.select.leaks import LeakCheck, refuse, report_of
from query.select.report import SelectReport
from query.select.samples import Samples
from query.select.strategy import Strategy


@takes(SelectOptions)
def select(options: SelectOptions) -> SelectReport:
    """Choose samples by their score for a val set, and write their original rows, with all fields, to ``out``.

    The options of the scores (``store``, ``val_set``, ``part``, ``metric``, …) are those of ``ghoststore.query``. If
    these give several rankings, the first one counts: the combined one.

    Exactly one option says how much to choose: ``fraction`` (of the samples that can be chosen), ``count``,
    ``threshold`` (the lowest score) or ``token_budget``. ``quotas`` divide it by domain: {domain: share or number of
    samples}, ``proportional`` or ``equal``. ``diversity`` is ``mmr``, ``facility-location`` or ``greats`` (see
    `query.select.diversity`), weighted by ``diversity_weight``, among the best ``candidates`` (default: 4 for each
    sample to choose). ``leaks`` says what to do with near-duplicates of the val set (see `query.select.leaks`). The
    same call writes the same bytes.

    ``out`` is a new path: in the form of the corpus, or .jsonl, .parquet or a folder (``save_to_disk``). ``order`` of
    the rows is that of the corpus, or by falling ``score``. ``report`` is a new .json file (default: the name of
    ``out`` with ``.report.json`` added), and a list of the rows is written beside it. All files appear whole, or none
    does.

    Raises UsageError for options that do not fit or if nothing can be chosen, MismatchError if the corpus is no longer
    that of the part, CorruptError for damaged rows, StorageError if the disk refuses, and what ``ghoststore.query``
    raises.
    """
    progress = options.progress or Silent()
    strategy = Strategy(
        budget=part_of(Budget, options),
        quotas=options.quotas,
        diversity=options.diversity,
        diversity_weight=options.diversity_weight,
        candidates=options.candidates,
    )
    files = SelectFiles.of(options.out, options.report, options.order)
    question = part_of(Question, options)
    parts, weights = open_parts(question.store, question.part, question.part_weights, progress)
    part = parts[0]
    corpus = corpus_behind(part, question.data)
    files.check(corpus)
    with open_corpus(str(question.val_set), question.val_fields(), progress) as val_set:
        leak_check = LeakCheck(islice(val_set.samples(), question.max_samples))
        scorer = open_scorer(question, parts, weights, val_set, progress)
    note_repeated(part, progress)
    places = Places()
    for sample in read_unchanged(corpus, part, progress):
        places.add(sample)
        leak_check.see(sample)
    leaked = list(leak_check.found.values())
    if options.leaks == "error":
        refuse(leaked, str(question.val_set))
    samples = Samples.of(part, scorer.scores(progress, 1)[0])
    excluded = np.isin(samples.source_row, list(leak_check.found) if options.leaks == "exclude" else [])
    chosen = strategy.choose(scorer, samples, np.where(excluded, np.nan, samples.score), progress)
    report = SelectReport.of(
        samples,
        chosen,
        store=str(question.store),
        out=str(files.out),
        report=str(files.report),
        rows_file=str(files.rows),
        settings={**scorer.settings(), "ranking": scorer.names[0], **strategy.settings(), "order": files.order},
        leaks=report_of(leaked, options.leaks),
    )
    _note_shortfalls(report, progress)
    files.write(report, corpus, places, samples, chosen)
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
