"""A store and a model of it, driven through anything: builds (killed, refused), a second writer, readers, questions,
indexes, damage, verify, repair, gc. The model knows which spans are committed, and which files were harmed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import ghoststore
from ghoststore.cli import COMMANDS
from ghoststore.errors import CorruptError, GhostStoreError, MismatchError, UsageError
from tests.support.damage_walk import named
from tests.support.fault_commands import ALL, WRITING
from tests.support.faulting import ROWS, UNFINISHED, BrokenPromise, Faults, files_of
from tests.support.harms import CHANGES, Harm, delete
from tests.support.shim import ERRORS, Fault

SPAN_ROWS = 5
SPANS = math.ceil(ROWS / SPAN_ROWS)
faults_of_builds = st.one_of(
    st.none(),
    st.builds(
        Fault,
        act=st.sampled_from(("kill", "kill", *ERRORS, "short")),
        number=st.integers(1, 1000),
        when=st.sampled_from(("before", "after")),
        lasting=st.booleans(),
    ),
)
HARMS: list[Harm] = [*CHANGES, delete]


def span_of(name: str) -> int | None:
    """The span whose record ``name`` is."""
    stem = name.rpartition("commits/")[2]
    return int(stem[:8]) if "/commits/" in name and stem[:8].isdigit() else None


class StoreMachine(RuleBasedStateMachine):
    """``faults`` is set by whoever runs it. ``tried`` counts what was done, by rule."""

    faults: ClassVar[Faults]
    tried: ClassVar[dict[str, int]] = {}

    @initialize()
    def begin(self) -> None:
        self.whole, self.answer = self.faults.reference("build").after, whole_answer(self.faults)
        self.folder = self.faults.folder / "cases" / "machine"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.store = self.folder / "store"
        self.part = self.store / "parts" / "part"
        self.committed: set[int] = set()
        self.harmed: dict[str, bytes] = {}
        self.second: int | None = None
        self.reader: tuple[Any, list[int]] | None = None

    def count(self, what: str) -> None:
        self.tried[what] = self.tried.get(what, 0) + 1

    def look(self) -> None:
        """See which spans are committed: none that was is gone."""
        records = {span_of(f"/{path.parent.name}/{path.name}") for path in self.part.glob("commits/0*.json")}
        there = {span for span in records if span is not None}
        lost = {span for span in self.committed - there if self.record(span) not in self.harmed}
        if lost:
            raise BrokenPromise(1, f"the records of spans {sorted(lost)} are gone")
        self.committed |= there

    @staticmethod
    def record(span: int) -> str:
        return f"store/parts/part/commits/{span:08d}.json"

    @rule(fault=faults_of_builds)
    def build(self, fault: Fault | None) -> None:
        self.count("build")
        order = {} if fault is None else {"shim": fault.settings(self.folder, self.counter())}
        outcome = self.faults.run(WRITING["build"], self.folder, **order)
        allowed = {0}
        if fault is not None:
            allowed |= {-9} if fault.act == "kill" else {6}
        if self.second is not None:
            allowed |= {5}
        if self.harmed:
            allowed |= {3, 4}
        if outcome.code not in allowed or "Traceback" in outcome.err:
            raise BrokenPromise(1, f"build, {fault}: exit code {outcome.code}: {outcome.err[-600:]}")
        self.forget_mended()
        self.look()
        if outcome.code == 0 and not self.harmed:
            assert self.committed == set(range(SPANS)), self.committed

    def counter(self) -> Path:
        path = self.faults.folder / "count-machine"
        path.unlink(missing_ok=True)
        return path

    def forget_mended(self) -> None:
        """A build may make again what is gone; it is then as it was."""
        now = files_of(self.folder)
        for name in [name for name, data in self.harmed.items() if now.get(name) == data]:
            del self.harmed[name]

    @precondition(lambda self: self.second is None and not self.harmed)
    @rule(number=st.integers(1, 1000))
    def second_writer(self, number: int) -> None:
        self.count("second writer")
        words = self.faults.words(WRITING["build"], self.folder)
        shim = Fault("stop", number).settings(self.folder, self.counter())
        pid = self.faults.lab.start(*words, shim=shim)
        if self.faults.lab.stops(pid):
            self.second = pid
        else:
            assert self.faults.lab.wait(pid).code == 0
        self.look()

    @precondition(lambda self: self.second is not None)
    @rule()
    def second_goes_on(self) -> None:
        assert self.second is not None
        os.kill(self.second, signal.SIGCONT)
        outcome, self.second = self.faults.lab.wait(self.second), None
        allowed = {0, 5} | ({4} if self.harmed else set())
        if outcome.code not in allowed:
            raise BrokenPromise(3, f"the second writer: exit code {outcome.code}: {outcome.err[-600:]}")
        self.forget_mended()
        self.look()

    @rule()
    def query(self) -> None:
        self.count("query")
        ask = {"val_set": self.faults.inputs / "val.jsonl", "top_k": 99, "max_samples": 2, "device": "cpu"}
        try:
            hits = ghoststore.query(store=self.store, **ask).results[0].hits
        except CorruptError:
            if not self.harmed:
                raise BrokenPromise(5, "a query of a whole store says that it is damaged") from None
            return
        except (UsageError, MismatchError):
            if self.committed and not self.harmed:
                raise
            return
        if not all(math.isfinite(hit.score) for hit in hits):
            raise BrokenPromise(8, "a score is not finite")
        rows = {row for span in self.committed for row in range(span * SPAN_ROWS, min((span + 1) * SPAN_ROWS, ROWS))}
        wrong = {hit.source_row: hit.score for hit in hits if abs(hit.score - self.answer[hit.source_row]) > 1e-6}
        if {hit.source_row for hit in hits} != rows or wrong:
            promise = 5 if self.harmed else 10
            raise BrokenPromise(promise, f"a query gives rows {[hit.source_row for hit in hits]} of {rows}; {wrong}")

    @precondition(lambda self: self.committed and not self.harmed)
    @rule(fault=faults_of_builds)
    def index(self, fault: Fault | None) -> None:
        self.count("index")
        order = {} if fault is None else {"shim": fault.settings(self.folder, self.counter())}
        outcome = self.faults.run(ALL["index"], self.folder, **order)
        allowed = {0} if fault is None else {0, -9} if fault.act == "kill" else {0, 6}
        if outcome.code not in allowed | ({5} if self.second is not None else set()):
            raise BrokenPromise(4, f"index, {fault}: exit code {outcome.code}: {outcome.err[-600:]}")

    @precondition(lambda self: self.committed and self.second is None)
    @rule(place=st.integers(0, 10_000), harm=st.sampled_from(HARMS))
    def corrupt(self, place: int, harm: Harm) -> None:
        names = [f"store/{name}" for name in files_of(self.store) if not UNFINISHED.search(name)]
        name = names[place % len(names)]
        path = self.folder / name
        span = span_of(name)
        if harm is delete and (span == max(self.committed) or "/index/" in name or not self.is_committed(name)):
            # What no record names does not exist; nobody can know of a last record, or of an index, that is gone.
            return
        if name in self.harmed or not (self.is_committed(name) or "/index/" in name):
            return
        self.count("corrupt")
        self.harmed[name] = path.read_bytes()
        harm(path)

    def is_committed(self, name: str) -> bool:
        """Whether ``name`` is not a file of a span that is not committed."""
        if "/c/" not in name or "span_start" in name or name not in self.whole:
            return name in self.whole
        records = [json.loads(self.whole[self.record(span)]) for span in self.committed]
        inside = name.removeprefix("store/parts/part/")
        named_by_spans = {file for span in range(SPANS) for file in json.loads(self.whole[self.record(span)])["files"]}
        return inside not in named_by_spans or any(inside in record["files"] for record in records)

    @rule()
    def verify(self) -> None:
        self.count("verify")
        outcome = self.faults.run("verify --store {F}/store", self.folder)
        text = outcome.out + outcome.err
        if not (self.store / "zarr.json").exists() and not self.harmed:
            assert outcome.code == 2, text
            return
        if outcome.code != (4 if self.harmed else 0):
            raise BrokenPromise(5, f"verify ends with {outcome.code}; harmed: {sorted(self.harmed)}: {text[-600:]}")
        for name in self.harmed:
            hidden = any(owner != name and name.startswith(owner.removesuffix("zarr.json")) for owner in self.harmed)
            if not hidden and not named(name.removeprefix("store/"), text):
                raise BrokenPromise(5, f"verify does not name {name}: {text[-600:]}")

    @precondition(lambda self: self.harmed)
    @rule(undo=st.booleans())
    def repair(self, undo: bool) -> None:
        self.count("repair")
        if undo or "repair" not in COMMANDS:
            for name, data in self.harmed.items():
                (self.folder / name).write_bytes(data)
        else:
            outcome = self.faults.run(ALL["repair"], self.folder)
            if outcome.code == 4 and "store/parts/part/zarr.json" in self.harmed:
                return  # nothing else says what the part is made of
            if outcome.code != 0:
                raise BrokenPromise(5, f"repair of {sorted(self.harmed)}: exit {outcome.code}: {outcome.err[-600:]}")
            now = files_of(self.folder)
            other = [name for name in self.harmed if now.get(name) != self.harmed[name] and "/index/" not in name]
            if other:
                raise BrokenPromise(5, f"repair made other bytes of {other}")
        self.harmed = {}
        self.look()

    @precondition(lambda self: "gc" in COMMANDS and not self.harmed and (self.store / "zarr.json").exists())
    @rule()
    def gc(self) -> None:
        self.count("gc")
        before = self.named_files()
        outcome = self.faults.run(ALL["gc"], self.folder)
        assert outcome.code in {0, 5}, outcome.err
        if self.named_files() != before:
            raise BrokenPromise(1, "gc removed what a record names")
        self.look()

    def named_files(self) -> dict[str, bytes]:
        return {name: data for name, data in files_of(self.folder).items() if self.is_committed(name)}

    @precondition(lambda self: self.committed and not self.harmed)
    @rule()
    def open_reader(self) -> None:
        part = ghoststore.Store.open(self.store).part()
        self.reader = (part, list(part.spans))

    @precondition(lambda self: self.reader is not None)
    @rule()
    def read(self) -> None:
        """What a reader opened stays what it was, whatever was built since."""
        self.count("read")
        assert self.reader is not None
        part, spans = self.reader
        assert list(part.spans) == spans
        rows = [row for span in spans for row in range(span * SPAN_ROWS, min((span + 1) * SPAN_ROWS, ROWS))]
        try:
            ids = [str(name) for name in part.read_rows("sample_id", rows)]
        except GhostStoreError:
            if not self.harmed:
                raise BrokenPromise(10, "a reader fails after others wrote") from None
            return
        if ids != [f"row-{row}" for row in rows]:
            raise BrokenPromise(10, f"a reader of rows {rows} sees {ids}")

    @invariant()
    def nothing_partial(self) -> None:
        """Files under final names are those of the undisturbed build, where nothing was harmed."""
        if not hasattr(self, "whole"):
            return
        for name, data in files_of(self.folder).items():
            if name in self.whole and name not in self.harmed and data != self.whole[name]:
                raise BrokenPromise(2, f"{name} has {len(data)} other bytes than an undisturbed build leaves there")

    def teardown(self) -> None:
        """Whatever the history, the same command ends in the same store."""
        if not hasattr(self, "whole"):
            return
        if self.second is not None:
            os.kill(self.second, signal.SIGCONT)
            self.faults.lab.wait(self.second)
        for name, data in self.harmed.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(data)
        shutil.rmtree(self.part / "index", ignore_errors=True)
        outcome = self.faults.run(WRITING["build"], self.folder)
        now = files_of(self.folder)
        different = [name for name in now.keys() | self.whole.keys() if now.get(name) != self.whole.get(name)]
        if outcome.code != 0 or different:
            raise BrokenPromise(1, f"at the end: exit code {outcome.code}, {different[:5]}: {outcome.err[-600:]}")


def whole_answer(faults: Faults) -> dict[int, float]:
    """The score of each row for the val set, by an undisturbed build."""
    if not hasattr(faults, "answer"):
        store = faults.base("store") / "store"
        ask = {"val_set": faults.inputs / "val.jsonl", "top_k": 99, "max_samples": 2, "device": "cpu"}
        hits = ghoststore.query(store=store, **ask).results[0].hits
        faults.answer = {hit.source_row: hit.score for hit in hits}
    return faults.answer
