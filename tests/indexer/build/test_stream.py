"""A build that reads its corpus once, in order: the vectors of an ordinary build, resumed without reading again what was
read, and an ordinary part once the end is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.store import Part, Store
from tests.conftest import sample_rows, tree, write_jsonl
from tests.support.notes import Notes
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

PLAIN = ProjectionConfig(precondition="none", rank_total=64)
SPAN = 4
ROWS = sample_rows(42, seed=3)


def build(lab: Lab, store: Path, data: Any, **settings: Any) -> ghoststore.BuildReport:
    given = {"checkpoint": lab.checkpoint, "name": "part", "span_rows": SPAN, "device": "cpu", "projection": PLAIN}
    return ghoststore.build(store=store, data=data, **(given | settings))


def part_of(store: Path) -> Part:
    return Store.open(store).part("part")


class Rows:
    """Rows that may be iterated over again, and nothing more. ``read`` has the number of every row that was read."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows, self.read = list(rows), list[int]()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self.rows):
            self.read.append(number)
            yield row


class StatefulRows(Rows):
    """Rows that say where they stand."""

    at = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.at < len(self.rows):
            self.read.append(self.at)
            self.at += 1
            yield self.rows[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Cut(Exception):
    """The stream breaks off."""


class Breaking:
    """``stream``, which breaks off behind ``at`` rows."""

    def __init__(self, stream: Any, at: int) -> None:
        self.stream, self.at = stream, at

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self.stream):
            if number == self.at:
                raise Cut
            yield row

    def state_dict(self) -> Any:
        return self.stream.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.stream.load_state_dict(state)


def cut(lab: Lab, store: Path, stream: Any, at: int, **settings: Any) -> None:
    """A build that breaks off where ``at`` rows were read."""
    with pytest.raises(Cut):
        build(lab, store, Breaking(stream, at), **settings)


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, datasets.IterableDataset]:
    """Streams of `datasets`, of files on the disk."""
    folder = tmp_path_factory.mktemp("streams")
    shards = [ROWS[:15], ROWS[15:30], ROWS[30:]]
    files = [str(write_jsonl(folder / f"{place}.jsonl", shard)) for place, shard in enumerate(shards)]
    tables = []
    for place, shard in enumerate(shards):
        tables.append(str(folder / f"{place}.parquet"))
        datasets.Dataset.from_list(shard).to_parquet(tables[-1])

    def load(kind: str, data_files: list[str]) -> datasets.IterableDataset:
        return datasets.load_dataset(kind, data_files=data_files, split="train", streaming=True)

    return {
        "jsonl": load("json", files),
        "parquet": load("parquet", tables),
        "interleaved": datasets.interleave_datasets([load("json", files[:1]), load("json", files[1:])]),
        "drawn": datasets.interleave_datasets(
            [load("json", files[:2]), load("json", files[2:])], probabilities=[0.6, 0.4], seed=2
        ),
        "mapped": load("json", files)
        .map(lambda row: {"text": row["text"].upper()})
        .filter(lambda row: len(row["id"]) > 5),
        "shuffled": load("json", files).shuffle(seed=1, buffer_size=10),
    }


KINDS = ("jsonl", "parquet", "interleaved", "drawn", "mapped", "shuffled")


@pytest.mark.parametrize("kind", KINDS)
def test_the_vectors_of_an_ordinary_build(
    lab: Lab, streams: dict[str, datasets.IterableDataset], tmp_path: Path, kind: str
) -> None:
    rows = list(streams[kind])
    build(lab, tmp_path / "ordinary", rows)
    report = build(lab, tmp_path / "store", streams[kind])
    ordinary, part = part_of(tmp_path / "ordinary"), part_of(tmp_path / "store")
    assert (report.rows, report.rows_built, report.resumed_rows) == (len(rows), len(rows), 0)
    assert np.array_equal(vectors_of(part), vectors_of(ordinary))
    for name in ("sample_id", "source_row", "source_digest", "loss", "n_tokens", "status", "norm", "text"):
        same = [each.read(name, 0, len(rows)) for each in (part, ordinary)]
        assert np.array_equal(*same), name
    domains = [[each.domains[code] for code in each.column("domain")] for each in (part, ordinary)]
    assert domains[0] == domains[1]
    assert list(streams[kind]) == rows, "the stream is as it was given"
    hits = [
        ghoststore.query(store=tmp_path / store, val_set=lab.corpus, device="cpu").results[0].hits
        for store in ("store", "ordinary")
    ]
    assert hits[0] == hits[1]
    assert all(hit.text for hit in hits[0])


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_where_it_was_cut_off(
    lab: Lab, streams: dict[str, datasets.IterableDataset], tmp_path: Path, kind: str
) -> None:
    build(lab, tmp_path / "whole", streams[kind])
    cut(lab, tmp_path / "store", streams[kind], 19)
    part, notes = part_of(tmp_path / "store"), Notes()
    assert (part.rows, part.complete, part.open) == (16, False, True)
    report = build(lab, tmp_path / "store", streams[kind], progress=notes)
    assert (report.resumed_rows, report.rows_built) == (16, report.rows - 16)
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")
    assert any("read again" in note for note in notes.said) == (kind == "shuffled")
