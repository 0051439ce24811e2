"""Rows to train on, from the explorer: what ``ghoststore select`` writes, in an answer."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np

from ghoststore.errors import UsageError
from ghoststore.server.command_line import command_line
from ghoststore.server.questions import RANKING, Watched, given_of
from ghoststore.settings.question import SelectOptions, parse_quota, quotas_of
from ghoststore.settings.serve import ServeOptions
from ghoststore.shown import json_text
from ghoststore.store import Part, Status, Store
from query.select.select import select

HOW_MUCH = ("fraction", "count", "threshold", "threshold_nats", "token_budget")
OFFERED = (*RANKING, *HOW_MUCH, "quotas", "diversity", "diversity_weight", "candidates", "leaks", "order", "card")
"""Options of ``ghoststore.select`` that a request may have, beside those of :data:`OWN`."""
OWN = ("source_rows", "form", "quota")
FORMS = ("jsonl", "parquet")
MOST_BYTES = 64 << 20
"""Of the rows in an answer."""


@dataclass(frozen=True, slots=True)
class Choosing:
    """A request for rows: options of ``ghoststore.select``, the form of the file, and rows picked by hand."""

    options: Mapping[str, Any]
    form: str
    picked: frozenset[int] = frozenset()
    """Rows of the corpus, which ``options`` choose, all of them; none where they choose among all rows."""

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> Self:
        """``request``, checked. ``source_rows`` picks rows of the corpus by hand: all of them, and no others."""
        options = given_of(request, "choosing in the explorer", (*OFFERED, *OWN))
        picked, form = options.pop("source_rows", None), options.pop("form", FORMS[0])
        if "quota" in options:
            options = _with_quota(options)
        if form not in FORMS:
            raise UsageError(f"`form` is one of {', '.join(FORMS)}, not {form!r:.40}")
        return cls(options, form) if picked is None else cls(_by_hand(options, picked), form, frozenset(picked))

    def refuse_missing(self, part: Part) -> None:
        """UsageError for picked rows that ``part`` has no vector of."""
        usable = [status for status in Status if status.usable]
        missing = self.picked.difference(part.column("source_row")[np.isin(part.column("status"), usable)].tolist())
        if missing:
            raise UsageError(
                f"`source_rows`: part {part.name!r} has no vector of {len(missing):,} of {len(self.picked):,} rows, "
                f"the first is row {min(missing):,} of the corpus: leave them out"
            )


def _with_quota(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with ``quotas`` for the words of ``quota``, which are those of the command line.

    A page writes them so: to JavaScript the share 1.0 and 1 row are the same number.
    """
    rest = {name: value for name, value in options.items() if name != "quota"}
    words = options["quota"]
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise UsageError(f'`quota` is a list such as ["code=0.3", "sky=100"], not {words!r:.80}')
    if "quotas" in rest:
        raise UsageError("`quota` names domains, `quotas` takes them all: give one of the two")
    try:
        return {**rest, "quotas": quotas_of([parse_quota(word) for word in words])}
    except ValueError as error:
        raise UsageError(f"`quota`: {error}") from None


def _by_hand(options: dict[str, Any], rows: Any) -> dict[str, Any]:
    """``options`` for the rows of the corpus ``rows`` alone."""
    if not isinstance(rows, list) or not rows or not all(type(row) is int and 0 <= row < 1 << 62 for row in rows):
        raise UsageError(f"`source_rows` is a list of rows of the corpus, counted from 0, not {rows!r:.80}")
    if clash := [name for name in (*HOW_MUCH, "quotas", "diversity", "where", "leaks") if name in options]:
        raise UsageError(f"`source_rows` says which rows there are, and so does `{clash[0]}`: give one of them")
    wanted = ", ".join(map(str, sorted(set(rows))))
    return {**options, "where": f"source_row IN ({wanted})", "fraction": 1.0, "leaks": "keep"}


def choose(options: ServeOptions, chosen: Choosing, progress: Watched) -> bytes:
    """JSON: the ``report`` of ``ghoststore.select``, its ``files`` (``name`` and ``base64``), notes and command line.

    The files are those that it writes: rows, the list of the rows, and with ``card`` the dataset card. Raises what it
    raises, and UsageError for picked rows that cannot be ranked, and where the rows have more than 64 MiB.
    """
    if chosen.picked:
        chosen.refuse_missing(Store.open(options.store).part(chosen.options.get("part")))
    out = f"chosen.{chosen.form}"
    served = {name: getattr(options, name) for name in ("store", "checkpoint", "base", "tokenizer", "data", "device")}
    with TemporaryDirectory(prefix="ghoststore-") as folder:
        report = select(**{**served, **chosen.options}, out=Path(folder, out), progress=progress)
        files = [Path(report.out), Path(report.rows_file)]
        if report.card is not None:
            files.append(_card(report.card, folder))
        if sum(file.stat().st_size for file in files) > MOST_BYTES:
            raise UsageError(
                f"the {report.samples:,} rows have more than {MOST_BYTES >> 20} MiB: choose fewer, or write them from "
                f"a shell: {command_line(options, {**chosen.options, 'out': out}, SelectOptions)}"
            )
        contents = [{"name": file.name, "base64": b64encode(file.read_bytes()).decode()} for file in files]
    card = None if report.card is None else files[2].name
    shown = {**report.to_json(), "out": out, "report": f"{out}.report.json", "rows_file": files[1].name, "card": card}
    command = command_line(options, {**chosen.options, "out": out}, SelectOptions)
    beside = {"command": command, "notes": progress.notes}
    return json_text({"report": shown, "files": contents, "explorer": beside}).encode()


def _card(path: str, folder: str) -> Path:
    """The dataset card at ``path``, without the ``folder`` of this server in the command line that it shows."""
    card = Path(path)
    card.write_text(card.read_text(encoding="utf-8").replace(f"{folder}{os.sep}", ""), encoding="utf-8")
    return card
