"""The texts of rows: from the store if it keeps them, else from the source, row by row checked."""

from __future__ import annotations

from collections.abc import Sequence

<<<<<<< HEAD
from ghoststore.corpus import Position
from ghoststore.errors import CorpusError, CorruptError, MismatchError
=======
from ghoststore.corpus import Corpus, Position, ResolvedFields
from ghoststore.errors import UsageError
>>>>>>> wt-d
from ghoststore.progress import Progress
from ghoststore.store import Part, Run


<<<<<<< HEAD
def texts_of(part: Part, rows: Sequence[int], progress: Progress) -> list[str | None]:
    """One text for each of ``rows``; None where the source is gone or the row is no longer the one built from.
    Tokens of token shards are decoded by the tokenizer that lies with them.
=======
def texts_of(source: Part | Run, rows: Sequence[int], progress: Progress) -> list[str | None]:
    """One text for each of ``rows`` of a part, or of a run's row table.
>>>>>>> wt-d

    None where the corpus is gone or the row is no longer the one that was built from or trained on. What could not be
    shown is said once, through ``progress``.
    """
<<<<<<< HEAD
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
=======
    if not rows:
        return []
    if isinstance(source, Part) and source.layout.store_text:
        return [str(text) for text in source.read_rows("text", rows)]
    table = source if isinstance(source, Part) else source.rows
    try:
        corpus = corpus_behind(source)
        places = [
            Position(source_row=int(row), file=int(file), offset=int(offset))
            for row, file, offset in zip(
                *(table.read_rows(name, rows) for name in ("source_row", "source_file", "source_offset")),
                strict=True,
            )
        ]
        found = corpus.fetch(places)
    except UsageError as error:
        progress.note(f"texts are not shown: {error}")
        return [None] * len(rows)
    texts: list[str | None] = []
    for place, digest in zip(places, table.read_rows("source_digest", rows), strict=True):
        sample = found.get(place.source_row)
        same = sample is not None and sample.digest() == int(digest)
        texts.append(sample.preview() if sample is not None and same else None)
>>>>>>> wt-d
    changed = sum(text is None for text in texts)
    if changed:
        progress.note(
            f"{changed} of {len(rows)} texts are not shown: {corpus.source} has changed since the {source.kind.name} "
            f"was {source.kind.made}"
        )
    return texts


def corpus_behind(source: Part | Run) -> Corpus:
    """The corpus that a part was built from, or a run's tokens were made of, where it still is.

    UsageError (CorpusError) if it is gone, or cannot be found again.
    """
    name = f"{source.kind.name} {source.name!r}"
    data = source.manifest["source"].get("data" if isinstance(source, Part) else "corpus")
    fields = source.manifest["corpus"].get("fields")
    if data is None or fields is None:
        raise UsageError(f"{name} does not say which corpus it was {source.kind.made} on")
    if data == "-":
        raise UsageError(f"{name} was {source.kind.made} on standard input, which cannot be read again")
    return Corpus.open(data, ResolvedFields.from_json(fields))
