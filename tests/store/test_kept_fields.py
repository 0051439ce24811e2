"""`ghoststore build --keep-fields`: fields of samples as columns of a part, through every command that knows parts."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import ghoststore
from ghoststore.errors import CorpusError, GhostStoreError, MismatchError, UsageError
from ghoststore.store import Part, Store
from ghoststore.store.base.records import json_digest
from ghoststore.store.part.build_command import build_command
from ghoststore.store.part.kept import python_values, read_field
from tests.support.harms import flip_middle
from tests.support.parts import unbuild

if TYPE_CHECKING:
    from tests.conftest import Lab, Rows

FIELDS = {"date": "string", "my score": "float", "ok": "bool", "source": "string", "year": "int"}
"""As the manifest lists them."""


def with_fields(rows: Rows) -> Rows:
    """Fields of each type; some are null, some are not there."""
    made = []
    for place, row in enumerate(rows):
        extra: dict[str, Any] = {
            "source": f"s{place % 3}",
            "year": 1990 + place,
            "date": f"2024-01-{place % 28 + 1:02d}",
        }
        extra |= {"ok": place % 2 == 0, "my score": place / 8 if place % 4 else place}
        if place % 5 == 1:
            extra = dict.fromkeys(extra)
        elif place % 5 == 2:
            extra = {}
        made.append(row | extra)
    return made


@pytest.fixture(scope="module")
def data(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lab.write(tmp_path_factory.mktemp("kept") / "corpus.jsonl", with_fields(lab.rows))


@pytest.fixture(scope="module")
def kept(lab: Lab, data: Path) -> Path:
    """A store with such a part: copy it before changing it."""
    build(lab, data, data.parent / "store")
    return data.parent / "store"


@pytest.fixture
def store(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "store"))


def build(lab: Lab, data: Path, store: Path, keep: Any = tuple(FIELDS), **options: Any) -> Any:
    given = {"name": "part", "span_rows": 6, "device": "cpu", "keep_fields": keep, **options}
    return ghoststore.build(checkpoint=lab.checkpoint, data=data, store=store, **given)


def values(part: Part) -> dict[str, list[Any]]:
    read = {}
    for place, field in enumerate(part.layout.fields):
        pieces = [python_values(*read_field(part, place, span), field.type).tolist() for span in part.spans]
        read[field.name] = [value for piece in pieces for value in piece]
    return read


def test_columns_of_each_type(lab: Lab, kept: Path) -> None:
    part = Store.open(kept).part()
    assert ghoststore.info(kept).parts[0].fields == FIELDS
    rows = with_fields(lab.rows)
    assert values(part) == {name: [row.get(name) for row in rows] for name in FIELDS}
    assert [type(value) for value in values(part)["my score"][3:5]] == [float, float]


@pytest.mark.slow
def test_a_part_without_has_nothing_of_them(lab: Lab, data: Path, kept: Path, built: Path, tmp_path: Path) -> None:
    """And the other arrays of one with fields are those of one without, byte for byte."""
    build(lab, data, tmp_path / "plain", keep=())
    assert "keep" not in (tmp_path / "plain/parts/part/zarr.json").read_text()
    assert "field" not in "".join(lab.tree(built))
    plain, more = lab.tree(tmp_path / "plain"), lab.tree(kept)
    arrays = {name for name in plain if "/c/" in name and "span_start" not in name}
    assert arrays < {name for name in more if "/c/" in name}
    assert [name for name in arrays if plain[name] != more[name]] == []


@pytest.mark.slow
def test_tables_have_dates_and_times(lab: Lab, tmp_path: Path) -> None:
    """Of two files one lacks a field; a time with a zone is kept in UTC."""
    zone = timezone(timedelta(hours=2))
    day, moment = date(1969, 12, 31), datetime(2024, 5, 1, 12, 30, 0, 250_000, tzinfo=zone)
    (tmp_path / "data").mkdir()
    texts = [row["text"] for row in lab.rows[:6]]
    for name, extra in (("a", {"day": [day, None, day], "at": [moment, None, moment], "n": [1, 2, None]}), ("b", {})):
        table = pyarrow.table({"text": texts[:3] if name == "a" else texts[3:], **extra})
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"{name}.parquet")
    build(lab, tmp_path / "data", tmp_path / "store", keep=["n", "day", "at", "day"])
    part = Store.open(tmp_path / "store").part()
    assert {field.name: field.type for field in part.layout.fields} == {"at": "timestamp", "day": "date", "n": "int"}
    utc = moment.astimezone(UTC).replace(tzinfo=None)
    assert values(part)["day"] == ["1969-12-31", None, "1969-12-31", None, None, None]
    assert values(part)["n"] == [1, 2, None, None, None, None]
    assert [None if at is None else datetime.fromisoformat(at) for at in values(part)["at"]] == [utc, None, utc] + [
        None
    ] * 3
    hits = query(lab, tmp_path / "store", "\"at\" < '2024-05-01 11:00' AND year(day) = 1969")
    assert {hit.source_row for hit in hits} == {0, 2}
    with pytest.raises(UsageError, match=r'syntax error.*"at" TIMESTAMP, day DATE'):
        query(lab, tmp_path / "store", "at IS NULL")


def query(lab: Lab, store: Path, where: str, **options: Any) -> Any:
    val = lab.write(store.parent / "val.jsonl", lab.sample_rows(3, 3))
    return ghoststore.query(store=store, val_set=val, device="cpu", top_k=30, where=where, **options).results[0].hits


BAD: list[tuple[dict[str, Any], list[str], str]] = [
    ({"meta": {"a": 1}}, ["meta"], "field 'meta'.*found {'a': 1} .dict.. Put what you filter by in a field of its own"),
    ({"tags": ["x"]}, ["tags"], "field 'tags'.*list"),
    ({"n": 2**63}, ["n"], "does not fit in 64 bits"),
    ({"source": 3}, ["source"], "field 'source' of `keep_fields` is text in row 0 and a number in row 9"),
    ({"year": True}, ["year"], "is a number in row 0 and true or false in row 9"),
    ({"year": 0.5, "n": 1}, ["n", "yeer"], "no sample has a value in the field 'yeer'.*the first row has .*'year'"),
    ({"my score": 2**53 + 1}, ["my score"], "row 9 the integer 9007199254740993"),
    ({}, ["loss"], "every part has a column 'loss' of its own; give the field another name"),
    ({}, ["Domain"], "every part has a column 'domain'"),
    ({}, ["text"], "`store_text` keeps texts"),
    ({}, ["a,b"], "no commas"),
    ({}, ["year", "Year"], "upper and lower case"),
]


@pytest.mark.thin(4)
@pytest.mark.parametrize(("odd", "keep", "message"), BAD, ids=[keep[-1] for _, keep, _ in BAD])
def test_what_no_column_holds_is_refused(lab: Lab, tmp_path: Path, odd: Any, keep: list[str], message: str) -> None:
    rows = with_fields(lab.rows)
    rows[9] |= odd
    path = lab.write(tmp_path / "data.jsonl", rows)
    with pytest.raises((CorpusError, UsageError), match=message):
        build(lab, path, tmp_path / "store", keep=keep)
    assert not (tmp_path / "store/parts/part").exists()


@pytest.mark.slow
def test_other_fields_are_no_continuation(lab: Lab, data: Path, store: Path, built: Path, tmp_path: Path) -> None:
    unbuild(Store.open(store).part(), 1)
    with pytest.raises(MismatchError, match=r"keeps the fields date,my score,ok,source,year, .*for no fields"):
        build(lab, data, store, keep=())
    with pytest.raises(MismatchError, match="asks for the fields source"):
        build(lab, data, store, keep=["source"])
    other = Path(shutil.copytree(built, tmp_path / "other"))
    with pytest.raises(MismatchError, match="keeps no fields, and `keep_fields` asks for the fields source"):
        build(lab, data, other, keep=["source"])


def test_other_values_are_no_continuation(lab: Lab, kept: Path, store: Path, data: Path, tmp_path: Path) -> None:
    """Though texts, ids and domains are the same; with the same values the bytes are."""
    unbuild(Store.open(store).part(), 1, 3)
    rows = with_fields(lab.rows)
    rows[7] = rows[7] | {"source": "another"}
    changed = lab.write(tmp_path / "corpus.jsonl", rows)
    with pytest.raises(MismatchError, match="kept_fingerprint"):
        build(lab, changed, store)
    build(lab, data, store, keep=["year", "source", "ok", "my score", "date"])
    assert lab.tree(store) == lab.tree(kept)


def test_verify_and_repair(lab: Lab, kept: Path, store: Path) -> None:
    """Damage of values, of what is null, and of metadata is named, and made again byte for byte."""
    part = store / "parts/part"
    for file in ("field_3/c/2", "field_null/c/0/0", "field_1/zarr.json"):
        flip_middle(part / file)
    assert {damage.file for damage in ghoststore.verify(store).damage} == {
        "field_3/c/2",
        "field_null/c/0/0",
        "field_1/zarr.json",
    }
    report = ghoststore.repair(store, device="cpu")
    assert report.sound
    assert lab.tree(store) == lab.tree(kept)


@pytest.mark.slow
def test_repair_from_other_values_is_refused(lab: Lab, store: Path, tmp_path: Path) -> None:
    flip_middle(store / "parts/part/field_3/c/2")
    rows = with_fields(lab.rows)
    rows[-1]["source"] = "another"
    report = ghoststore.repair(store, data=lab.write(tmp_path / "corpus.jsonl", rows), device="cpu")
    assert not report.sound
    assert "kept_fingerprint" in report.unmended[0].why


@pytest.mark.slow
def test_copies_and_leftovers(lab: Lab, kept: Path, store: Path) -> None:
    ghoststore.copy(store, part="part", to_name="copy")
    assert values(Store.open(store).part("copy")) == values(Store.open(kept).part())
    assert ghoststore.verify(store).sound
    assert ghoststore.gc(store).removed == []


def test_the_command_that_builds_it_again(kept: Path) -> None:
    part = Store.open(kept).part()
    assert "--keep-fields 'date,my score,ok,source,year'" in build_command(part.manifest, kept, "part")


def test_exports_have_them(lab: Lab, kept: Path, tmp_path: Path) -> None:
    """As columns, and as entries of the lines; `where` chooses among them."""
    ghoststore.export(store=kept, out=tmp_path / "all.parquet", unusable=True)
    table = pyarrow.parquet.read_table(tmp_path / "all.parquet")
    rows = with_fields(lab.rows)
    for name in FIELDS:
        assert table.column(name).to_pylist() == [row.get(name) for row in rows]
    report = ghoststore.export(store=kept, out=tmp_path / "some.npy", where="source = 's1' AND year > 2000")
    lines = [json.loads(line) for line in (tmp_path / "some.npy.rows.jsonl").read_text().splitlines()]
    expected = [place for place, row in enumerate(rows) if row.get("source") == "s1" and row["year"] > 2000]
    assert [line["source_row"] for line in lines] == expected
    assert report.rows == len(np.load(tmp_path / "some.npy")) == len(expected) > 1
    assert [line["year"] for line in lines] == [rows[place]["year"] for place in expected]
    with pytest.raises(UsageError, match="matches none of the 27 usable rows of part 'part'"):
        ghoststore.export(store=kept, out=tmp_path / "none.npy", where="year > 3000")
    assert not (tmp_path / "none.npy").exists()


@pytest.mark.slow
def test_from_standard_input(lab: Lab, data: Path, kept: Path, tmp_path: Path) -> None:
    outcome = lab.build(tmp_path / "store", "--data", "-", "--keep-fields", "source,year", stdin=str(data))
    assert outcome.code == 0, outcome.err
    assert values(Store.open(tmp_path / "store").part())["year"] == values(Store.open(kept).part())["year"]


@pytest.mark.slow
def test_a_manifest_with_fields_that_there_cannot_be(store: Path) -> None:
    path = store / "parts/part/zarr.json"
    for fields in ([{"name": "loss", "type": "int"}], [{"name": "a", "type": "pickle"}], [{"name": "a"}], 3, ["a"]):
        group = json.loads(path.read_text())
        group["attributes"]["manifest"]["storage"]["fields"] = fields
        group["attributes"]["manifest_sha256"] = json_digest(group["attributes"]["manifest"])
        path.write_text(json.dumps(group))
        with pytest.raises(GhostStoreError, match="storage section"):
            Store.open(store).part()
