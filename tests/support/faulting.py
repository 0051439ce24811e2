"""What must hold whatever befalls a command: struck at one call of its disk, looked at, run again, compared."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import ghoststore
from tests.support.fault_commands import ALL, TRAIN, WRITING, Command
from tests.support.harms import flip_middle
from tests.support.shim import ERRORS, WRITES, Call, Fault, build_shim, calls_of, counting

if TYPE_CHECKING:
    from tests.conftest import Lab, Outcome

Tree = dict[str, bytes]
ROWS = 12
SECONDS = 120
"""After which a command counts as hanging."""
IMPORTS = "matplotlib.figure matplotlib.backends.backend_agg pyarrow.parquet"
"""What plots and tables would import in each child."""
UNFINISHED = re.compile(r"(^|/)(\.|begun\.)|\.partial$|\.lock$")
"""Names that say that a file is not finished, or is for no reader."""


class BrokenPromise(AssertionError):
    """A promise of DESIGN 6, by its number, that did not hold."""

    def __init__(self, promise: int, text: str) -> None:
        super().__init__(f"promise {promise}: {text}")
        self.promise = promise


def files_of(folder: Path) -> Tree:
    """Every file below ``folder``, by its path in it."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        with suppress(FileNotFoundError):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def general(name: str) -> str:
    """A name without the numbers and digests in it."""
    return re.sub(r"[0-9a-f]{8,}|[0-9]+", "#", name)


def unfinished(names: Iterator[str] | Tree) -> set[str]:
    """The unfinished ones of ``names``, in general."""
    return {general(name) for name in names if UNFINISHED.search(name)}


def parses(name: str, data: bytes) -> bool:
    """Whether a file whose bytes are different each time is whole, as far as its form says."""
    try:
        if name.endswith(".json"):
            json.loads(data)
        elif name.endswith(".jsonl"):
            [json.loads(line) for line in data.splitlines()]
    except ValueError:
        return False
    return bool(data)


@dataclass
class Reference:
    """A command that nothing befell."""

    before: Tree
    after: Tree
    varying: set[str]
    """Names, in general, of what no two runs have the same."""
    calls: list[Call]
    reads: list[Call]


@dataclass(repr=False)
class Faults:
    """A laboratory of faults in an empty ``folder``; ``lab`` has the shim in its processes."""

    lab: Lab
    folder: Path
    references: dict[str, Reference] = field(default_factory=dict)
    _orders: int = 0

    def __post_init__(self) -> None:
        self.inputs.mkdir(parents=True)
        (self.inputs / "model").symlink_to(self.lab.checkpoint)
        self.lab.write(self.inputs / "corpus.jsonl", self.lab.sample_rows(ROWS))
        self.lab.write(self.inputs / "val.jsonl", self.lab.sample_rows(4, seed=9))

    @property
    def inputs(self) -> Path:
        return self.folder / "inputs"

    def words(self, command: Command | str, folder: Path) -> list[str]:
        words = command.words if isinstance(command, Command) else command.split()
        return [word.format(F=folder, I=self.inputs) for word in words]

    def run(self, command: Command | str, folder: Path, **order: object) -> Outcome:
        """``command`` in ``folder``, in a process of its own."""
        return self.lab.run(*self.words(command, folder), cwd=folder, **({"seconds": SECONDS} | order))

    def base(self, name: str) -> Path:
        """The folder that commands begin with, made once."""
        path = self.folder / "bases" / name
        if not path.exists():
            begun = path.with_name(f"{name}-begun")
            shutil.rmtree(begun, ignore_errors=True)
            begun.mkdir(parents=True)
            getattr(self, f"_{name}")(begun)
            begun.rename(path)
        return path

    def _nothing(self, folder: Path) -> None:
        pass

    def _half(self, folder: Path) -> None:
        fault = {"call": "name", "path": r"commits/00000001\.json$", "when": "before", "act": "kill"}
        outcome = self.run(ALL["build"], folder, fault=fault)
        assert outcome.code == -9, outcome.err

    def _store(self, folder: Path) -> None:
        lines = [ALL["build"].line, TRAIN, *(ALL[name].line for name in ("index", "fidelity", "query-parquet"))]
        for line in lines:
            outcome = self.run(line, folder)
            assert outcome.code == 0, outcome.err
        (folder / "hits.parquet").unlink()
        shutil.rmtree(folder / "out")

    def _damaged(self, folder: Path) -> None:
        shutil.copytree(self.base("store"), folder, dirs_exist_ok=True)
        part = folder / "store" / "parts" / "part"
        flip_middle(part / "vectors" / "c" / "0" / "0")
        (part / "sample_id" / "c" / "1").unlink()
        (part / "commits" / "00000002.json").write_bytes(b"")

    def _littered(self, folder: Path) -> None:
        """A second part, whose build was killed in the middle of a span."""
        shutil.copytree(self.base("store"), folder, dirs_exist_ok=True)
        calls = self.reference("build").calls
        fault = Fault("kill", calls[len(calls) * 4 // 5].number)
        line = ALL["build"].line.replace("--name part", "--name other")
        outcome = self.run(line, folder, shim=fault.settings(folder, self.folder / "count-litter"))
        assert outcome.code == -9, outcome.err

    def fresh(self, case: str) -> Path:
        """The case's folder, as its command finds it."""
        folder = self.folder / "cases" / case
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self.base(WRITING[case].base), folder))

    def reference(self, case: str) -> Reference:
        """What the command of ``case`` does undisturbed, and its calls; made once."""
        if case not in self.references:
            trees, logs = [], []
            for reads in (False, True):
                folder = self.fresh(case)
                before = files_of(folder)
                logs.append(self.folder / f"{case}-{reads}.log")
                outcome = self.run(WRITING[case], folder, shim=counting(folder, log=logs[-1], reads=reads))
                assert outcome.code == 0, f"{case}: {outcome.err}"
                trees.append(files_of(folder))
            one, other = trees
            varying = {general(name) for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
            self.references[case] = Reference(before, one, varying, *map(calls_of, logs))
        return self.references[case]

    def strike(self, case: str, fault: Fault) -> bool:
        """Run the command of ``case`` with ``fault`` in it; False if it ended before its turn came.

        Raises BrokenPromise for whatever is lost, partly there, or does not go on.
        """
        reference, command, folder = self.reference(case), WRITING[case], self.fresh(case)
        self._orders += 1
        count = self.folder / f"count-{self._orders % 2}"
        count.unlink(missing_ok=True)
        outcome = self.run(command, folder, shim=fault.settings(folder, count))
        struck = count.exists() and int.from_bytes(count.read_bytes(), "little") >= fault.number
        what = f"{case}, {fault} ({self._call(reference, fault)}): "
        promise = (11 if command.name == "train" else 1) if fault.act == "kill" else 4
        self._check_end(what, promise, fault, struck, outcome)
        if not (fault.reads and outcome.code == 0):  # its result says what it could not read
            self._check_partial(what, promise, case, folder)
        self.check_sound(what, promise, folder, command.base != "damaged")
        done = self.differences(case, folder) == []
        if fault.reads and outcome.code == 0 and not done:
            return struck
        if outcome.code == 0 and not done:
            raise BrokenPromise(promise, f"{what}exit 0, but {self.differences(case, folder)[:5]} differ")
        again = self.run(command, folder)
        if again.code not in ((0, 2) if done else (0,)):
            raise BrokenPromise(promise, f"{what}the same command again ends with {again.code}: {again.err[-600:]}")
        if different := self.differences(case, folder):
            raise BrokenPromise(promise, f"{what}after the same command again, {different[:5]} differ")
        self.check_sound(what, promise, folder, True)
        if not done and (left := unfinished(files_of(folder)) - unfinished(reference.after)):
            raise BrokenPromise(promise, f"{what}the same command again leaves {sorted(left)[:5]} behind")
        return struck

    def _call(self, reference: Reference, fault: Fault) -> str:
        calls = reference.reads if fault.reads else reference.calls
        call = next((call for call in calls if call.number == fault.number), None)
        return f"{call.name} {call.path.replace(str(self.folder), '')}" if call else "?"

    def _check_end(self, what: str, promise: int, fault: Fault, struck: bool, outcome: Outcome) -> None:
        if "Traceback" in outcome.err:
            raise BrokenPromise(promise, f"{what}a traceback: …{outcome.err[-600:]}")
        if outcome.code == -14:
            raise BrokenPromise(promise, f"{what}it did not end in {SECONDS} s")
        if fault.act == "kill":
            # A worker may be killed: its parent says so.
            wrong = outcome.code == 0 if struck else outcome.code != 0
        else:
            wrong = outcome.code not in ((0, 4, 6) if fault.reads else (0, 6))
        if wrong:
            raise BrokenPromise(promise, f"{what}exit code {outcome.code}: {outcome.err[-600:]}")

    def _check_partial(self, what: str, promise: int, case: str, folder: Path) -> None:
        reference, passing = self.reference(case), re.compile(WRITING[case].passing)
        now = files_of(folder)
        for name, data in now.items():
            if UNFINISHED.search(name) or passing.search(name):
                continue
            whole = [tree[name] for tree in (reference.before, reference.after) if name in tree]
            if data in whole or (general(name) in reference.varying and parses(name, data)):
                continue
            raise BrokenPromise(2, f"{what}{name} has {len(data)} bytes that no finished command leaves there")
        if WRITING[case].base == "damaged":  # a repair takes the files of a span away before it makes them again
            return
        for name in reference.before.keys() & reference.after.keys() - now.keys():
            if not (UNFINISHED.search(name) or passing.search(name)):
                raise BrokenPromise(promise, f"{what}{name}, which was there before, is gone")

    def check_sound(self, what: str, promise: int, folder: Path, wanted: bool) -> None:
        if not (folder / "store" / "zarr.json").exists():
            return
        report = ghoststore.verify(folder / "store")
        if wanted and not report.sound:
            raise BrokenPromise(promise, f"{what}verify: {report.damage[:3]}")

    def differences(self, case: str, folder: Path) -> list[str]:
        """Names of what is not as the undisturbed command leaves it."""
        reference, now = self.reference(case), files_of(folder)
        different = []
        for name in sorted(now.keys() | reference.after.keys()):
            if UNFINISHED.search(name) or now.get(name) == reference.after.get(name):
                continue
            if general(name) not in reference.varying:
                different.append(name)
            elif name in reference.after and name not in now:
                names = {general(other) for other in now}
                different += [] if general(name) in names else [name]
        return different


def spread(calls: Sequence[Call], count: int | None, rng: random.Random) -> list[Call]:
    """``count`` of ``calls``, of as many kinds as there are, in a random order; all of them for None."""
    kinds: dict[str, list[Call]] = {}
    for call in rng.sample(calls, len(calls)):
        kinds.setdefault(call.kind, []).append(call)
    queues = rng.sample(list(kinds.values()), len(kinds))
    longest = max(map(len, queues), default=0)
    mixed = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
    return mixed[:count]


def faults_at(call: Call, rng: random.Random) -> Iterator[Fault]:
    """A kill before and after ``call``, and one error of the disk of each way that it may come."""
    yield Fault("kill", call.number)
    yield Fault("kill", call.number, "after")
    yield Fault(rng.choice(ERRORS), call.number, lasting=rng.random() < 0.5)
    if call.name in WRITES:
        yield Fault("short", call.number, lasting=rng.random() < 0.5)
    yield Fault(rng.choice(("EIO", "ESTALE")), call.number, "after")


def open_faults(folder: Path) -> Faults | None:
    """In an empty folder; None where there is no compiler for the shim. ``close_faults`` ends its processes."""
    from tests.conftest import open_lab

    shim = build_shim(folder)
    if shim is None:
        return None
    (folder / "lab").mkdir()
    lab = open_lab(folder / "lab", LD_PRELOAD=str(shim), ZYGOTE_IMPORTS=IMPORTS)
    return Faults(lab, folder / "faults")
