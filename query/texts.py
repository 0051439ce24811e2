"""The texts of rows: from the store if it keeps them, else from the source, row by row checked."""

from __future__ import annotations

from collections.abc import Sequence

from ghoststore.corpus import Position
from ghoststore.errors import CorpusError, CorruptError, MismatchError
from ghoststore.progress import Progress
from ghoststore.store import Part
from indexer.build import corpus_of


def texts_of(part: Part, rows: Sequence[int], progress: Progress) -> list[str | None]:
    """One text for each of ``rows``; None where the source is gone or the row is no longer the one built from.
    Tokens of token shards are decoded by the tokenizer that lies with them.

    What could not be shown is said once, through ``progress``.
    """
    if part.layout.store_text:
        return [str(text) for text in part.read_rows("text", rows)]
    source = part.manifest["source"]["data"]
    places = [
        Position(source_row=int(row), file=int(file), offset=int(offset))
        for row, file, offset in zip(
            *(part.read_rows(name, rows) for name in ("source_row", "source_file", "source_offset")),
            strict=True,
        )
    ]
    digests = part.read_rows("source_digest", rows)
    texts: list[str | None] = []
    try:
        found = corpus_of(part).fetch(places)
        for place, digest in zip(places, digests, strict=True):
            sample = found.get(place.source_row)
            same = sample is not None and sample.digest() == int(digest)
            texts.append(sample.preview() if sample is not None and same else None)
    except (CorpusError, CorruptError, MismatchError) as error:  # of the source: the store is read by now
        progress.note(f"texts are not shown: {error}")
        return [None] * len(rows)
    changed = sum(text is None for text in texts)
    if changed:
        progress.note(f"{changed} of {len(rows)} texts are not shown: {source} has changed since the part was built")
    return texts
