"""The manifest: what a part or a run was made of, in full, and the comparison that refuses anything else.

A manifest is plain JSON. Its kind's ``identity`` sections say what the numbers *are*: two manifests that differ
there describe different parts, or runs. The others (``source``, ``software``, ``compute``) say how they were made.
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
"""(dotted path, stored value, value that is asked for or found)."""
SHOWN = 90
"""Characters of a value in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a store holds in spans: parts and runs."""

    name: str
    made: str
    """How it came about, in a word."""
    identity: tuple[str, ...]
    """Sections that must be equal for the work to go on."""
    description: tuple[str, ...]
    """Sections that may differ: paths, versions, devices."""
    parameter: str = "name"
    """The parameter that names it."""
    entries: Mapping[str, Mapping[str, Types]] = field(default_factory=dict)
    """By section: entries that it must have, and what each may be (of lists, names). ``a.b`` is one of the object
    ``a``, where there is one.
    """


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
    # Those that tell a model and a tokenizer from others are asked for where they are compared, with what to do.
    entries={
        "corpus": {
            **_CORPUS,
            "fingerprint": (str,),
            "samples": (int,),
            "max_samples": (int, NoneType),
            "fields": (dict,),
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
        },
        "compute": {"attn_implementation": _OPTIONAL_TEXT, "gradient_checkpointing": (bool,)},
        "coverage": {"share": (int, float)},
    },
)
RUN = Kind(
    name="run",
    made="trained",
    identity=("model", "tokenizer", "corpus", "val", "training", "scoring", "storage"),
    description=("source", "software", "compute"),
    entries={"corpus": _CORPUS, "tokenizer": {"fingerprint": _OPTIONAL_TEXT}},
)


def attributes_of(manifest: Manifest, files: Mapping[str, str]) -> dict[str, Any]:
    """The attributes of a part's or run's group: format version, manifest, SHA-256 of every other file that is written
    when it is made and never again (by path in it), and the checksums of both.
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
    for name, what in (("manifest", "the manifest"), ("files", "the list of files")):
        value = attributes.get(name)
        if not isinstance(value, dict) or attributes.get(f"{name}_sha256") != json_digest(value):
            raise CorruptError(f"{where} does not hold {what} that was written: its checksum does not fit")
    manifest, files = attributes["manifest"], attributes["files"]
    missing = [name for name in (*kind.identity, *kind.description) if name not in manifest]
    if missing:
        raise CorruptError(f"{where} lacks the sections {missing} of a {kind.name}'s manifest")
    _check_sections(manifest, where, kind)
    if not all(isinstance(sha256, str) for sha256 in files.values()):
        raise CorruptError(f"{where} names files without a SHA-256")
    return manifest, files


def _check_sections(manifest: Manifest, where: str, kind: Kind) -> None:
    """CorruptError naming the section, or the entry, that is not what every {kind} has: nothing that reads it later has
    to expect anything else.
    """
    for section in (*kind.identity, *kind.description):
        value, wanted = manifest[section], list if section == "layers" else dict
        if not isinstance(value, wanted):
            raise CorruptError(
                f"{where}: section {section!r} of its manifest is {_found(value)}; {_JSON[wanted]} is due"
            )
        if isinstance(value, list) and not all(_is_layer(layer) for layer in value):
            raise CorruptError(f"{where}: section {section!r} of its manifest is no list of layers")
        for name, types in kind.entries.get(section, {}).items():
            due = " or ".join(_JSON[one] for one in types)
            holder, _, last = name.rpartition(".")
            entries = manifest[section][holder] if holder else manifest[section]
            if entries is None:
                continue
            if last not in entries:
                raise CorruptError(f"{where} lacks '{section}.{name}' in its manifest; {due} is due")
            entry = entries[last]
            # True is an int to Python, not to JSON.
            fits = isinstance(entry, types) and (not isinstance(entry, bool) or bool in types)
            if not fits or (isinstance(entry, list) and not all(isinstance(one, str) for one in entry)):
                raise CorruptError(f"{where}: '{section}.{name}' of its manifest is {_found(entry)}; {due} is due")


def _is_layer(value: Any) -> bool:
    kinds = {"name": str, "type": str, "parameters": list, "modules": list, "shape": list, "ranks": list}
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def _found(value: Any) -> str:
    return f"{value!r:.60} ({_JSON.get(type(value), type(value).__name__)})"


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


def differences(stored: Any, wanted: Any, path: str = "") -> list[Difference]:
    """(path, stored value, wanted value) wherever two JSON values differ."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        inside = []
        for key in sorted({*stored, *wanted}):
            inside += differences(stored.get(key), wanted.get(key), f"{path}.{key}" if path else key)
        return inside
    return [] if stored == wanted else [(path, stored, wanted)]


def difference_lines(different: Sequence[Difference], verb: str = "asked for") -> str:
    """A line for each of the first differences: its path and both values, long ones from where they part."""
    lines = []
    for path, stored, wanted in different[:12]:
        old, new = _shown(stored, wanted)
        lines.append(f"  {path}: stored {old}, {verb} {new}")
    if len(different) > 12:
        lines.append(f"  … and {len(different) - 12} more")
    return "\n".join(lines)


def _shown(stored: Any, wanted: Any) -> tuple[str, str]:
    """Both values; of long ones a piece from where they part."""
    old, new = repr(stored), repr(wanted)
    same = next((place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = same - 30 if same > SHOWN - 30 else 0
    pieces = (f"…{text[start:]}" if start else text for text in (old, new))
    old, new = (text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}…" for text in pieces)
    return old, new


def refuse_differences(stored: Manifest, wanted: Manifest, where: str, kind: Kind = PART) -> None:
    """MismatchError listing every identity value that differs, both sides shown."""
    different = [d for section in kind.identity for d in differences(stored[section], wanted[section], section)]
    if different:
        raise MismatchError(
            f"{where} was {kind.made} with other settings; nothing was changed:\n{difference_lines(different)}\n"
            f"Use the stored settings to continue it, or another `{kind.parameter}` for a new {kind.name}"
        )
