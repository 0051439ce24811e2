"""Choosing from several parts that are ranked as one: the rows of one part of all rows, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet
import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import CorpusError, UsageError
from tests.support.corpora import write_parquet
from tests.support.selecting import listed, select

if TYPE_CHECKING:
    from tests.conftest import Lab

CUTS = (0, 16, 24, 30)
NAMES = ("first", "second", "third")


def rows_of(lab: Lab) -> list[dict[str, Any]]:
    rows = [dict(row) | {"more": place} for place, row in enumerate(lab.sample_rows(CUTS[-1], 1))]
    for place in (20, 25, 27):
        rows[place]["domain"] = "cloud"
    return rows


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def folder(request: pytest.FixtureRequest, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora of one form; a val sample is in the second."""
    folder, rows = tmp_path_factory.mktemp(request.param), rows_of(lab)
    lab.write(folder / "val.jsonl", [*lab.sample_rows(3, 3), rows[18]])
    like: dict[str, Any] = {
        "checkpoint": lab.checkpoint,
        "span_rows": 8,
        "projection": ProjectionConfig(calibration_samples=10),
    }
    for name, start, stop in [*zip(NAMES, CUTS, CUTS[1:], strict=False), ("whole", 0, CUTS[-1])]:
        data = folder / f"{name}.{request.param}"
        if request.param == "jsonl":
            lab.write(data, rows[start:stop])
        else:
            write_parquet(data, rows[start:stop])
        ghoststore.build(data=data, store=folder / "store", name=name, device="cpu", **like)
        like = {"like": "first"}
    return folder


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    "settings",
    [
        {"fraction": 0.3},
        {"count": 9, "order": "score"},
        {"count": 6, "leaks": "exclude", "where": "domain <> 'sky'"},
        {"count": 8, "diversity": "mmr"},
        {"count": 8, "diversity": "facility-location", "candidates": 20},
        {"token_budget": 150, "quotas": "equal"},
        {"fraction": 0.2, "lexical": 0.3},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_chooses_as_from_one_part(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    suffix = next(folder.glob("whole.*")).suffix
    reports = [
        select(folder / "store", folder / "val.jsonl", tmp_path / f"{name}{suffix}", part=part, **settings)
        for name, part in (("one", NAMES), ("other", "whole"))
    ]
    mine, theirs = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("one", "other"))
    if suffix == ".jsonl":
        assert mine == theirs
    else:
        one, other = (pyarrow.parquet.read_table(tmp_path / f"{name}{suffix}") for name in ("one", "other"))
        assert one.equals(other)
    rows, whole = map(listed, reports)
    places = dict(zip(NAMES, CUTS, strict=False))
    assert {row["part"] for row in rows} <= set(NAMES)
    assert [row | {"source_row": row["source_row"] + places[row["part"]]} for row in rows] == [
        row | {"part": found["part"]} for row, found in zip(whole, rows, strict=True)
    ]
    for name in ("domains", "scores", "lengths", "tokens", "available", "considered", "short"):
        assert getattr(reports[0], name) == getattr(reports[1], name), name
    assert reports[0].leaks["found"] == 1
    (leak,) = reports[0].leaks["rows"]
    assert (leak["part"], leak["source_row"]) == ("second", 2)
    assert "part" not in reports[1].leaks["rows"][0]


def test_to_another_form(folder: Path, tmp_path: Path) -> None:
    import datasets

    store, val = folder / "store", folder / "val.jsonl"
    select(store, val, tmp_path / "out", part=NAMES, count=7)
    select(store, val, tmp_path / "whole", part="whole", count=7)
    one, other = (list(datasets.load_from_disk(tmp_path / name)) for name in ("out", "whole"))
    assert one == other


def test_one_file_that_grew(lab: Lab, tmp_path: Path) -> None:
    rows, data = rows_of(lab), tmp_path / "data.jsonl"
    where: dict[str, Any] = {"store": tmp_path / "store", "device": "cpu"}
    lab.write(data, rows[:16])
    ghoststore.build(checkpoint=lab.checkpoint, data=data, name="old", **where)
    lab.write(data, rows)
    ghoststore.build(like="old", data=data, name="new", skip_samples=16, **where)
    old, new = list(range(16)), list(range(16, 30))
    for part, places in ((["old", "new"], old + new), (["new", "old"], new + old), ("old", old), ("new", new)):
        report = select(tmp_path / "store", lab.corpus, tmp_path / f"{part}.jsonl", part=part, fraction=1.0)
        written = [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()]
        assert written == [rows[place] for place in places]
        assert [row["source_row"] for row in listed(report)] == places


def test_other_forms_are_refused(lab: Lab, tmp_path: Path) -> None:
    rows, where = rows_of(lab), {"store": tmp_path / "store", "device": "cpu"}
    ghoststore.build(checkpoint=lab.checkpoint, data=lab.corpus, name="old", **where)
    write_parquet(tmp_path / "new.parquet", rows)
    ghoststore.build(like="old", data=tmp_path / "new.parquet", name="new", **where)
    with pytest.raises(UsageError, match="different forms"):
        select(tmp_path / "store", lab.corpus, tmp_path / "out.jsonl", part=["old", "new"], count=3)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.thin(1)
@pytest.mark.parametrize(("out", "order"), [("out.parquet", "corpus"), ("out.parquet", "score"), ("out", "corpus")])
def test_other_columns_are_refused(lab: Lab, tmp_path: Path, out: str, order: str) -> None:
    """Of fields that no build reads, and that no table can hold with two types."""
    rows, where = rows_of(lab), {"store": tmp_path / "store", "device": "cpu"}
    write_parquet(tmp_path / "old.parquet", rows[:12])
    write_parquet(tmp_path / "new.parquet", [row | {"more": "a word"} for row in rows[12:]])
    ghoststore.build(checkpoint=lab.checkpoint, data=tmp_path / "old.parquet", name="old", **where)
    ghoststore.build(like="old", data=tmp_path / "new.parquet", name="new", **where)
    with pytest.raises(CorpusError, match=r"one file cannot hold both: give `out` a \.jsonl file"):
        select(tmp_path / "store", lab.corpus, tmp_path / out, part=["old", "new"], fraction=1.0, order=order)
    assert not (tmp_path / out).exists()
    select(tmp_path / "store", lab.corpus, tmp_path / "o.jsonl", part=["old", "new"], fraction=1.0, order=order)
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == len(rows)
