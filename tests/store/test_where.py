"""Conditions in SQL on rows: what they match, against pandas; which are refused, before anything is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pandas
import pyarrow
import pytest
from hypothesis import strategies

import ghoststore
from ghoststore.errors import CorruptError, UsageError
from ghoststore.store import Part, Store
from ghoststore.store.where.condition import Condition
from ghoststore.store.where.rows import part_matches, run_matches
from tests.support.harms import flip_middle
from tests.support.made_parts import clustered, make_part
from tests.support.parts import unbuild
from tests.support.score_runs import row_table, whole

if TYPE_CHECKING:
    from tests.conftest import Lab

TYPES = {
    "id": "VARCHAR",
    "domain": "VARCHAR",
    "n_tokens": "INTEGER",
    "loss": "FLOAT",
    "year": "BIGINT",
    "good": "BOOLEAN",
}
ROWS = 200


def table() -> pandas.DataFrame:
    rng = np.random.default_rng(3)
    frame = pandas.DataFrame(
        {
            "id": [f"row-{place}" for place in range(ROWS)],
            "domain": rng.choice(np.array(["sky", "earth", "it's", None], dtype=object), ROWS),
            "n_tokens": rng.integers(0, 30, ROWS).astype(np.int32),
            "loss": rng.random(ROWS).astype(np.float32),
            "year": pandas.array(rng.integers(1990, 2000, ROWS), dtype="Int64"),
            "good": pandas.array(rng.random(ROWS) < 0.5, dtype="boolean"),
        }
    )
    frame.loc[rng.random(ROWS) < 0.2, "year"] = pandas.NA
    frame.loc[rng.random(ROWS) < 0.2, "good"] = pandas.NA
    return frame


FRAME = table()


def true(values: Any) -> np.ndarray:
    """What is true of a row: null is not."""
    return np.asarray(pandas.Series(values).astype("boolean").fillna(False), dtype=bool)


Case = tuple[str, Any]
"""SQL, and the same in pandas, with null where SQL has it."""


def comparisons() -> strategies.SearchStrategy[Case]:
    numbers = strategies.tuples(
        strategies.sampled_from(["n_tokens", "year"]),
        strategies.sampled_from(["<", ">=", "=", "<>"]),
        strategies.integers(0, 2000),
    )
    words = strategies.tuples(
        strategies.sampled_from(["=", "<>"]), strategies.sampled_from(["sky", "earth", "it's", "no"])
    )
    how = {"<": "lt", ">=": "ge", "=": "eq", "<>": "ne"}
    known = FRAME["domain"].astype(pandas.StringDtype("python"))
    return strategies.one_of(
        numbers.map(
            lambda case: (
                f"{case[0]} {case[1]} {case[2]}",
                getattr(FRAME[case[0]].astype("Int64"), how[case[1]])(case[2]),
            )
        ),
        words.map(
            lambda case: (
                f"domain {case[0]} '{case[1].replace(chr(39), chr(39) * 2)}'",
                getattr(known, how[case[0]])(case[1]),
            )
        ),
        strategies.just(("good", FRAME["good"])),
        strategies.just(("year IS NULL", FRAME["year"].isna().astype("boolean"))),
        strategies.just(("loss BETWEEN 0.25 AND 0.5", FRAME["loss"].between(0.25, 0.5).astype("boolean"))),
        strategies.just(("domain IN ('sky', 'no')", known.eq("sky"))),
        strategies.just(("id LIKE 'row-1%'", FRAME["id"].str.startswith("row-1").astype("boolean"))),
    ).map(lambda case: (case[0], case[1].astype("boolean")))


def conditions() -> strategies.SearchStrategy[Case]:
    return strategies.recursive(
        comparisons(),
        lambda inner: strategies.one_of(
            strategies.tuples(inner, inner).map(
                lambda two: (f"({two[0][0]}) AND ({two[1][0]})", two[0][1] & two[1][1])
            ),
            strategies.tuples(inner, inner).map(lambda two: (f"({two[0][0]}) OR ({two[1][0]})", two[0][1] | two[1][1])),
            inner.map(lambda one: (f"NOT ({one[0]})", ~one[1])),
        ),
        max_leaves=5,
    )


def masked(sql: str) -> np.ndarray:
    """The rows of the table that match."""
    condition, arrow = Condition(sql, TYPES, "a table"), pyarrow.Table.from_pandas(FRAME)
    return condition.mask(ROWS, {name: arrow.column(name) for name in condition.names})


@pytest.mark.slow
@hypothesis.settings(deadline=None)
@hypothesis.given(conditions())
def test_as_pandas_filters(case: Case) -> None:
    sql, expected = case
    assert set(Condition(sql, TYPES, "a table").names) == {name for name in TYPES if name in sql}
    np.testing.assert_array_equal(masked(sql), true(expected))


HOSTILE = [
    ("", "is empty"),
    ("n_tokens", "its type is INTEGER"),
    ("NULL", "no condition"),
    ("'true'", "no condition"),
    ("n_tokens > 1; DROP TABLE x", "more than one condition"),
    ("n_tokens > 1; COPY (SELECT 1) TO '{out}'", "more than one condition"),
    ("n_tokens > 1) OR (n_tokens < 5", "syntax error"),
    ("n_tokens > 1) UNION (SELECT 1", "syntax error"),
    ("n_tokens > 1 UNION SELECT 1", "more than one condition"),
    ("n_tokens > 1 LIMIT 1", "more than one condition"),
    ("n_tokens > 1 ORDER BY random()", "more than one condition"),
    ("n_tokens > 1 GROUP BY 1", "more than one condition"),
    ("n_tokens > 1 /*", "unterminated"),
    ("n_tokens > (SELECT avg(n_tokens) FROM _rows)", "subquery"),
    ("id IN (SELECT content FROM read_text('/etc/passwd'))", "subquery"),
    ("EXISTS (FROM read_csv('/etc/passwd'))", "subquery"),
    ("id = ANY(SELECT 'a')", "subquery"),
    ("read_text('/etc/passwd') = 'a'", "table function"),
    ("getenv('HOME') = 'a'", "does not exist"),
    ("count(*) > 1", "aggregates"),
    ("sum(n_tokens) > 1", "aggregates"),
    ("row_number() OVER () < 5", "a window"),
    ("random() < 0.5", "other rows another time"),
    ("now() > TIMESTAMP '2020-01-01'", "other rows another time"),
    ("current_date > DATE '2020-01-01'", "other rows another time"),
    ("current_timestamp > TIMESTAMP '2020-01-01'", "other rows another time"),
    ("current_setting('memory_limit') = 'a'", "other rows another time"),
    ("nextval('a') > 1", "other rows another time"),
    ("ago(INTERVAL 1 DAY) < TIMESTAMP '2020-01-01'", "other rows another time .current_timestamp"),
    ("pg_sleep(9) IS NULL", "other rows another time .sleep_ms"),
    ("list_sum([n_tokens, 1]) > sum(n_tokens)", "aggregates"),
    ("n_tokens > ?", "parameter"),
    ("n_tokens > $secret", "parameter"),
    ("COLUMNS(*) > 1", r"takes all columns"),
    ("_rows.n_tokens > 1", "no column '_rows'"),
    ("struct_extract(_rows, 'id') = 'a'", "no column '_rows'"),
    ('"#" > 3', "no column '#'"),
    ("#1 > 3", "by its place"),
    ("n_token > 1", 'n_token" not found.*n_tokens INTEGER'),
    ("CAST(id AS INTEGER) > 1", "Could not convert string 'row-0'"),
    ("n_tokens > 'a'", "Could not convert"),
    ("list_sum(range(100000000000)) > 1", "values of any size .range"),
    ("id = repeat('a', 4000000000)", "values of any size .repeat"),
    ("(" * 20_000 + "good" + ")" * 20_000, "depth|nested|recursion|memory|stack"),
    ("good AND " * 20_000 + "good", "characters"),
]


@pytest.mark.thin(9)
@pytest.mark.parametrize(("sql", "message"), HOSTILE, ids=[sql[:40] for sql, _ in HOSTILE])
def test_what_is_no_condition_is_refused(tmp_path: Path, sql: str, message: str) -> None:
    """And nothing is read, written or run. The columns that there are stand in the message."""
    with pytest.raises(UsageError, match=f"(?s){message}"):
        masked(sql.replace("{out}", str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "sql",
    [
        "ATTACH '{out}' AS a",
        "COPY (SELECT 1) TO '{out}'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SET enable_external_access = true",
        "SET memory_limit = '100GB'",
        "SELECT * FROM FRAME",
        "EXPORT DATABASE '{out}'",
    ],
)
def test_the_engine_itself_reaches_nothing(tmp_path: Path, sql: str) -> None:
    """Were a whole statement to pass: no file, no extension, no variable of this process, no other setting."""
    condition = Condition("good", TYPES, "a table")
    with pytest.raises(condition._duckdb.Error):
        condition._connection.execute(sql.replace("{out}", str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_engine_is_imported_where_a_condition_is_given() -> None:
    code = (
        "import sys, query.answer.query, query.select.select, query.training_scores.scores\n"
        "import query.export.export, indexer.build.alone\n"
        "assert 'duckdb' not in sys.modules\n"
        "from ghoststore.store.where.condition import Condition\n"
        "Condition('true', {}, 'nothing')\n"
        "assert 'duckdb' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_as_sql_has_them() -> None:
    """Whatever the case; words of SQL and others in quotes, as the message shows them."""
    types = {"my score": "DOUBLE", "order": "BIGINT", "Ünï": "VARCHAR", 'a"b': "BIGINT"}
    condition = Condition('"MY SCORE" > 1 AND "order" = 3 AND "a""b" = 1', types, "a table")
    assert condition.names == ("my score", "order", 'a"b')
    assert condition.columns == 'of a table: "my score" DOUBLE, "order" BIGINT, "Ünï" VARCHAR, "a""b" BIGINT'
    columns = {"my score": [2.0, 2.0], "order": [3, 4], 'a"b': [1, 1]}
    assert condition.mask(2, {name: pyarrow.array(column) for name, column in columns.items()}).tolist() == [
        True,
        False,
    ]


@pytest.fixture(scope="module")
def part(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Part:
    """Of 40 rows with texts: two are empty, long ones are cut into windows, and the third of its spans is missing."""
    folder = tmp_path_factory.mktemp("where")
    rows: list[dict[str, Any]] = lab.sample_rows(40, 3)
    rows[4]["text"] = rows[30]["text"] = ""
    rows[5]["text"] = " ".join(row["text"] for row in rows[:8])
    rows[6]["domain"] = None
    data = lab.write(folder / "data.jsonl", rows)
    options: dict[str, Any] = {"span_rows": 8, "overlong": "window", "store_text": True, "device": "cpu"}
    ghoststore.build(checkpoint=lab.checkpoint, data=data, store=folder / "store", **options)
    unbuild(Store.open(folder / "store").part(), 2)
    return Store.open(folder / "store").part()


def frame(part: Part) -> pandas.DataFrame:
    """The columns of the committed rows, by plain reading."""
    spans = [part.layout.span_of(span) for span in part.spans]
    names = ("sample_id", "domain", "n_tokens", "source_row", "window_start", "status", "loss", "text")
    columns = {name: np.concatenate([part.read(name, *span) for span in spans]) for name in names}
    made = pandas.DataFrame(columns, index=part.row_numbers)
    made["domain"] = [None if code < 0 else part.domains[code] for code in made["domain"]]
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("n_tokens > 20", lambda rows: rows["n_tokens"] > 20),
        ("domain = 'sky'", lambda rows: rows["domain"] == "sky"),
        ("domain IS NULL", lambda rows: rows["domain"].isna()),
        ("window_start > 0", lambda rows: rows["window_start"] > 0),
        ("status = 'empty'", lambda rows: rows["status"] == 16),
        ("loss IS NULL", lambda rows: rows["status"] >= 16),
        ("loss < 6", lambda rows: (rows["loss"] < 6) & (rows["status"] < 16)),
        ("text ILIKE '%MOON%'", lambda rows: rows["text"].str.contains("moon")),
        (
            "length(text) > 30 OR id = 'row-3'",
            lambda rows: (rows["text"].str.len() > 30) | (rows["sample_id"] == "row-3"),
        ),
        ("source_row % 2 = 0 AND source_file = 0", lambda rows: rows["source_row"] % 2 == 0),
        ("true", lambda rows: rows["n_tokens"] >= 0),
    ],
)
def test_rows_of_a_part(part: Part, sql: str, expected: Any) -> None:
    """Rows that are not committed never match."""
    rows = frame(part)
    mask = part_matches(part, sql).mask
    assert len(mask) == part.layout.rows
    assert np.flatnonzero(mask).tolist() == rows.index[expected(rows)].tolist() != []


@pytest.mark.slow
def test_some_spans_at_a_time(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_mask = part_matches(part, "n_tokens > 12").mask
    monkeypatch.setattr("ghoststore.store.where.rows.ROWS_AT_ONCE", 8)
    np.testing.assert_array_equal(part_matches(part, "n_tokens > 12").mask, whole_mask)


@pytest.mark.slow
def test_a_column_is_read_where_it_is_named(part: Part, lab: Lab, tmp_path: Path) -> None:
    """Damage of one that is not named is not met, of one that is it has its name."""
    ghoststore.copy(part.path.parent.parent, part=part.name, to_store=tmp_path / "store")
    copy = Store.open(tmp_path / "store").part()
    flip_middle(copy.path / "text/c/1")
    flip_middle(copy.path / "n_tokens/c/1")
    assert part_matches(copy, "id = 'row-3'").mask.sum() == 1
    with pytest.raises(CorruptError, match="n_tokens/c/1"):
        part_matches(copy, "n_tokens > 3")
    with pytest.raises(CorruptError, match="text"):
        part_matches(copy, "text = 'a'")


def test_texts_are_no_column_where_they_are_not_stored(tmp_path: Path) -> None:
    part = make_part(tmp_path / "store", clustered(50))
    with pytest.raises(UsageError, match=r"part 'part' has no column 'text': it does not keep texts, .*--store-text"):
        part_matches(part, "text LIKE '%moon%'")


@pytest.mark.slow
def test_rows_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rows = whole(tmp_path), row_table()
    monkeypatch.setattr("ghoststore.store.where.rows.ROWS_AT_ONCE", 7)
    found = run_matches(run, "domain = 'earth' AND window_start = 0").mask
    assert found.tolist() == ((rows.domain == 1) & (rows.window_start == 0)).tolist()
    with pytest.raises(UsageError, match="run 'run' has no column 'loss'"):
        run_matches(run, "loss > 3")


@pytest.mark.slow
def test_no_match_says_how_many_there_are(part: Part) -> None:
    matches = part_matches(part, "domain = 'sea'")
    with pytest.raises(
        UsageError, match=r"none of the .* usable rows of part.*domain VARCHAR.*the domains: 'earth', 'sky'"
    ):
        matches.among(part, part.usable(), "usable rows")
