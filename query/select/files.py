"""The files that ``ghoststore select`` writes: the rows, the report, and the list of rows. All appear, or none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ghoststore.corpus import Corpus
from ghoststore.corpus.export import check_export, write_export
from ghoststore.corpus.joined import JoinedCorpora
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
    """The paths of these files, and the order of the rows in them."""

    out: Path
    report: Path
    rows: Path
    order: Order
    card: Path | None
    """README.md, in `out` where that is a folder."""

    @classmethod
    def of(cls, out: str | Path, report: str | Path | None, order: Order, *, card: bool = False) -> SelectFiles:
        """The paths for ``out`` and ``report``. UsageError for a report that is not a .json file, and if a
        path exists.
        """
        out = Path(out)
        report_path = out.with_name(f"{out.name}.report.json") if report is None else Path(report)
        if report_path.suffix != ".json":
            raise UsageError(f"`report={report_path}`: expected a name that ends in .json")
        readme = (out.parent if out.suffix else out) / "README.md"
        files = cls(out, report_path, report_path.with_suffix(".rows.jsonl"), order, readme if card else None)
        check_new(f"`out={files.out}`", *files.all)
        check_new(f"`report={files.report}`", files.report, *files.all)
        check_new(f"the list of rows, {files.rows}", files.rows, *files.all)
        if files.card is not None and out.suffix:
            if files.card.exists():
                raise UsageError(
                    f"`card` writes {files.card}, which exists; nothing was written. Give `out` a folder of its own, "
                    f"such as {out.parent / out.stem / out.name} (make it first), or remove that file"
                )
            check_new(f"`card`, {files.card}", files.card, *files.all)
        if files.rows.resolve() == files.out.resolve():
            raise UsageError(
                f"`out={out}`: the list of rows of `report={report_path}` is written there; give either another name"
            )
        return files

    @property
    def all(self) -> tuple[Path, ...]:
        """In the order in which they appear. The report is last: if it is there, so are the others."""
        beside = () if self.card is None or not self.out.suffix else (self.card,)
        return self.out, self.rows, *beside, self.report

    def check(self, corpus: Corpus | JoinedCorpora) -> None:
        """UsageError unless rows of ``corpus`` can be written to ``out``."""
        check_export(corpus.source, corpus.form, self.out)

    def write(
        self,
        select_report: SelectReport,
        corpus: Corpus | JoinedCorpora,
        places: Places,
        samples: Samples,
        chosen: ChosenSamples,
        card: str,
    ) -> None:
        """Write all files. Those that a killed call has left are replaced.

        MismatchError for a row that has changed since the build, UsageError if one of the files has appeared meanwhile,
        StorageError if the disk refuses.
        """
        in_corpus = np.sort(chosen.places)
        by_score = np.argsort(chosen.rank[in_corpus]) if self.order == "score" else None
        written = in_corpus if by_score is None else in_corpus[by_score]
        source_rows = SourceRows(
            corpus, places.of(samples.source_row[in_corpus].tolist()), samples.digest[in_corpus].tolist()
        )
        with new_files(*self.all) as (out, rows, *beside, report):
            write_export(source_rows, out, None if by_score is None else by_score.tolist())
            if self.card is not None:
                readme = beside[0] if beside else out / self.card.name
                readme.write_text(card, encoding="utf-8")
            with open(rows, "w", encoding="utf-8") as file:
                file.writelines(row_list(samples, chosen, written))
            select_report.write(report)
