"""One sample of a part: its text, its fields, and what became of each of its rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from ghoststore.corpus import Position
from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.server.command_line import sample_command, sample_commands
from ghoststore.settings.serve import ServeOptions
from ghoststore.store import Part, Status, Store
from ghoststore.store.part.kept import python_values, read_field
from query.common.texts import corpus_behind, texts_of
from query.common.unchanged import read_unchanged
from query.select.leaks import OVERLAP, SHINGLE_WORDS, SHOWN, LeakCheck
from query.training_scores.scores import scores


def sample(options: ServeOptions, name: str, source_row: int, progress: Progress) -> dict[str, Any]:
    """The sample at ``source_row`` of the corpus that part ``name`` was made of.

    ``rows`` are its windows, by their number in the part. ``text`` is None where the corpus is gone or has changed.
    ``command`` writes the same from a shell.
    Raises UsageError if there is no such part, CorruptError for damaged rows, and what :func:`rows_of` raises.
    """
    part = Store.open(options.store).part(name)
    rows = rows_of(part, source_row)
    columns = ("sample_id", "domain", "status", "n_tokens", "loss", "window_start")
    ids, domains, statuses, tokens, losses, starts = (part.read_rows(column, rows) for column in columns)
    text = texts_of(part, [int(rows[0])], progress, options.data)[0]
    return {
        "part": part.name,
        "source_row": source_row,
        "id": str(ids[0]),
        "domain": part.domains[domains[0]] if domains[0] >= 0 else None,
        "text": text,
        "fields": _fields(part, int(rows[0])),
        "rows": [
            {
                "row": int(row),
                "status": Status(int(status)).name.lower(),
                "n_tokens": int(count),
                "loss": float(loss) if np.isfinite(loss) else None,
                "window_start": int(start),
            }
            for row, status, count, loss, start in zip(rows, statuses, tokens, losses, starts, strict=True)
        ],
        "command": sample_commands(options, part.name, source_row, text)[0],
    }


def history(options: ServeOptions, name: str, source_row: int, progress: Progress) -> dict[str, Any]:
    """Where the sample at ``source_row`` of the corpus of part ``name`` was trained on: ``runs``, each with what
    ``ghoststore scores --sample`` says of its id, ``problem`` where that has nothing to say, and the command line.

    The same id in the corpus of a run is taken for the same sample. Raises what :func:`rows_of` raises.
    """
    store = Store.open(options.store)
    part = store.part(name)
    sample_id = str(part.read_rows("sample_id", rows_of(part, source_row)[:1])[0])
    runs: list[dict[str, Any]] = []
    for run in store.run_names():
        found: dict[str, Any] = {"run": run, "command": sample_command(options, run, sample_id)}
        try:
            of_run = scores(store=options.store, run=run, sample=sample_id, progress=progress).to_json()
            found |= {"settings": of_run["settings"], "summary": of_run["summary"], "history": of_run["history"]}
        except UsageError as error:  # the run has no such sample, or no step yet
            found["problem"] = str(error)
        runs.append(found)
    return {"part": part.name, "source_row": source_row, "id": sample_id, "runs": runs}


def duplicates(options: ServeOptions, name: str, source_row: int, progress: Progress) -> dict[str, Any]:
    """The samples of the corpus of part ``name`` that are near-duplicates of the one at ``source_row``: that hold at
    least half of its runs of 8 words, as ``select`` looks for those of a val set. The most similar first. ``command``
    is a ``select`` whose report lists them, with the sample itself.

    Reads the corpus once. UsageError for a corpus that is gone, MismatchError if it has changed, and what
    :func:`rows_of` raises.
    """
    part = Store.open(options.store).part(name)
    rows = rows_of(part, source_row)
    file, offset = (int(part.read_rows(column, rows[:1])[0]) for column in ("source_file", "source_offset"))
    corpus = corpus_behind(part, options.data)
    found = corpus.fetch([Position(source_row=source_row, file=file, offset=offset)])
    check = LeakCheck(found.values())
    for sample in read_unchanged(corpus, part, progress):
        if sample.source_row != source_row:
            check.see(sample)
    text = texts_of(part, [int(rows[0])], progress, options.data)[0]
    shown = sorted(check.found.values(), key=lambda leak: (-leak.overlap, leak.source_row))[:SHOWN]
    return {
        "part": part.name,
        "source_row": source_row,
        "words": SHINGLE_WORDS,
        "least_overlap": OVERLAP,
        "found": len(check.found),
        "rows": [{"id": leak.id, "source_row": leak.source_row, "overlap": leak.overlap} for leak in shown],
        "command": sample_commands(options, part.name, source_row, text)[1],
    }


def rows_of(part: Part, source_row: int) -> NDArray[np.int64]:
    """The rows of ``part`` that are of ``source_row`` of its corpus, at least one. HTTPException 404 for none."""
    rows: NDArray[np.int64] = part.row_numbers[part.column("source_row") == source_row]
    if not len(rows):
        raise HTTPException(404, f"part {part.name!r} has no row of the corpus's row {source_row:,}")
    return rows


def _fields(part: Part, row: int) -> dict[str, Any]:
    """The kept fields of ``row``, by name; None for null."""
    span, place = divmod(row, part.layout.span_rows)
    values = {}
    for number, field in enumerate(part.layout.fields):
        stored, null = read_field(part, number, span)
        values[field.name] = python_values(stored, null, field.type)[place]
    return values
