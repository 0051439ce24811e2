"""The files of ``ghoststore select``: the rows, the report, and the list of rows; all of them or none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ghoststore.corpus import Corpus
from ghoststore.corpus.export import check_export, write_export
from ghoststore.corpus.source_rows import SourceRows
from ghoststore.errors import UsageError
from ghoststore.settings.question import Order as Order
from ghoststore.store.base.new_files import check_new, new_files
from query.common.unchanged import Places
from query.select.report import SelectReport, row_list
from query.select.samples import Samples
from query.select.strategy import ChosenSamples


@dataclass(frozen=True, slots=True)
class SelectFiles:
    """Where everything is written, and in which order."""

    out: Path
    report: Path
    rows: Path
    order: Order

    @classmethod
    def of(cls, out: str | Path, report: str | Path | None, order: Order) -> SelectFiles:
        """UsageError for a report that is no .json file, and paths that exist."""
        out = Path(out)
        said = out.with_name(f"{out.name}.report.json") if report is None else Path(report)
        if said.suffix != ".json":
            raise UsageError(f"`report={said}`: expected a name that ends in .json")
        files = cls(out, said, said.with_suffix(".rows.jsonl"), order)
        check_new(f"`out={files.out}`", *files.all)
        check_new(f"`report={files.report}`", files.report, *files.all)
        check_new(f"the list of rows, {files.rows}", files.rows, *files.all)
        if files.rows.resolve() == files.out.resolve():
            raise UsageError(
                f"`out={out}`: the list of rows of `report={said}` is written there; give either another name"
            )
        return files

    @property
    def all(self) -> tuple[Path, Path, Path]:
        """In the order in which they get their names: the report says that the others are there."""
        return self.out, self.rows, self.report

    def check(self, corpus: Corpus) -> None:
        """UsageError unless rows of ``corpus`` can be written to ``out``."""
        check_export(corpus.source, corpus.form, self.out)

    def write(
        self, made: SelectReport, corpus: Corpus, places: Places, samples: Samples, chosen: ChosenSamples
    ) -> None:
        """Write all; where a killed call had named some of them, those are replaced.

        MismatchError for a row that is no longer what it was, UsageError if one of the files came to exist meanwhile,
        StorageError if the disk refuses.
        """
        in_corpus = np.sort(chosen.places)
        by_score = np.argsort(chosen.rank[in_corpus]) if self.order == "score" else None
        written = in_corpus if by_score is None else in_corpus[by_score]
        source_rows = SourceRows(
            corpus, places.of(samples.source_row[in_corpus].tolist()), samples.digest[in_corpus].tolist()
        )
        with new_files(*self.all) as (out, rows, report):
            write_export(source_rows, out, None if by_score is None else by_score.tolist())
            with open(rows, "w", encoding="utf-8") as file:
                file.writelines(row_list(samples, chosen, written))
            made.write(report)
