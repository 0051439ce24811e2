"""An SQL condition over columns, evaluated by DuckDB, which is imported when a condition is made.

The text is the user's, and may one day come from elsewhere. So it is parsed first, and only one expression over columns
of the row at hand is taken: no subquery, no second statement, no window, nothing random. DuckDB itself runs in memory,
without files, network and extensions, in one thread, and its settings are locked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import UsageError

SETTINGS = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
    "temp_directory": "",
    "threads": "1",
    "memory_limit": "512MB",
}
TABLE = "_rows"
LONGEST = 100_000
"""Characters of a condition."""
SHOWN = 200
"""Characters of a condition in a message."""
REFUSED = {
    "SUBQUERY": "asks other rows (a subquery)",
    "WINDOW": "looks at other rows (a window)",
    "STAR": "takes all columns (*): name those that it needs",
    "PARAMETER": "has a parameter without a value (? or $)",
    "POSITIONAL_REFERENCE": "names a column by its place (#)",
}
"""Classes of expressions that a condition may not have. Rows are read some at a time, so one cannot look at others."""
GROWING = {"range", "generate_series", "repeat", "lpad", "rpad", "list_resize", "array_resize", "format", "printf"}
"""Functions that make values of any size out of a number. The engine does not count them into its limit of memory."""
OF_THE_MACHINE = {"current_setting"}
"""Functions of settings, which another machine has otherwise; DuckDB before 2.0 calls them constant."""
CLOCK = {"current_timestamp", "current_time", "localtime", "localtimestamp"}
"""Words that stand for functions of other names, which change with the clock."""


class Condition:
    """A condition on rows. UsageError for one that is not an SQL condition over ``types``, the SQL type of each column.

    ``source`` names what has the columns; ``missing`` has advice for columns that it could have.
    """

    def __init__(
        self, sql: str, types: Mapping[str, str], source: str, missing: Mapping[str, str] | None = None
    ) -> None:
        self.sql, self.types, self._source = sql, dict(types), source
        self._duckdb = _load()
        self._connection = self._duckdb.connect(":memory:", config=SETTINGS)
        self._connection.execute("SET lock_configuration = true")
        if not sql.strip():
            raise UsageError(f"`where` is empty: give a condition on the columns {self.columns}")
        if len(sql) > LONGEST:
            raise UsageError(f"`where` has {len(sql):,} characters; at most {LONGEST:,} are read")
        self._place = "#"
        while self._place in self.types:
            self._place += "#"
        self.names = self._named(missing or {})
        """The columns that it names, in the order of ``types``."""
        self._bind()

    @property
    def columns(self) -> str:
        """The columns that there are, with their types, for messages."""
        words = self._connection.execute(
            "SELECT keyword_name FROM duckdb_keywords() WHERE keyword_category <> 'unreserved'"
        ).fetchall()
        keywords = {str(word) for (word,) in words}
        named = (f"{quoted(name, name.lower() in keywords)} {kind}" for name, kind in self.types.items())
        return f"of {self._source}: {', '.join(named)}"

    def mask(self, rows: int, columns: Mapping[str, Any]) -> NDArray[np.bool_]:
        """(rows,): whether each row matches. ``columns`` are Arrow arrays of :attr:`names`; null is no match.

        UsageError for a condition that cannot be computed of them, such as a cast of a text that is no number.
        """
        matches = np.zeros(rows, dtype=bool)
        matches[self._run(f'SELECT "{self._place}" FROM {TABLE} WHERE ({self.sql}\n)', rows, columns)] = True
        return matches

    def _run(self, query: str, rows: int, columns: Mapping[str, Any]) -> NDArray[np.int64]:
        import pyarrow

        table = pyarrow.table({**columns, self._place: pyarrow.array(np.arange(rows, dtype=np.int64))})
        self._connection.register(TABLE, table)
        try:
            places = self._connection.execute(query).fetchnumpy()[self._place]
        except self._duckdb.Error as error:
            raise self._problem(_first_line(error)) from None
        finally:
            self._connection.unregister(TABLE)
        return np.asarray(places, dtype=np.int64)

    def _named(self, missing: Mapping[str, str]) -> tuple[str, ...]:
        """The columns that the condition names, after it is parsed. UsageError unless it is one expression."""
        # Alone and in brackets: so it can neither close a bracket that it did not open, nor go on after the condition.
        trees = [self._parsed(f"{opened}{self.sql}\n{closed}") for opened, closed in (("", ""), ("(", ")"))]
        nodes = list(_nodes(trees[1]))
        inside = self._expanded(nodes)
        for node in (*nodes, *inside):
            if (problem := REFUSED.get(node["class"])) is not None:
                raise self._problem(f"it {problem}")
        called = _called((*nodes, *inside))
        referred, within = _referred(nodes), _referred(inside)
        known = {name.lower() for name in self.types}
        if growing := called & GROWING:
            raise self._problem(f"it makes values of any size ({growing.pop()})")
        # The clock is written as a column: current_date.
        words = within | (referred - known)
        if changing := _changing(self._connection, called | words) | (words & CLOCK) | (called & OF_THE_MACHINE):
            raise self._problem(f"it would match other rows another time ({changing.pop()})")
        if hidden := (referred - known) & {TABLE, self._place}:
            raise self._problem(f"{self._source} has no column {hidden.pop()!r}")
        for name, advice in missing.items():
            if name in referred - known:
                raise self._problem(f"{self._source} has no column {name!r}: {advice}")
        return tuple(name for name in self.types if name.lower() in referred)

    def _expanded(self, nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The expressions inside the macros that ``nodes`` call, and those inside these: pg_sleep is sleep_ms."""
        inside: list[dict[str, Any]] = []
        seen: set[str] = set()
        while names := _called((*nodes, *inside)) - seen:
            seen |= names
            macros = self._connection.execute(
                "SELECT macro_definition FROM duckdb_functions() WHERE function_type = 'macro' AND function_name IN "
                "(SELECT unnest(?))",
                [sorted(names)],
            ).fetchall()
            for (definition,) in macros:
                inside += _nodes(self._parsed(f"({definition}\n)"))
        return inside

    def _parsed(self, condition: str) -> Any:
        """The syntax tree of ``condition``, from a query whose WHERE it is."""
        query = f"SELECT 1 FROM {TABLE} WHERE {condition}"
        try:
            ((answer,),) = self._connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [query]).fetchall()
            parsed = json.loads(answer)
        except (self._duckdb.Error, RecursionError, ValueError) as error:
            raise self._problem(_first_line(error)) from None
        if parsed["error"]:
            message = str(parsed["error_message"])
            raise self._problem("it is more than one condition" if message.startswith("Only SELECT") else message)
        nodes = [statement["node"] for statement in parsed["statements"]]
        plain = (
            len(nodes) == 1
            and nodes[0]["type"] == "SELECT_NODE"
            and not any(
                nodes[0].get(name) for name in ("modifiers", "group_expressions", "having", "sample", "qualify")
            )
        )
        if not plain:
            raise self._problem("it is more than one condition")
        return nodes[0]["where_clause"]

    def _bind(self) -> None:
        """UsageError for columns, functions and types that do not fit, before any row is read."""
        import pyarrow

        kinds = arrow_types(pyarrow)
        empty = {name: pyarrow.array([], type=kinds[kind]) for name, kind in self.types.items()}
        self._run(f'SELECT "{self._place}" FROM {TABLE} WHERE ({self.sql}\n)', 0, empty)
        table = pyarrow.table({**empty, self._place: pyarrow.array([], type=pyarrow.int64())})
        self._connection.register(TABLE, table)
        try:
            ((_, kind, *_),) = self._connection.execute(f"DESCRIBE SELECT ({self.sql}\n) FROM {TABLE}").fetchall()
        except self._duckdb.Error as error:
            raise self._problem(_first_line(error)) from None
        finally:
            self._connection.unregister(TABLE)
        if kind != "BOOLEAN":
            raise self._problem(f"it is no condition, which is true or false of a row: its type is {kind}")

    def _problem(self, words: str) -> UsageError:
        shown = self.sql if len(self.sql) <= SHOWN else f"{self.sql[:SHOWN]}…"
        return UsageError(f"`where` {shown!r}: {words.rstrip('.!')}. The columns {self.columns}")


def quoted(name: str, keyword: bool) -> str:
    """A column as SQL names it: in double quotes unless it is a plain word, and no ``keyword``."""
    plain = name.isascii() and name.isidentifier() and not keyword
    return name if plain else '"' + name.replace('"', '""') + '"'


def arrow_types(pyarrow: Any) -> dict[str, Any]:
    """The Arrow type of each SQL type that columns have."""
    return {
        "VARCHAR": pyarrow.string(),
        "INTEGER": pyarrow.int32(),
        "BIGINT": pyarrow.int64(),
        "FLOAT": pyarrow.float32(),
        "DOUBLE": pyarrow.float64(),
        "BOOLEAN": pyarrow.bool_(),
        "DATE": pyarrow.date32(),
        "TIMESTAMP": pyarrow.timestamp("us"),
    }


def _load() -> Any:
    try:
        import duckdb
    except ImportError as error:
        raise UsageError("`where` needs DuckDB, which is not installed: pip install duckdb") from error
    return duckdb


def _changing(connection: Any, names: set[str]) -> set[str]:
    """Of ``names`` those of functions whose value changes from call to call, or with the clock: a condition always
    matches the same rows.
    """
    if not names:
        return set()
    # A function may have forms of both kinds: that of two timestamps has one value, that of one takes today's.
    rows = connection.execute(
        "SELECT function_name FROM duckdb_functions() WHERE function_type <> 'table' AND function_name IN "
        "(SELECT unnest(?)) GROUP BY function_name HAVING bool_and(stability <> 'CONSISTENT')",
        [sorted(names)],
    ).fetchall()
    return {str(name) for (name,) in rows}


def _called(nodes: Iterable[dict[str, Any]]) -> set[str]:
    """The names of the functions among ``nodes``."""
    return {str(node["function_name"]).lower() for node in nodes if node["class"] == "FUNCTION"}


def _referred(nodes: Iterable[dict[str, Any]]) -> set[str]:
    """The names in the references to columns among ``nodes``."""
    return {str(name).lower() for node in nodes if node["class"] == "COLUMN_REF" for name in node["column_names"]}


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every expression in a syntax tree."""
    waiting = [tree]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if "class" in item:
                yield item
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _first_line(error: Exception) -> str:
    """The message of DuckDB without its kind and the lines that show the query."""
    line = str(error).strip().partition("\n")[0]
    return line.partition(" Error: ")[2] or line
