"""The manifest: everything that a part or a run was made of, and the comparison with other settings.

A manifest is plain JSON. The ``identity`` sections of its kind say what the numbers *are*: two manifests that differ
there describe different parts or runs. The others (``source``, ``software``, ``compute``) say how they were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, TypeAlias

from ghoststore.errors import CorruptError, MismatchError
from ghoststore.store.base.names import FORMAT_VERSION
from ghoststore.store.base.records import json_digest

Manifest = dict[str, Any]
Types: TypeAlias = tuple[type, ...]
_JSON: dict[type, str] = {
    dict: "an object",
    list: "a list of names",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
}
Difference = tuple[str, Any, Any]
"""(dotted path, stored value, other value)."""
SHOWN = 90
"""Characters of a value in a message."""
MOST_SPANS = 100_000_000
"""The name of a record has eight digits for the span."""
OPEN, ENDED = "open", "ended"
"""What ``storage.stream`` says of a part that is built from a stream: its end is not known, or it is."""
UNSEEN: Mapping[str, Any] = {"fingerprint": OPEN, "samples": 0, "domains": None, "repeated_ids": None}
"""What the section ``corpus`` says of a stream before its end is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of what a store holds in spans: parts or runs."""

    name: str
    made: str
    """The verb of messages on how it was made."""
    identity: tuple[str, ...]
    """Sections that must be equal to continue it."""
    description: tuple[str, ...]
    """Sections that may differ: paths, versions, devices."""
    parameter: str = "name"
    """The parameter that names it."""
    entries: Mapping[str, Mapping[str, Types]] = field(default_factory=dict)
    """By section, the entries that it must have and the types of each; lists hold names. ``a.b`` is an entry of the
    object ``a``, if that is not null.
    """
    optional: frozenset[str] = frozenset()
    """Of these entries, as ``section.entry``, those that may be missing."""


_NAMES: Types = (list,)
_OPTIONAL_NAMES: Types = (list, NoneType)
_OPTIONAL_TEXT: Types = (str, NoneType)
_OPTIONAL_NUMBER: Types = (int, float, NoneType)
_CORPUS: Mapping[str, Types] = {
    "domains": _OPTIONAL_NAMES,
    "repeated_ids": (dict, NoneType),
    "repeated_ids.ids": (int,),
    "repeated_ids.samples": (int,),
}

PART = Kind(
    name="part",
    made="built",
    identity=(
        "checkpoint",
        "tokenizer",
        "corpus",
        "tokens",
        "loss",
        "projection",
        "layers",
        "storage",
        "batching",
        "dtype",
    ),
    description=("source", "software", "compute", "coverage"),
    # The entries that identify a model and a tokenizer are checked where they are compared: the advice is known there.
    entries={
        "corpus": {
            **_CORPUS,
            "fingerprint": (str,),
            "samples": (int,),
            "max_samples": (int, NoneType),
            "skip_samples": (int,),
            "fields": (dict,),
            "head": (dict,),
            "head.samples": (int,),
        },
        "tokens": {"max_length": (int,), "overlong": (str,)},
        "loss": {"definition": (str,), "reduction": (str,)},
        "projection": {
            "layers": _NAMES,
            "exclude_layers": _NAMES,
            "include_embeddings": (bool,),
            "kind": (str,),
            "seed": (int,),
            "rank_total": (int, str, NoneType),
            "rank_min": (int, NoneType),
            "compress": (int, NoneType),
            "compress_by": _OPTIONAL_TEXT,
            "precondition": _OPTIONAL_TEXT,
            "damping": _OPTIONAL_NUMBER,
            "calibration": (dict, NoneType),
            "calibration.samples": (int,),
            "calibration.kept": (int,),
            "calibration.digest": (str,),
            "calibration_samples": (int, NoneType),
            "optimizer_state": _OPTIONAL_TEXT,
            "kronecker_dimension": (int,),
            "hash": _OPTIONAL_TEXT,
        },
        "batching": {"batch_tokens": (int,), "padding": (bool,)},
        "dtype": {"model": (str,)},
        "source": {
            "checkpoint": (str,),
            "tokenizer": _OPTIONAL_TEXT,
            "data": (str,),
            "form": (str,),
            "optimizer_state": _OPTIONAL_TEXT,
            "like": (dict,),
            "like.part": (str,),
            "like.hash": _OPTIONAL_TEXT,
        },
        "compute": {"attn_implementation": _OPTIONAL_TEXT, "gradient_checkpointing": (bool,)},
        "coverage": {"share": (int, float)},
    },
    optional=frozenset({"corpus.skip_samples", "corpus.head", "source.like", "source.like.part", "source.like.hash"}),
)
RUN = Kind(
    name="run",
    made="trained",
    identity=("model", "tokenizer", "corpus", "val", "training", "scoring", "storage"),
    description=("source", "software", "compute"),
    entries={"corpus": _CORPUS, "tokenizer": {"fingerprint": _OPTIONAL_TEXT}},
)


def attributes_of(manifest: Manifest, files: Mapping[str, str]) -> dict[str, Any]:
    """The attributes of a part's or run's group.

    They are the format version, the manifest, the SHA-256 by path of every other file that is written once, when the
    part or run is made (``files``), and the checksums of manifest and files.
    """
    return {
        "ghoststore_format": FORMAT_VERSION,
        "manifest": manifest,
        "manifest_sha256": json_digest(manifest),
        "files": dict(files),
        "files_sha256": json_digest(dict(files)),
    }


def manifest_of(attributes: Mapping[str, Any], where: str, kind: Kind) -> tuple[Manifest, dict[str, str]]:
    """The manifest and the files in a group's attributes, see :func:`attributes_of`.

    MismatchError for another format version, CorruptError if a checksum does not hold.
    """
    check_format(attributes, where)
    for name, words in (("manifest", "the manifest"), ("files", "the list of files")):
        value = attributes.get(name)
        if not isinstance(value, dict) or attributes.get(f"{name}_sha256") != json_digest(value):
            raise CorruptError(f"{where} does not hold {words} that was written: its checksum does not fit")
    manifest, files = attributes["manifest"], attributes["files"]
    missing = [name for name in (*kind.identity, *kind.description) if name not in manifest]
    if missing:
        raise CorruptError(f"{where} lacks the sections {missing} of a {kind.name}'s manifest")
    _check_sections(manifest, where, kind)
    if not all(isinstance(sha256, str) for sha256 in files.values()):
        raise CorruptError(f"{where} names files without a SHA-256")
    return manifest, files


def _check_sections(manifest: Manifest, where: str, kind: Kind) -> None:
    """CorruptError naming a section or entry of another type than every part or run has. Later readers rely on this."""
    for section in (*kind.identity, *kind.description):
        value, expected = manifest[section], list if section == "layers" else dict
        if not isinstance(value, expected):
            raise CorruptError(
                f"{where}: section {section!r} of its manifest is {_described(value)}; {_JSON[expected]} is due"
            )
        if isinstance(value, list) and not all(_is_layer(layer) for layer in value):
            raise CorruptError(f"{where}: section {section!r} of its manifest is no list of layers")
        for name, types in kind.entries.get(section, {}).items():
            expected_types = " or ".join(_JSON[kind_of_value] for kind_of_value in types)
            holder, _, last = name.rpartition(".")
            entries = manifest[section].get(holder) if holder else manifest[section]
            if entries is None:
                continue
            if last not in entries and f"{section}.{name}" in kind.optional:
                continue
            if last not in entries:
                raise CorruptError(f"{where} lacks '{section}.{name}' in its manifest; {expected_types} is due")
            entry = entries[last]
            # True is an int to Python, not to JSON.
            fits = isinstance(entry, types) and (not isinstance(entry, bool) or bool in types)
            if not fits or (isinstance(entry, list) and not all(isinstance(name, str) for name in entry)):
                raise CorruptError(
                    f"{where}: '{section}.{name}' of its manifest is {_described(entry)}; {expected_types} is due"
                )


def _is_layer(value: Any) -> bool:
    kinds = {"name": str, "type": str, "parameters": list, "modules": list, "shape": list, "ranks": list}
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def _described(value: Any) -> str:
    return f"{value!r:.60} ({_JSON.get(type(value), type(value).__name__)})"


def as_begun(manifest: Manifest) -> Manifest:
    """The manifest of a part of a stream as it was when the part was begun; any other manifest as it is."""
    storage = manifest.get("storage")
    if not isinstance(storage, dict) or storage.get("stream") is None or not isinstance(storage.get("span_rows"), int):
        return manifest
    storage = {**storage, "stream": OPEN, "rows": open_rows(storage["span_rows"])}
    return {**manifest, "corpus": {**manifest["corpus"], **UNSEEN}, "storage": storage}


def open_rows(span_rows: int) -> int:
    """Rows that the arrays of an open part have room for."""
    return span_rows * MOST_SPANS


def check_format(attributes: Mapping[str, Any], where: str) -> None:
    """MismatchError unless ``attributes`` are of a format version that this release reads."""
    version = attributes.get("ghoststore_format")
    if version is None:
        raise MismatchError(f"{where} is a Zarr group but not ghoststore's: it has no 'ghoststore_format' attribute")
    if version != FORMAT_VERSION:
        raise MismatchError(
            f"{where} has format version {version!r}; this release reads version {FORMAT_VERSION}. Use a release "
            "that reads it"
        )


def differences(stored: Any, other: Any, path: str = "") -> list[Difference]:
    """(path, stored value, other value) for each place where two JSON values differ."""
    if isinstance(stored, dict) and isinstance(other, dict):
        different = []
        for key in sorted({*stored, *other}):
            different += differences(stored.get(key), other.get(key), f"{path}.{key}" if path else key)
        return different
    return [] if stored == other else [(path, stored, other)]


def difference_lines(different: Sequence[Difference], verb: str = "asked for") -> str:
    """A line for each of the first differences: its path and both values, long ones from where they differ."""
    lines = []
    for path, stored, other in different[:12]:
        old, new = _excerpts(stored, other)
        lines.append(f"  {path}: stored {old}, {verb} {new}")
    if len(different) > 12:
        lines.append(f"  … and {len(different) - 12} more")
    return "\n".join(lines)


def _excerpts(stored: Any, other: Any) -> tuple[str, str]:
    """Both values as text; of long ones an excerpt from where they differ."""
    old, new = repr(stored), repr(other)
    same = next((index for index, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = same - 30 if same > SHOWN - 30 else 0
    pieces = (f"…{text[start:]}" if start else text for text in (old, new))
    old, new = (text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}…" for text in pieces)
    return old, new


def refuse_differences(stored: Manifest, wanted: Manifest, where: str, kind: Kind = PART) -> None:
    """MismatchError listing every identity value that differs, with both values."""
    different = [d for section in kind.identity for d in differences(stored[section], wanted[section], section)]
    if different:
        raise MismatchError(
            f"{where} was {kind.made} with other settings; nothing was changed:\n{difference_lines(different)}\n"
            f"Use the stored settings to continue it, or another `{kind.parameter}` for a new {kind.name}"
        )
