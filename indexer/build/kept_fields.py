"""Fields of samples that a build keeps as columns: their types, and a fingerprint of their values."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import date, datetime

import orjson

from ghoststore.corpus import Corpus, Sample
from ghoststore.corpus.fields import Kept
from ghoststore.errors import CorpusError, MismatchError, UsageError
from ghoststore.store import Part
from ghoststore.store.part.kept import MOST_FIELDS, RESERVED, FieldType, KeptField

EXACT = 2**53
"""From here on not every integer is a float64."""
WORDS: dict[FieldType, str] = {
    "string": "text",
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
    "date": "a date",
    "timestamp": "a time",
}


def checked_names(names: Sequence[str], corpus: Corpus) -> tuple[str, ...]:
    """The names of ``keep_fields``, sorted, each once. UsageError for one that no column can have."""
    wanted = (names,) if isinstance(names, str) else tuple(sorted(set(names)))
    if wanted and corpus.resolved.kind == "tokens":
        raise UsageError(
            f"`keep_fields`: {corpus.source} holds token shards, which have no fields but text, id and domain. Build "
            "from the corpus that they were made of"
        )
    for name in wanted:
        if name.lower() in RESERVED:
            advice = (
                "`store_text` keeps texts" if name.lower() == "text" else "give the field another name in the corpus"
            )
            raise UsageError(f"`keep_fields`: every part has a column {name.lower()!r} of its own; {advice}")
        if not name or "," in name:
            raise UsageError(f"`keep_fields`: {name!r} is no name of a field that can be kept: no commas, not empty")
    if len({name.lower() for name in wanted}) < len(wanted):
        raise UsageError(f"`keep_fields`: {', '.join(wanted)} differ in upper and lower case alone, which SQL ignores")
    if len(wanted) > MOST_FIELDS:
        raise UsageError(f"`keep_fields` names {len(wanted)} fields; at most {MOST_FIELDS} can be kept")
    return wanted


def refuse_other_fields(part: Part, names: Sequence[str]) -> None:
    """MismatchError if ``part`` keeps other fields than ``names``. It needs no scan of the corpus."""
    stored = [field.name for field in part.layout.fields]
    if stored != list(names):
        raise MismatchError(
            f"part {part.name!r} of {part.path.parent.parent} keeps {_listed(stored)}, and `keep_fields` asks for "
            f"{_listed(names)}: the fields of a part are settled when it is made. Give the same ones to continue it, "
            "or another `name` for a new one"
        )


def _listed(names: Sequence[str]) -> str:
    return f"the fields {','.join(names)}" if names else "no fields"


class KeptScan:
    """Sees every sample of a pass over ``corpus``; then :meth:`fields` and :attr:`fingerprint` are of its values."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._types: list[FieldType | None] = [None] * len(corpus.keep)
        self._first = [0] * len(corpus.keep)
        """Of each field the row with its first value, for messages."""
        self._large: list[tuple[int, int] | None] = [None] * len(corpus.keep)
        """Of each field an integer that is no float64, and its row."""
        self._hash = hashlib.sha256()

    def see(self, sample: Sample) -> None:
        """Take the values of one sample. CorpusError for one of another type than those before."""
        for place, value in enumerate(sample.kept):
            if value is not None:
                self._see(place, value, sample.source_row)
        data = kept_bytes(sample)
        self._hash.update(len(data).to_bytes(8, "little") + data)

    def _see(self, place: int, value: Kept, row: int) -> None:
        found, before = _type_of(value), self._types[place]
        if isinstance(value, int) and abs(value) > EXACT and self._large[place] is None:
            self._large[place] = (value, row)
        if before is None:
            self._types[place], self._first[place] = found, row
        elif {before, found} == {"int", "float"}:
            self._types[place] = "float"
        elif before != found:
            raise CorpusError(
                f"{self._corpus.source}: field {self._corpus.keep[place]!r} of `keep_fields` is {WORDS[before]} in row "
                f"{self._first[place]} and {WORDS[found]} in row {row}: a column holds values of one type"
            )

    @property
    def fingerprint(self) -> str:
        """Of all values, in order."""
        return f"sha256:{self._hash.hexdigest()}"

    def fields(self, none: str = "no sample has") -> tuple[KeptField, ...]:
        """Name and type of each field. CorpusError for one that no sample has a value in; ``none`` says of which."""
        fields = []
        for place, name in enumerate(self._corpus.keep):
            kind, large = self._types[place], self._large[place]
            if kind is None:
                of_first = (
                    f"; the first row has {', '.join(map(repr, names))}" if (names := self._corpus.field_names) else ""
                )
                raise CorpusError(
                    f"{self._corpus.source}: {none} a value in the field {name!r} of `keep_fields`{of_first}"
                )
            if kind == "float" and large is not None:
                raise CorpusError(
                    f"{self._corpus.source}: field {name!r} of `keep_fields` holds fractions, and in row {large[1]} "
                    f"the integer {large[0]}, which no column of both holds exactly"
                )
            fields.append(KeptField(name=name, type=kind))
        return tuple(fields)


def refuse_misfits(source: str, fields: Sequence[KeptField], sample: Sample) -> None:
    """CorpusError for a value of ``sample`` that the column of its field, whose type is settled, does not hold."""
    for field, value in zip(fields, sample.kept, strict=True):
        if value is None or (found := _type_of(value)) == field.type:
            continue
        if (found, field.type) == ("int", "float") and isinstance(value, int) and abs(value) <= EXACT:
            continue
        raise CorpusError(
            f"{source}: field {field.name!r} of `keep_fields` was {field.type} in the rows at the head of the stream, "
            f"and is {found} in {sample}: {value!r:.80}. Mend the field, or build without it under another `name`"
        )


def kept_bytes(sample: Sample) -> bytes:
    """The bytes of the kept values that hashes cover."""
    return orjson.dumps(sample.kept, default=str)


def _type_of(value: Kept) -> FieldType:
    # True is an int, and a time is a date: the narrower type comes first.
    types: tuple[tuple[type, FieldType], ...] = (
        (bool, "bool"), (int, "int"), (float, "float"), (str, "string"), (datetime, "timestamp"), (date, "date"),
    )  # fmt: skip
    return next(name for kind, name in types if isinstance(value, kind))
