"""What the soak does: campaigns of steps, each of which tries promises of DESIGN 6."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

import ghoststore
from ghoststore.store import Store
from tests.support.damage_walk import HARMS, walk_in_children
from tests.support.fault_commands import ALL, BUILD, WRITING
from tests.support.faulting import UNFINISHED, BrokenPromise, Faults, faults_at, files_of, spread
from tests.support.frozen import decoded, digest
from tests.support.fuzzing import HOSTILE_FILES
from tests.support.racing import RACES, overtaken, together
from tests.support.shim import ERRORS, Fault, counting
from tests.support.store_machine import StoreMachine

FROZEN = Path(__file__).resolve().parent.parent / "data" / "format1"
LENIENT = list(HealthCheck)


@dataclass(frozen=True)
class Step:
    """Some cases at once."""

    name: str
    promise: int
    """The one that is lost when anything else goes wrong."""
    act: Callable[[], dict[int, int]]
    """Promises and how often they were tried; raises where one was lost."""
    cases: int = 1


Steps = Callable[[Faults, random.Random, int, int], Iterator[Step]]


@dataclass(frozen=True)
class Campaign:
    """Steps of one kind. ``steps(faults, rng, worker, workers)``: every worker draws the same and does its share."""

    what: str
    share: float
    """Of the time."""
    steps: Steps


def _mixed(queues: dict[str, Iterator[Fault]]) -> Iterator[tuple[str, Fault]]:
    """One of each queue in turn, until all are empty."""
    while queues:
        for case in list(queues):
            fault = next(queues[case], None)
            if fault is None:
                del queues[case]
            else:
                yield case, fault


def _every_way(faults: Faults, case: str, rng: random.Random) -> Iterator[Fault]:
    """One way of every call before another way of any, and calls of other kinds first."""
    calls = spread(faults.reference(case).calls, None, rng)
    ways = [list(faults_at(call, rng)) for call in calls]
    for some in ways:
        rng.shuffle(some)
    for turn in range(max(map(len, ways), default=0)):
        yield from (some[turn] for some in ways if turn < len(some))


def strikes(faults: Faults, rng: random.Random, worker: int, workers: int) -> Iterator[Step]:
    """Every call of every command, killed, refused, cut short."""
    cases = rng.sample(list(WRITING), len(WRITING))
    queues = {case: _every_way(faults, case, random.Random(f"{case} {rng.random()}")) for case in cases}
    for place, (case, fault) in enumerate(_mixed(queues)):
        if place % workers == worker:
            yield Step(f"{case}, {fault}", _promise(case, fault), partial(_strike, faults, case, fault))


def _promise(case: str, fault: Fault) -> int:
    return 4 if fault.act != "kill" else 11 if case == "train" else 1


def _strike(faults: Faults, case: str, fault: Fault) -> dict[int, int]:
    struck = faults.strike(case, fault)
    return {_promise(case, fault): 1, 2: 1} if struck else {}


def _every_read(faults: Faults, case: str, rng: random.Random) -> Iterator[Fault]:
    for call in spread(faults.reference(case).reads, None, rng):
        yield Fault(rng.choice(("EIO", "ESTALE", "EACCES")), call.number, reads=True)


def reads(faults: Faults, rng: random.Random, worker: int, workers: int) -> Iterator[Step]:
    """Files of a store that cannot be read."""
    cases = [case for case, command in WRITING.items() if command.base == "store" and not command.heavy]
    queues = {case: _every_read(faults, case, random.Random(f"{case} {rng.random()}")) for case in cases}
    for place, (case, fault) in enumerate(_mixed(queues)):
        if place % workers == worker:
            yield Step(f"{case}, {fault}", 4, partial(_strike, faults, case, fault))


def every_file(faults: Faults, rng: random.Random, worker: int, workers: int) -> Iterator[Step]:
    """Every harm to every file of a store."""
    store = Path(shutil.copytree(faults.base("store") / "store", faults.folder / "harmed"))
    files = [name for name in files_of(store) if not UNFINISHED.search(name)]
    cases = [(name, harm) for name in files for harm in HARMS]
    rng.shuffle(cases)
    for start in range(worker * 20, len(cases), workers * 20):
        some = cases[start : start + 20]
        yield Step(f"harms {start}", 5, partial(_harm, faults, store, some), len(some))


def _harm(faults: Faults, store: Path, cases: list[tuple[str, str]]) -> dict[int, int]:
    tried, wrong = walk_in_children(faults, store, cases)
    if wrong:
        raise BrokenPromise(5, "\n".join(wrong))
    return {5: tried}


def histories(faults: Faults, rng: random.Random, worker: int, workers: int) -> Iterator[Step]:
    """Long histories of one store, against the model."""
    StoreMachine.faults = faults
    longer = settings(
        max_examples=3,
        stateful_step_count=25,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=LENIENT,
        print_blob=False,
    )
    first = rng.randrange(1 << 30)
    for number in range(first + worker, 1 << 32, workers):
        yield Step(f"histories {number}", 1, partial(_history, longer, number), 3)


def _history(longer: settings, number: int) -> dict[int, int]:
    StoreMachine.tried = {}
    StoreMachine._hypothesis_internal_use_seed = number  # type: ignore[attr-defined]
    run_state_machine_as_test(StoreMachine, settings=longer)
    done = StoreMachine.tried
    promises = {1: ("build",), 3: ("second writer",), 5: ("corrupt", "verify", "repair"), 8: ("query",), 10: ("read",)}
    return {promise: sum(done.get(name, 0) for name in names) for promise, names in promises.items()}


def hostile(faults: Faults, rng: random.Random, worker: int, workers: int) -> Iterator[Step]:
    """Manifests, records, shards and sample files, changed and sealed again, or at random."""
    kinds, first = list(HOSTILE_FILES), rng.randrange(1 << 30)
    for number in range(first + worker, 1 << 32, workers):
        kind = kinds[number % len(kinds)]
        yield Step(f"{kind} {number}", 9, partial(_hostile, faults, kind, number), 60)


def _hostile(faults: Faults, kind: str, number: int) -> dict[int, int]:
    tried, wrong = HOSTILE_FILES[kind](faults, number, 3)
    if wrong:
        raise BrokenPromise(9, "\n\n".join(wrong))
    return {9: tried}


def races(faults: Faults, rng: random.Random, worker: int, workers: int) -> Iterator[Step]:
    """Two at once with flock disabled: side by side, and one overtaken at every call."""
    cases = [case for case in RACES if case in WRITING]
    queues = {case: spread(faults.reference(case).calls, None, rng) for case in cases}
    place = 0
    for turn in range(max(map(len, queues.values()))):
        for case in cases:
            place += 1
            if place % workers != worker:
                continue
            yield Step(f"{case} at once", 3, partial(_together, faults, case, 2 + turn % 2))
            if turn < len(queues[case]):
                number, bits = queues[case][turn].number, case in ("build", "build-on") and turn % 2 == 1
                yield Step(
                    f"{case} overtaken at {number}",
                    3,
                    partial(_overtaken, faults, case, number, bits),
                )


def _together(faults: Faults, case: str, processes: int) -> dict[int, int]:
    together(faults, case, processes)
    return {3: 1}


def _overtaken(faults: Faults, case: str, number: int, other_bits: bool) -> dict[int, int]:
    return {3: int(overtaken(faults, case, number, other_bits=other_bits))}


OTHERS = {
    "another checkpoint": ("--checkpoint", "model-2"),
    "another corpus": ("--data", "other.jsonl"),
    "another projection": ("--proj-seed", "5"),
    "other numbers": ("--proj-dtype", "float16"),
    "another loss": ("--loss-reduction", "sum"),
    "another length": ("--max-length", "7"),
    "another batch": ("--batch-tokens", "64"),
}


def refusals(faults: Faults, rng: random.Random, worker: int, workers: int) -> Iterator[Step]:
    """A build that is to go on with something else, and a query with another model: refused, nothing changed."""
    faults.lab.model(faults.inputs / "model-2", seed=rng.randrange(1 << 20) + 1)
    faults.lab.write(faults.inputs / "other.jsonl", faults.lab.sample_rows(12, seed=rng.randrange(1 << 20) + 1))
    while True:
        name = rng.choice(list(OTHERS))
        yield Step(name, 6, partial(_refused, faults, name))


def _refused(faults: Faults, name: str) -> dict[int, int]:
    flag, value = OTHERS[name]
    folder = faults.fresh("build-on")
    before = files_of(folder)
    value = str(faults.inputs / value) if flag in ("--checkpoint", "--data") else value
    outcome = faults.run(f"{BUILD} {flag} {value}", folder)
    changed = [
        name for name, data in before.items() if files_of(folder).get(name) != data and not UNFINISHED.search(name)
    ]
    if outcome.code != 3 or changed:
        raise BrokenPromise(6, f"build with {name}: exit code {outcome.code}, {changed}: {outcome.err[-500:]}")
    return {6: 1}


def orders(faults: Faults, rng: random.Random, worker: int, workers: int) -> Iterator[Step]:
    """Rows alone, in other batches, in another order: the same vectors to 1e-4 of their length."""
    plain = f"{BUILD} --proj-precondition none"
    folder = Path(shutil.copytree(faults.base("nothing"), faults.folder / "in-order"))
    assert faults.run(plain, folder).code == 0
    part = Store.open(folder / "store").part()
    truth = dict(zip(part.read("sample_id", 0, part.rows).tolist(), np.asarray(decoded(part)), strict=True))
    rows = [json.loads(line) for line in (faults.inputs / "corpus.jsonl").read_text().splitlines()]
    while True:
        some = rng.sample(rows, rng.randint(1, len(rows)))
        batch = rng.choice((1, 16, 64, 2048))
        yield Step(f"{len(some)} rows, {batch}", 7, partial(_reordered, faults, plain, truth, some, batch))


def _reordered(
    faults: Faults, plain: str, truth: dict[str, np.ndarray], rows: list[dict[str, object]], batch: int
) -> dict[int, int]:
    folder = faults.folder / "reordered"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    data = faults.lab.write(folder / "rows.jsonl", rows)
    outcome = faults.run(f"{plain} --data {data} --batch-tokens {batch}", folder)
    assert outcome.code == 0, outcome.err
    part = Store.open(folder / "store").part()
    for name, vector in zip(part.read("sample_id", 0, part.rows).tolist(), np.asarray(decoded(part)), strict=True):
        error = np.linalg.norm(vector - truth[name]) / np.linalg.norm(truth[name])
        if not error < 1e-4:
            raise BrokenPromise(7, f"{name} in {[row['id'] for row in rows]}, batches of {batch}: error {error}")
    return {7: len(rows)}


def trainings(faults: Faults, rng: random.Random, worker: int, workers: int) -> Iterator[Step]:
    """A store that cannot be written while a model trains: as ``--on-store-error`` says, and never other weights."""
    line = ALL["train"].line + " --on-store-error continue"
    folder = Path(shutil.copytree(faults.base("nothing"), faults.folder / "trained"))
    log = faults.folder / "trained.log"
    (folder / "store").mkdir()
    assert faults.run(line, folder, shim=counting(folder / "store", log=log)).code == 0
    calls = len(log.read_text().splitlines())
    weights = {name: data for name, data in files_of(folder / "out").items() if name.endswith("model.safetensors")}
    while True:
        fault = Fault(rng.choice(ERRORS), rng.randint(1, calls), lasting=rng.random() < 0.5)
        yield Step(str(fault), 12, partial(_trained, faults, line, weights, fault))


def _trained(faults: Faults, line: str, weights: dict[str, bytes], fault: Fault) -> dict[int, int]:
    folder = faults.folder / "training"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "store").mkdir(parents=True)
    count = faults.folder / "count-training"
    count.unlink(missing_ok=True)
    outcome = faults.run(line, folder, shim=fault.settings(folder / "store", count))
    now = files_of(folder / "out")
    different = [name for name in weights if now.get(name) != weights[name]]
    refused = outcome.code == 6 and not (folder / "store" / "runs" / "run").exists()  # before the first step
    if "Traceback" in outcome.err or not (refused or (outcome.code == 0 and not different)):
        raise BrokenPromise(12, f"{fault}: exit code {outcome.code}, {different}: {outcome.err[-600:]}")
    if (folder / "store" / "zarr.json").exists() and not ghoststore.verify(folder / "store").sound:
        raise BrokenPromise(4, f"{fault} in a training: verify finds damage")
    return {12: 1}


def formats(faults: Faults, rng: random.Random, worker: int, workers: int) -> Iterator[Step]:
    """The frozen store of each format opens, verifies and holds the same numbers."""
    while True:
        yield Step("format 1", 13, partial(_frozen, faults))


def _frozen(faults: Faults) -> dict[int, int]:
    folder = faults.folder / "frozen"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(FROZEN, folder)
    expected = json.loads((folder / "expected.json").read_text())
    report = ghoststore.verify(folder / "store")
    if not report.sound:
        raise BrokenPromise(13, f"verify of format 1: {report.damage[:3]}")
    for name, values in expected["parts"].items():
        if digest(decoded(Store.open(folder / "store").part(name))) != values["vectors"]:
            raise BrokenPromise(13, f"part {name} of format 1 has other numbers")
    return {13: 1}


CAMPAIGNS = {
    "strikes": Campaign("commands struck at a call that writes", 30, strikes),
    "reads": Campaign("commands struck at a call that reads", 6, reads),
    "files": Campaign("files of a store harmed", 16, every_file),
    "histories": Campaign("histories of up to 25 steps", 14, histories),
    "hostile": Campaign("hostile manifests, records, shards, sample files", 14, hostile),
    "races": Campaign("races without flock", 14, races),
    "refusals": Campaign("builds continued with something else", 1.5, refusals),
    "orders": Campaign("builds of other orders and batches", 1.5, orders),
    "trainings": Campaign("trainings whose store cannot be written", 2.5, trainings),
    "formats": Campaign("frozen stores opened", 0.5, formats),
}
