"""What tests read of parts, by the numbers on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from ghoststore.corpus import open_corpus
from ghoststore.progress import Silent
from ghoststore.store import Part
from query.ask.question import Question
from query.ask.scorer import Scorer, open_scorer
from query.search.parts import open_parts


def vectors_of(part: Part, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
    """(rows, D): the vectors of rows ``start`` to ``stop`` (default: the last), decoded."""
    stop = part.layout.rows if stop is None else stop
    scale = part.read("scale", start, stop) if part.encoding.scaled else None
    return part.encoding.decode(part.read("vectors", start, stop), scale, part.groups)


def unbuild(part: Part, *spans: int) -> Callable[[], None]:
    """Take spans out as if they had never been built; what is returned puts them back."""
    keys = [key for span in spans for key in (f"commits/{span:08d}.json", *part.layout.span_keys(span))]
    files = {part.path / key: (part.path / key).read_bytes() for key in keys}
    for file in files:
        file.unlink()

    def put_back() -> None:
        for file, data in files.items():
            file.write_bytes(data)

    return put_back


@contextmanager
def opened_scorer(question: Question, *, keep_model: bool = False) -> Iterator[Scorer]:
    """The scorer that ``ghoststore.query`` opens for ``question``."""
    progress = Silent()
    parts, weights = open_parts(question.store, question.part, question.part_weights, progress)
    with (
        open_corpus(str(question.val_set), question.val_fields(), progress) as val_set,
        question.opened_minus(progress) as minus,
    ):
        yield open_scorer(question, parts, weights, val_set, progress, minus=minus, keep_model=keep_model)
