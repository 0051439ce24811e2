"""The texts of rows: from the store if it keeps them, else from the corpus, after each sample's digest is compared."""

from __future__ import annotations

from collections.abc import Sequence

from ghoststore.corpus import Corpus, Position, ResolvedFields, source_name
from ghoststore.corpus.joined import JoinedCorpora
from ghoststore.errors import CorruptError, MismatchError, StorageError, UsageError
from ghoststore.progress import Progress
from ghoststore.settings.shared import Data
from ghoststore.store import Part, Run
from ghoststore.store.base.own import source_path


def texts_of(source: Part | Run, rows: Sequence[int], progress: Progress, data: Data | None = None) -> list[str | None]:
    """One text for each of ``rows`` of a part, or of a run's row table. ``data`` is the corpus if the user names one.

    The text is None where the corpus is gone, or where the sample has changed since the build or the training. Token
    shards are decoded by the tokenizer beside them. One note to ``progress`` says what could not be shown.
    """
    if not rows:
        return []
    if isinstance(source, Part) and len(source.members) > 1:
        of_rows: dict[int, str | None] = {}
        for part, at, own in source.located(rows):
            of_rows.update(zip(at.tolist(), texts_of(part, own.tolist(), progress, data), strict=True))
        return [of_rows[place] for place in range(len(rows))]
    if isinstance(source, Part) and source.layout.store_text:
        if data is not None:
            progress.note(
                f"texts are those that part {source.name!r} keeps; `data={source_name(data)}` is not read for them"
            )
        return [str(text) for text in source.read_rows("text", rows)]
    table = source if isinstance(source, Part) else source.rows
    places = [
        Position(source_row=int(row), file=int(file), offset=int(offset))
        for row, file, offset in zip(
            *(table.read_rows(name, rows) for name in ("source_row", "source_file", "source_offset")),
            strict=True,
        )
    ]
    digests = table.read_rows("source_digest", rows)
    texts: list[str | None] = []
    try:
        corpus = corpus_behind(source, data)
        samples = corpus.fetch(places)
        for place, digest in zip(places, digests, strict=True):
            sample = samples.get(place.source_row)
            same = sample is not None and sample.digest() == int(digest)
            texts.append(sample.preview() if sample is not None and same else None)
    except (UsageError, CorruptError, MismatchError, StorageError) as error:
        # Only the corpus can fail here: the store has been read.
        progress.note(f"texts are not shown: {error}")
        return [None] * len(rows)
    changed = sum(text is None for text in texts)
    if changed:
        progress.note(
            f"{changed} of {len(rows)} texts are not shown: {corpus.source} has changed since the {source.kind.name} "
            f"was {source.kind.made}"
        )
    return texts


def corpora_behind(source: Part | Run, data: Data | None = None) -> Corpus | JoinedCorpora:
    """:func:`corpus_behind`; of a union those of all its parts, joined. UsageError if these are of different forms."""
    if not isinstance(source, Part) or len(source.members) == 1:
        return corpus_behind(source, data)
    corpora = [corpus_behind(part) for part in source.members]
    return JoinedCorpora(corpora, [source.first_source_row(part) for part in source.members])


def corpus_behind(source: Part | Run, data: Data | None = None) -> Corpus:
    """The corpus that a part was built from, or that the tokens of a run were made of.

    Read from ``data`` if the user gives it, else from where the user's own command read it. UsageError (CorpusError) if
    it is gone, cannot be read again, or if somebody else may have written the recorded path.
    """
    name = f"{source.kind.name} {source.name!r}"
    key = "data" if isinstance(source, Part) else "corpus"
    recorded, fields = source.manifest["source"].get(key), source.manifest["corpus"].get("fields")
    if (recorded is None and data is None) or fields is None:
        raise UsageError(f"{name} does not say which corpus it was {source.kind.made} on")
    path = source_path(source.manifest, key, name, "data", data)
    if path is None:
        raise UsageError(
            f"{name} was {source.kind.made} on standard input or on data in memory, which cannot be read again: "
            "give `data`, with the same samples"
        )
    return Corpus.open(path, ResolvedFields.from_json(fields))
