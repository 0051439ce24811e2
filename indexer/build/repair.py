"""``ghoststore.repair``: restore what is damaged in a store from what is sound.

Metadata follow from the layout and are written again, damaged caches are removed, and the damaged spans of a part are
recomputed from the checkpoint and the corpus, as in the build. Steps that a training run has lost cannot be recomputed;
the report names them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import zarr

from ghoststore.checkpoint.same_model import adapter_as_built
from ghoststore.errors import BusyError, CorruptError, GhostStoreError, MismatchError, StorageError, UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.build import BuildOptions
from ghoststore.settings.keywords import takes
from ghoststore.settings.store import RepairOptions
from ghoststore.store import Part, Run
from ghoststore.store.base.disk import replace as replace_file
from ghoststore.store.base.disk import storage_errors
from ghoststore.store.base.object_path import refuse_objects
from ghoststore.store.base.opening import links_below
from ghoststore.store.base.own import is_own, source_path
from ghoststore.store.base.records import FileRecord
from ghoststore.store.base.writable import check_writable
from ghoststore.store.manage.mend import (
    Mended,
    damaged_spans,
    drop_caches,
    make_way,
    restore_groups,
    restore_metadata,
    restore_opening,
    restore_records,
)
from ghoststore.store.part.part import SPAN_TABLE, create_fixed
from ghoststore.store.run.dropping import drop_damaged_steps
from ghoststore.store.run.journal import FOLDER as JOURNAL
from ghoststore.store.run.ranges import inside, without
from ghoststore.store.run.saver import rebuild_from_journals
from ghoststore.store.spans.commits import Commit, commit_path, read_commit
from ghoststore.store.spans.group import Spanned
from ghoststore.store.spans.soundness import lost_spans, record_name
from ghoststore.store.spans.withdrawn import forget, put_back, withdraw, withdrawn_spans
from ghoststore.store.spans.writer import writing
from ghoststore.store.store import Store
from ghoststore.store.verify import Damage, Examination, Owner
from indexer.build.inputs import open_inputs
from indexer.build.job import BuildJob, plan_job
from indexer.build.like import settings_as_built
from indexer.build.opened import refuse_other_build
from indexer.build.spans import compute_spans


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmended(Damage):
    """Damage that the repair could not mend."""

    why: str
    """Why not, and what the user can do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What ``ghoststore.repair`` returns: the damage that it mended, and the damage that it could not mend."""

    store: str
    parts: list[str]
    runs: list[str]
    mended: list[Mended] = field(default_factory=list)
    unmended: list[Unmended] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether no damage is left."""
        return not self.unmended

    def to_json(self) -> dict[str, Any]:
        """The document that ``ghoststore repair --json`` prints."""
        return {**asdict(self), "sound": self.sound}


@takes(RepairOptions)
def repair(options: RepairOptions) -> RepairReport:
    """Mend the damage that `ghoststore.verify` finds in a store, or in one part or run of it.

    Metadata of groups and arrays are written again, and damaged caches (indexes, second moments, measured fidelity) are
    removed. Damaged spans of a part, and spans without a record, are recomputed from the checkpoint and the corpus that
    it was built from; on the same machine and software the bytes are the same. ``checkpoint``, ``tokenizer`` and
    ``data`` say where these are now. Damaged files are moved aside until the new ones are committed. A repair that was
    killed at any moment can be run again.

    Steps that a training run has lost cannot be recomputed; the report names them. ``drop_damaged`` removes the spans
    that hold them, so that the others can be opened. A training that resumes may fill them again.

    Raises UsageError if there is no such store, part or run, BusyError if a process writes what is to be repaired,
    StorageError if the disk refuses. The report lists damage that could not be mended.
    """
    progress = options.progress or Silent()
    refuse_objects(
        options.store,
        "store",
        "repairing",
        "build the part again under another `name` and remove this one (`ghoststore rm`), or bring the whole store to "
        "a local folder with the tool of your provider, repair it there, and bring it back",
    )
    store = Store.examined(options.store)
    parts, runs = store.chosen(options.part, options.run)
    mended, unmended = restore_groups(store), list[Unmended]()
    owners: list[Owner] = [*({"part": name} for name in parts), *({"run": name} for name in runs)]
    for owner in owners:
        work = _Repair(store, owner, options, progress)
        unmended += work.run()
        mended += work.mended
    return RepairReport(store=str(options.store), parts=parts, runs=runs, mended=mended, unmended=unmended)


class _Repair:
    """The repair of one part or run."""

    def __init__(self, store: Store, owner: Owner, options: RepairOptions, progress: Progress) -> None:
        self._store, self._owner, self._options, self._progress = store, owner, options, progress
        self.mended: list[Mended] = []
        self._why: dict[str, str] = {}
        """For each file the reason why it cannot be mended."""

    def run(self) -> list[Unmended]:
        """Mend what can be mended, and return the damage that is left."""
        of_part = "part" in self._owner
        name = self._owner["part" if of_part else "run"]
        path = self._store.part_path(name) if of_part else self._store.run_path(name)
        kind: type[Spanned[Any]] = Part if of_part else Run
        if any(links_below(path)):
            return self._left("put the files themselves in place of links: nothing is written where one leads")
        if any((path / JOURNAL).glob("*.log/[0-9]*")):
            return self._left(
                "a journal is a folder here, as in the object store that it comes from. Remove this copy and bring the "
                f"run with `ghoststore cp --store ADDRESS --run {name} --to-store {self._store.path}`, which makes a "
                "file of it"
            )
        self.mended += restore_opening(kind, path, self._owner)
        try:
            source = kind(path)
        except CorruptError:
            return self._left(
                "its own metadata say what it is, and cannot be made again: copy them, or all of it, back"
            )
        except MismatchError as error:
            return [Unmended(file="zarr.json", problem=str(error), why="it is left alone", **self._owner)]
        try:
            check_writable(path)
        except StorageError:
            if self._damage():
                raise
            return []  # a disk that is read-only, and nothing to write
        lost = lost_spans(source)
        with writing(source, None):
            for span in lost:
                if commit_path(source.path, span).exists():  # its intent was still there
                    self.mended.append(Mended(file=record_name(span), how="restored from its intent", **self._owner))
            damaged = [damage.file for damage in self._damage()]
            self.mended += [made for name in damaged for made in make_way(path, name, self._owner)]
            source = kind(path)
            if isinstance(source, Part) and damaged:
                self._mend_part(source, damaged)
            elif isinstance(source, Run) and damaged:
                self._mend_run(source, damaged)
            left = self._left("see `ghoststore verify`") if damaged else []
            source = kind(path)
            self._forget(source, damaged_spans(source, [unmended.file for unmended in left]))
        return left

    def _damage(self) -> list[Damage]:
        examination = Examination(self._store, self._progress)
        examination.check(self._owner)
        return examination.report([], []).damage

    def _left(self, otherwise: str) -> list[Unmended]:
        """The damage that there is now, each with the reason why it is not mended (default: ``otherwise``)."""
        return [
            Unmended(
                file=damage.file,
                problem=damage.problem,
                part=damage.part,
                run=damage.run,
                why=self._why.get(damage.file, otherwise),
            )
            for damage in self._damage()
        ]

    def _forget(self, source: Spanned[Any], damaged: set[int]) -> None:
        """Remove the files of withdrawn spans that are committed again, and sound."""
        for span in set(withdrawn_spans(source)).intersection(source.spans) - damaged:
            forget(source, span)

    def _mend_part(self, part: Part, damaged: list[str]) -> None:
        restored = restore_metadata(part, damaged, self._owner)
        self.mended += [*restored, *drop_caches(part, damaged, self._owner)]
        spans = damaged_spans(part, damaged)
        of_layout = {"commits", *(spec.name for spec in part.layout.arrays())}
        left = [name for name in damaged if name in part.files and name not in {made.file for made in restored}]
        # Metadata among them: of an array whose one chunk is gone, they follow from the numbers alone.
        fixed = [name for name in left if name.partition("/")[0] not in of_layout]
        if not spans and not fixed:
            return
        try:
            self._compute(part, spans, fixed)
        except (BusyError, StorageError):
            raise
        except (
            GhostStoreError
        ) as error:  # such as a missing checkpoint: records may still be restored from sound chunks
            why = f"it cannot be computed again ({error})"
            keys = [key for span in spans for key in (record_name(span), *part.layout.span_keys(span))]
            self._why.update(dict.fromkeys([*damaged, *keys], why))
            self._restore_records(part, spans, why)

    def _mend_run(self, run: Run, damaged: list[str]) -> None:
        self.mended += restore_metadata(run, damaged, self._owner)
        spans = damaged_spans(run, damaged)
        for span in rebuild_from_journals(run, spans):
            self.mended.append(Mended(file=record_name(span), how="rebuilt from its journal", **self._owner))
            spans.discard(span)
        lost = "cannot be computed again; `drop_damaged` takes"
        for span in sorted(spans):
            start, stop = run.layout.span_of(span)
            why = f"steps {start + 1} to {stop} of run {run.name!r} {lost} them out, so that the others open"
            self._why.update(dict.fromkeys([record_name(span), *run.layout.span_keys(span)], why))
        self._restore_records(run, spans, None)
        for name in damaged:
            if name.startswith("journal/"):
                self._why[name] = (
                    f"steps of run {run.name!r} {lost} those that are damaged out, so that the others open"
                )
        if self._options.drop_damaged:
            self._drop_damaged(run)
        for name in damaged:
            if name in run.files and not name.endswith("zarr.json"):
                self._why[name] = "the table of rows was written when the run was made, and cannot be made again"

    def _drop_damaged(self, run: Run) -> None:
        """Take the spans out that are still damaged, and of the journals what is."""
        dropped = sorted(damaged_spans(run, [damage.file for damage in self._damage()]))
        with storage_errors(str(run.path)):
            for span in dropped:
                withdraw(run, span)
            lost = drop_damaged_steps(Run(run.path))
        # A journal may have been beside the record, with some of the steps.
        rest, spans = Run(run.path).ranges, list(map(run.layout.span_of, dropped))
        gone = [(record_name(s), steps) for s in dropped for steps in without([run.layout.span_of(s)], rest)]
        gone += [(file, steps) for file, steps in lost if not inside(spans, steps)]
        for file, (start, stop) in gone:
            how = f"taken out: steps {start + 1} to {stop} are lost"
            self.mended.append(Mended(file=file, how=how, **self._owner))

    def _restore_records(self, source: Spanned[Any], spans: Iterable[int], why: str | None) -> None:
        """Records that are damaged or lost, of spans whose chunks all hold. Where they do not, what a repair that was
        killed had taken out of the span is put back: it is as it was then.
        """
        back = []
        for span in self._without_records(source, spans, why):
            with storage_errors(str(source.path)):
                if put_back(source, span):
                    back.append(span)
        for span in back:
            how = "put back: a repair that was cut short had taken it out"
            self.mended.append(Mended(file=record_name(span), how=how, **self._owner))
        self._without_records(source, back, why)

    def _without_records(self, source: Spanned[Any], spans: Iterable[int], why: str | None) -> list[int]:
        """Restore the records that are damaged or lost of ``spans``; those for which that cannot be done."""
        sound, left = set(), []
        for span in spans:
            try:
                read_commit(source.path, span)
            except CorruptError:
                continue
            sound.add(span)  # the record is sound, so a chunk is damaged
        for span, outcome in restore_records(source, sorted(set(spans) - sound), self._owner):
            if isinstance(outcome, Mended):
                self.mended.append(outcome)
                continue
            left.append(span)
            if why is not None:
                self._why[record_name(span)] = f"{why}; and {outcome}"
        return left

    def _compute(self, part: Part, spans: set[int], fixed: list[str]) -> None:
        """Recompute ``spans`` and the files of ``fixed`` arrays, as the build of ``part`` did."""
        if part.layout.stream is not None:
            raise UsageError(
                f"part {part.name!r} was built from a stream, which is read once, in order. Bring a sound copy of the "
                "part back, or build it again under another `name` and remove this one (`ghoststore rm`)"
            )
        options = self._build_options(part, learn=bool(fixed))
        with open_inputs(options, self._progress, repaired=part) as inputs:
            learned = [name for name in fixed if name.partition("/")[0] != SPAN_TABLE]
            job = plan_job(replace(inputs, existing=None, repairing=False) if learned else inputs, self._progress)
            if fixed:
                self._restore_fixed(part, job, fixed)
            refuse_other_build(part, job, self._progress)
            before = {span: _read(part, span) for span in spans}
            for span in sorted(spans):
                with storage_errors(str(part.path)):
                    withdraw(part, span)
            compute_spans(Part(part.path), job, self._progress, spans, "rebuilding")
        for span in sorted(spans):
            stored = before[span]
            changed = stored is not None and read_commit(part.path, span).files != stored.files
            how = "rebuilt, with other last bits than before: on other hardware or software" if changed else "rebuilt"
            self.mended.append(Mended(file=record_name(span), how=how, **self._owner))

    def _restore_fixed(self, part: Part, job: BuildJob, names: list[str]) -> None:
        """Restore files of arrays that are written when a part is made, if ``job`` has the same numbers."""
        values = {SPAN_TABLE: job.plan.table, **job.fixed()}
        with TemporaryDirectory(prefix="ghoststore-") as folder:
            group = zarr.create_group(folder)
            for name, array in values.items():
                create_fixed(group, name, array)[...] = array
            for name in names:
                path = Path(folder) / name
                if path.is_file() and FileRecord.of(path).sha256 == part.files[name]:
                    with storage_errors(str(part.path / name)):
                        (part.path / name).parent.mkdir(parents=True, exist_ok=True)
                        replace_file(part.path / name, path.read_bytes())
                    self.mended.append(Mended(file=name, how="restored", **self._owner))

    def _build_options(self, part: Part, *, learn: bool) -> BuildOptions:
        """The options that the part was built with, and the paths that the user gave."""
        manifest, user_options, whose = part.manifest, self._options, f"part {part.name!r}"
        checkpoint = source_path(manifest, "checkpoint", whose, "checkpoint", user_options.checkpoint)
        data = source_path(manifest, "data", whose, "data", user_options.data)
        if checkpoint is None or data is None:
            raise UsageError(
                f"{whose} was built on standard input or on what is in memory, which cannot be read again: give `data` "
                "(and `checkpoint`, if that was in memory), the same as then"
            )
        base, use = adapter_as_built(part, checkpoint, user_options.base, self._progress)
        return BuildOptions(
            checkpoint=checkpoint,
            base=base,
            adapter=use,
            tokenizer=source_path(manifest, "tokenizer", whose, "tokenizer", user_options.tokenizer),
            data=data,
            store=part.path.parent.parent,
            name=part.name,
            skip_samples=manifest["corpus"].get("skip_samples", 0),
            max_samples=manifest["corpus"]["max_samples"],
            like=manifest["source"]["like"]["part"] if learn and "like" in manifest["source"] else None,
            optimizer_state=manifest["source"]["optimizer_state"] if learn and is_own(manifest) else None,
            device=user_options.device,
            **settings_as_built(part),
        )


def _read(part: Part, span: int) -> Commit | None:
    """The commit record of a span; None if it is damaged or lost."""
    try:
        return read_commit(part.path, span) if commit_path(part.path, span).exists() else None
    except CorruptError:
        return None
