"""Harm done to every file of a store, one at a time, and what commands make of it.

Runs in a child process with bounded memory (:func:`walk`); each case has its own time. A line of JSON a case.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ghoststore
from ghoststore.errors import GhostStoreError
from tests.support.harms import Harm, delete, empty, flip_first, flip_last, flip_middle, lengthen

if TYPE_CHECKING:
    from tests.support.faulting import Faults

SECONDS = 20
"""After which a case counts as hanging."""
MEMORY = 2 << 30
"""Bytes beyond what a process has when it begins."""


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless_instead(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


HARMS: dict[str, Harm] = {
    harm.__name__: harm
    for harm in (
        *(flip_first, flip_middle, flip_last, halve, shorten, empty, lengthen, delete),
        *(folder_instead, fifo_instead, endless_instead),
    )
}
Case = tuple[str, str]
"""A file of the store and the name of its harm."""


def restore(path: Path, data: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(data)


def same_json(path: Path, whole: bytes) -> bool:
    """Whether only white space of a JSON file is other than it was: that is no damage."""
    if path.suffix != ".json" or path.is_symlink() or not path.is_file():
        return False
    try:
        return bool(json.loads(path.read_bytes()) == json.loads(whole))
    except ValueError:
        return False


def outcome(act: Callable[[], Any]) -> dict[str, Any]:
    """What came of it: ``code``, that of the command line, and ``value`` or ``error``."""
    try:
        return {"code": 0, "value": act()}
    except GhostStoreError as error:
        return {"code": error.exit_code, "error": str(error)}
    except Exception as error:  # noqa: BLE001 - which is what is looked for
        return {"code": 1, "error": f"{type(error).__name__}: {error}"}


def verified(store: Path) -> dict[str, Any]:
    report = outcome(lambda: ghoststore.verify(store).to_json())
    if report["code"] == 0:
        damage = report["value"]["damage"]
        report = {
            "code": 4 if damage else 0,
            "error": "\n".join(f"{each['file']}: {each['problem']}" for each in damage),
        }
    return report


def questions(store: Path, val_set: Path) -> dict[str, Callable[[], Any]]:
    """Ways of reading a store, by name; each gives plain JSON."""
    ask = {"store": store, "val_set": val_set, "top_k": 99, "max_samples": 2, "device": "cpu"}

    def query(**options: Any) -> Any:
        results = ghoststore.query(**ask, **options).results
        return [[[hit.id, hit.source_row, hit.domain, hit.text, hit.score] for hit in each.hits] for each in results]

    def scores(**options: Any) -> Any:
        result = ghoststore.scores(store=store, top_k=99, **options)
        return [[hit.id, hit.source_row, hit.value, hit.times] for hit in result.hits]

    return {
        "query": query,
        "ann": lambda: query(index="ann"),
        "second-moment": lambda: query(precondition="second-moment"),
        "scores": scores,
    }


def asked_of(file: str) -> list[str]:
    """The questions whose answer may read ``file``."""
    if file.startswith("runs/"):
        return ["scores"]
    if not file.startswith("parts/part/"):
        return ["query", "scores"]
    inside = file.split("/")[2]
    return {"index": ["ann"], "second_moment": ["second-moment"]}.get(inside, ["query"])


def walk(store: str, val_set: str, cases: list[Case]) -> None:
    """Do the harm of each case, ask, undo it."""
    for file, harm in cases:
        path = Path(store) / file
        whole = path.read_bytes()
        print(json.dumps({"begins": [file, harm]}), flush=True)  # noqa: T201 - what the parent reads
        signal.alarm(SECONDS)
        HARMS[harm](path)
        try:
            found = {"case": [file, harm], "verify": verified(Path(store)), "same": same_json(path, whole)}
            ways = questions(Path(store), Path(val_set))
            found["answers"] = {name: outcome(ways[name]) for name in asked_of(file)}
        finally:
            signal.alarm(0)
            restore(path, whole)
        print(json.dumps(found), flush=True)  # noqa: T201


def named(file: str, text: str) -> bool:
    """Whether a message names ``file``: by its path in the part or run, or by its array."""
    inside = "/".join(file.split("/")[2:]) if file.split("/")[0] in ("parts", "runs") and file.count("/") > 1 else file
    array = inside.removesuffix("/zarr.json")
    return inside in text or (array != inside and array in text)


def unknowable(store: Path, file: str, harm: str) -> bool:
    """Whether nobody can tell that ``file`` is gone: a cache by its record, or the last span that is committed."""
    path = store / file
    if harm != "delete":
        return False
    if file.split("/")[2:3] in (["index"], ["second_moment"], ["fidelity"]):
        return path.suffix == ".json"
    return path.parent.name == "commits" and path == max(path.parent.glob("0*.json"), default=None)


def broken(case: Case, found: dict[str, Any], sound: dict[str, Any], *, optional: bool) -> list[str]:
    """What is wrong with the outcome of a case; ``sound`` are the answers of the whole store, ``optional`` says that
    nobody can know of the harm.
    """
    file, harm = case
    wrong = []
    verdict = found["verify"]
    if optional:
        codes = {answer["code"] for answer in found["answers"].values()}
        return [] if verdict["code"] in (0, 4) and codes <= {0, 2, 4} else [f"{file}, {harm}: {found}"]
    if found["same"] and verdict["code"] == 0:
        pass
    elif verdict["code"] != 4:
        wrong.append(f"verify ends with {verdict['code']}: {verdict.get('error', '')[:300]}")
    elif not named(file, verdict["error"]):
        wrong.append(f"verify does not name it: {verdict['error'][:300]}")
    for name, answer in found["answers"].items():
        if answer["code"] == 0 and answer["value"] != sound[name]["value"]:
            wrong.append(f"{name} gives another answer")
        elif answer["code"] not in (0, 4):
            wrong.append(f"{name} ends with {answer['code']}: {answer['error'][:300]}")
    return [f"{file}, {harm}: {text}" for text in wrong]


def walk_in_children(faults: Faults, store: Path, cases: list[Case]) -> tuple[int, list[str]]:
    """Cases tried, and what is wrong, of ``store`` (which is as before at the end).

    A child that dies or hangs is one more thing that is wrong; the next goes on behind its case.
    """
    val_set = faults.inputs / "val.jsonl"
    ways = questions(store, val_set)
    sound = {name: json.loads(json.dumps(outcome(way))) for name, way in ways.items()}
    assert all(answer["code"] == 0 for answer in sound.values()), sound
    left, wrong, tried = list(cases), [], 0
    root = str(Path(__file__).resolve().parent.parent.parent)
    while left:
        code = (
            f"import sys; sys.path.insert(0, {root!r})\n"
            "from tests.support.damage_walk import walk\n"
            f"walk({str(store)!r}, {str(val_set)!r}, {left!r})"
        )
        whole = {file: (store / file).read_bytes() for file, _ in left}
        ended = faults.lab.run(code=code, memory=MEMORY)
        lines = [json.loads(line) for line in ended.out.splitlines() if line.startswith("{")]
        for found in [line for line in lines if "case" in line]:
            file, harm = found["case"]
            wrong += broken((file, harm), found, sound, optional=unknowable(store, file, harm))
        done = sum("case" in line for line in lines)
        tried += done
        if ended.code == 0 and done == len(left):
            break
        if done == len(left):
            raise AssertionError(f"{ended.code}: {ended.err[-1000:]}")
        file, harm = left[done]
        said = {-14: f"it did not end in {SECONDS} s"}.get(ended.code, f"exit code {ended.code}: {ended.err[-500:]}")
        wrong.append(f"{file}, {harm}: {said}")
        restore(store / file, whole[file])
        tried, left = tried + 1, left[done + 1 :]
    return tried, wrong
