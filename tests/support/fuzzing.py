"""Hostile files: manifests and records changed and sealed again, shards, samples, random bytes.

A case lays some bytes over files of a folder; a child process with bounded memory opens what is there. It may say
whatever it likes with an error of ours, and nothing with any other.
"""

from __future__ import annotations

import base64
import copy
import gzip
import hashlib
import io
import json
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet
import zstandard
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import ghoststore
from ghoststore.errors import GhostStoreError
from ghoststore.store.base.records import json_digest
from tests.support.damage_walk import MEMORY, SECONDS, asked_of, questions, restore
from tests.support.fault_commands import WRITING

if TYPE_CHECKING:
    from tests.support.faulting import Faults

Overlay = dict[str, bytes]
"""New bytes for files of a folder, by their paths in it."""

HOSTILE: list[Any] = [
    *(0, 1, -1, 2**31, 10**9, 10**12, 2**63 - 1, 2**64, 1.5, 1e308, True, None),
    *("", "x", "../../../etc/passwd", "/dev/zero", "\x00", "\ud800", "\x1b]0;x\x07\x1b[2J", "a" * 100_000),
    *([], {}, [[]], ["x"], {"x": {}}, [0] * 10_000, {f"k{i}": i for i in range(5000)}),
    {"zip": json.loads("[" * 150 + "]" * 150)},
]
OPERATIONS = ("replace", "delete", "grow", "rename", "step", "swap")
steps = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.sampled_from(OPERATIONS), st.integers(0, len(HOSTILE) - 1)),
    min_size=1,
    max_size=3,
)
"""What is done to a JSON value: (which node, what, with which of HOSTILE)."""
byte_steps = st.lists(
    st.tuples(
        st.sampled_from(("flip", "cut", "insert", "double", "zeros", "words")),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=4,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every node."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from places(value[key])


def changed(value: Any, wanted: list[tuple[int, str, int]]) -> Any:
    """``value`` after some steps; itself untouched."""
    holder = [copy.deepcopy(value)]
    for place, operation, hostile in wanted:
        nodes = list(places(holder))
        container, key = nodes[place % len(nodes)]
        here, other = container[key], copy.deepcopy(HOSTILE[hostile])
        if operation == "delete" and container is not holder:
            del container[key]
        elif operation == "grow" and isinstance(here, list) and here:
            container[key] = here * min(10_000, 100_000 // len(json.dumps(here)) + 2)
        elif operation == "rename" and isinstance(container, dict):
            container[str(other)[:50]] = container.pop(key)
        elif operation == "step" and isinstance(here, int):
            container[key] = here + (1 if place % 2 else -1)
        elif operation == "swap":
            container, key = nodes[hostile * 7 % len(nodes)]
            container[key] = copy.deepcopy(here)
        else:
            container[key] = other
    return holder[0]


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def sealed(value: Any, key: str) -> Any:
    """``value`` with a checksum that holds."""
    if not isinstance(value, dict):
        return value
    inside = {name: entry for name, entry in value.items() if name != key}
    return {**inside, key: json_digest(inside)}


def group_sealed(value: Any) -> Any:
    """The metadata of a part or a run, whose checksums hold."""
    attributes = value.get("attributes") if isinstance(value, dict) else None
    if isinstance(attributes, dict):
        for name in ("manifest", "files"):
            if name in attributes:
                attributes[f"{name}_sha256"] = json_digest(attributes[name])
    return value


def resealed(folder: Path, file: str, value: Any) -> Overlay:
    """What makes ``file`` hold ``value`` with every checksum right."""
    pieces = file.split("/")
    owner = "/".join(pieces[:2])
    if pieces[0] in ("parts", "runs") and len(pieces) == 3 and pieces[2] == "zarr.json":
        return {file: dumped(group_sealed(value))}
    if file.endswith("/zarr.json") and len(pieces) > 3:
        data, root = dumped(value), json.loads((folder / owner / "zarr.json").read_bytes())
        files = root["attributes"]["files"]
        if (inside := "/".join(pieces[2:])) in files:
            files[inside] = hashlib.sha256(data).hexdigest()
        return {file: data, f"{owner}/zarr.json": dumped(group_sealed(root))}
    key = {"index.json": "manifest_sha256", "shards.json": "sha256"}.get(pieces[-1], "record_sha256")
    return {file: dumped(sealed(value, key))}


def overlays(folder: Path, file: str) -> st.SearchStrategy[Overlay]:
    """Cases that change one JSON file, sealed again in three of four."""
    value = json.loads((folder / file).read_bytes())

    def made(wanted: tuple[list[tuple[int, str, int]], int]) -> Overlay:
        new = changed(value, wanted[0])
        return {file: dumped(new)} if wanted[1] == 0 else resealed(folder, file, new)

    return st.tuples(steps, st.integers(0, 3)).map(made)


def mangled(data: bytes, wanted: list[tuple[str, int, bytes]]) -> bytes:
    """``data`` after some steps."""
    for operation, where, extra in wanted:
        place = where % (len(data) + 1)
        if operation == "flip" and place < len(data):
            data = data[:place] + bytes([data[place] ^ (1 << extra[0] % 8)]) + data[place + 1 :]
        elif operation == "cut":
            data = data[:place]
        elif operation == "insert":
            data = data[:place] + extra + data[place:]
        elif operation == "double":
            data = data[:place] + data[: place + len(extra) * 100] + data[place:]
        elif operation == "zeros":
            data = data[:place] + bytes(len(extra) * 500) + data[place:]
        elif operation == "words":
            word = (b'{"text":', b"\\ud800", b'"', b"\n", b"[" * 3000, b"1e999", b"\xef\xbb\xbf", b"null")[extra[0] % 8]
            data = data[:place] + word + data[place:]
    return data


def sample_files(rows: list[dict[str, Any]]) -> Overlay:
    """A small corpus in every form that is one file."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    csv = "id,text,domain\n" + "".join(f"{row['id']},{row['text']},{row['domain']}\n" for row in rows)
    return {
        "rows.jsonl": lines,
        "rows.jsonl.gz": gzip.compress(lines, mtime=0),
        "rows.jsonl.zst": zstandard.compress(lines),
        "rows.csv": csv.encode(),
        "rows.txt": "".join(row["text"] + "\n" for row in rows).encode(),
        "rows.parquet": table.getvalue(),
    }


# What the child does.


def read_store(folder: Path, overlay: list[str], val_set: Path) -> None:
    ways: dict[str, Callable[[], Any]] = {
        "info": lambda: ghoststore.info(folder).to_json(),
        "verify": lambda: ghoststore.verify(folder),
        **questions(folder, val_set),
    }
    for name in ("info", "verify", *asked_of(overlay[0])):
        try:
            ways[name]()
        except GhostStoreError:
            continue


def read_shards(folder: Path, overlay: list[str], val_set: Path) -> None:
    for verify in (False, True):
        try:
            shards = ghoststore.TokenShards.open(folder, verify=verify)
            for sample in range(min(shards.samples, 20)):
                shards.row(sample)
                shards.sample_id[sample]
        except GhostStoreError:
            continue


def read_samples(folder: Path, overlay: list[str], val_set: Path) -> None:
    try:
        for sample in ghoststore.Corpus.open(str(folder / overlay[0])).samples():
            assert isinstance(sample.id, str)
    except GhostStoreError:
        pass


READERS = {"store": read_store, "shards": read_shards, "samples": read_samples}


def read_all(kind: str, folder: str, val_set: str, cases: str) -> None:
    """Lay each case of the file ``cases`` over ``folder``, read, undo it; a line of JSON a case."""
    root = Path(folder)
    for place, case in enumerate(json.loads(Path(cases).read_text())):
        overlay = {file: base64.b64decode(data) for file, data in case.items()}
        whole = {file: (root / file).read_bytes() for file in overlay}
        print(json.dumps({"begins": place}), flush=True)  # noqa: T201 - what the parent reads
        signal.alarm(SECONDS)
        for file, data in overlay.items():
            (root / file).write_bytes(data)
        wrong = None
        try:
            READERS[kind](root, list(overlay), Path(val_set))
        except Exception:  # noqa: BLE001 - which is what is looked for
            wrong = traceback.format_exc()
        finally:
            signal.alarm(0)
            for file, data in whole.items():
                restore(root / file, data)
        print(json.dumps({"wrong": wrong}), flush=True)  # noqa: T201


def refused_in_order(faults: Faults, kind: str, folder: Path, cases: list[Overlay]) -> list[str]:
    """What is wrong when a child reads each case: other errors than ours, memory without bound, no end."""
    file = faults.folder / f"cases-{kind}.json"
    root = str(Path(__file__).resolve().parent.parent.parent)
    whole = {name: (folder / name).read_bytes() for case in cases for name in case}
    left, wrong = list(cases), []
    while left:
        encoded = [{name: base64.b64encode(data).decode() for name, data in case.items()} for case in left]
        file.write_text(json.dumps(encoded))
        code = (
            f"import sys; sys.path.insert(0, {root!r})\n"
            "from tests.support.fuzzing import read_all\n"
            f"read_all({kind!r}, {str(folder)!r}, {str(faults.inputs / 'val.jsonl')!r}, {str(file)!r})"
        )
        ended = faults.lab.run(code=code, memory=MEMORY)
        lines = [json.loads(line) for line in ended.out.splitlines() if line.startswith("{")]
        done = [line["wrong"] for line in lines if "wrong" in line]
        wrong += [f"{_shown(case)}:\n{_short(text)}" for case, text in zip(left, done, strict=False) if text]
        if len(done) == len(left):
            assert ended.code == 0, ended.err[-1000:]
            break
        wrong.append(f"{_shown(left[len(done)])}: exit code {ended.code} (-14: no end): {ended.err[-500:]}")
        for name, data in whole.items():
            restore(folder / name, data)
        left = left[len(done) + 1 :]
    return wrong


def _short(text: str) -> str:
    """The last of our own lines in a traceback, and its end."""
    lines = text.strip().splitlines()
    ours = [line for line in lines if "File" in line and "/site-packages/" not in line]
    return "\n".join([*ours[-2:], lines[-1][:500]])


def _shown(case: Overlay) -> str:
    return "; ".join(f"{name} = {data[:1500]!r}" for name, data in list(case.items())[:1])


# Cases by the number of a draw: kinds of files, and what is wrong with how they are read.


def _drawn(number: int, examples: int, size: int, case: Callable[[st.DataObject], Overlay]) -> list[list[Overlay]]:
    """Lists of ``size`` cases."""
    made: list[list[Overlay]] = []

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def draw(data: st.DataObject) -> None:
        made.append([case(data) for _ in range(size)])

    draw()
    return made


def _read(faults: Faults, kind: str, folder: Path, lists: list[list[Overlay]]) -> tuple[int, list[str]]:
    cases = [case for some in lists for case in some]
    return len(cases), refused_in_order(faults, kind, folder, cases)


def hostile_store(faults: Faults, number: int, examples: int, size: int = 20) -> tuple[int, list[str]]:
    """JSON of a store (manifests, metadata, records, caches), changed and sealed again: (cases, what is wrong)."""
    whole, folder = faults.base("store") / "store", faults.folder / "hostile-store"
    if not folder.exists():
        shutil.copytree(whole, folder)
    paths = [path.relative_to(whole).as_posix() for path in sorted(whole.rglob("*.json"))]
    names = [name for name in paths if not any(piece.startswith(".") for piece in name.split("/"))]

    def case(data: st.DataObject) -> Overlay:
        return data.draw(overlays(whole, data.draw(st.sampled_from(names))))

    return _read(faults, "store", folder, _drawn(number, examples, size, case))


def hostile_shards(faults: Faults, number: int, examples: int, size: int = 20) -> tuple[int, list[str]]:
    """Token shards: their JSON as above, arrays mangled."""
    folder = faults.folder / "hostile-shards"
    if not folder.exists():
        made = faults.fresh("tokenize")
        assert faults.run(WRITING["tokenize"], made).code == 0
        shutil.copytree(made / "shards", folder)
    names = sorted(path.relative_to(folder).as_posix() for path in [*folder.glob("*.*"), *folder.glob("commits/*")])

    def case(data: st.DataObject) -> Overlay:
        name = data.draw(st.sampled_from(names))
        if name.endswith(".json"):
            return data.draw(overlays(folder, name))
        return {name: mangled((folder / name).read_bytes(), data.draw(byte_steps))}

    return _read(faults, "shards", folder, _drawn(number, examples, size, case))


def hostile_samples(faults: Faults, number: int, examples: int, size: int = 20) -> tuple[int, list[str]]:
    """Sample files of every form, mangled."""
    rows = [json.loads(line) for line in (faults.inputs / "corpus.jsonl").read_text().splitlines()]
    files, folder = sample_files(rows), faults.folder / "hostile-samples"
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)

    def case(data: st.DataObject) -> Overlay:
        name = data.draw(st.sampled_from(sorted(files)))
        return {name: mangled(files[name], data.draw(byte_steps))}

    return _read(faults, "samples", folder, _drawn(number, examples, size, case))


HOSTILE_FILES = {"store": hostile_store, "shards": hostile_shards, "samples": hostile_samples}
