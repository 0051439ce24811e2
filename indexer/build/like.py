"""A part like another one, of other rows: what it takes from that part, and what may not differ.

It has the same checkpoint, tokenizer, projection and settings, and keeps a copy of what the other one learned, so that
the vectors of both can be ranked together: ``docs/design/0022-growth.md``.
"""

from __future__ import annotations

from typing import Any

from ghoststore.checkpoint.same_model import adapter_as_built, refuse_incomplete
from ghoststore.corpus import Corpus, Fields, ResolvedFields
from ghoststore.errors import MismatchError, UsageError
from ghoststore.settings.build import BuildOptions
from ghoststore.settings.projection import config_of
from ghoststore.settings.shared import Data, is_stdin
from ghoststore.store import Manifest, Part, PartLayout, Store
from ghoststore.store.base.manifest import Difference, difference_lines, differences
from ghoststore.store.base.own import source_path
from ghoststore.store.part.kept import KeptField

ALIKE = ("checkpoint", "tokenizer", "tokens", "loss", "dtype", "projection", "layers")
"""Sections of the manifest that two parts must share to be ranked as one."""
STORED = ("dimension", "dtype", "groups")
"""Entries of the section ``storage`` that they must share, too."""


def settings_as_built(part: Part) -> dict[str, Any]:
    """The options that ``part`` was built with, by name, apart from its inputs and its name."""
    manifest = part.manifest
    storage, compute = manifest["storage"], manifest["compute"]
    return {
        "max_length": manifest["tokens"]["max_length"],
        "overlong": manifest["tokens"]["overlong"],
        "batch_tokens": manifest["batching"]["batch_tokens"],
        "span_rows": storage["span_rows"],
        "store_text": storage["store_text"],
        "keep_fields": tuple(field.name for field in part.layout.fields),
        "loss_reduction": manifest["loss"]["reduction"],
        "model_dtype": manifest["dtype"]["model"],
        "attn_implementation": compute["attn_implementation"],
        "gradient_checkpointing": compute["gradient_checkpointing"],
        "proj_dtype": storage["dtype"],
        "projection": config_of(manifest["projection"], manifest["layers"]),
    }


def resolved(options: BuildOptions) -> BuildOptions:
    """``options`` with those that are not given taken from the part that ``like`` names.

    UsageError if there is neither a checkpoint nor such a part, for a part that is not there, or whose checkpoint the
    user has to give.
    """
    if options.like is None:
        if options.checkpoint is None:
            raise UsageError("give `checkpoint`; or `like`, a part of the store with the one that is wanted")
        return options
    part, given = part_like(options), {name: value for name, value in vars(options).items() if value is not None}
    refuse_incomplete(part)
    whose = f"part {part.name!r}"
    checkpoint = source_path(part.manifest, "checkpoint", whose, "checkpoint", options.checkpoint)
    if checkpoint is None:
        raise UsageError(
            f"{whose} was built from a model in memory: give `checkpoint`, that model or the folder it was saved to"
        )
    base, adapter = adapter_as_built(part, checkpoint, options.base, options.progress)
    taken = {
        **settings_as_built(part),
        "checkpoint": checkpoint,
        "base": base,
        "adapter": adapter,
        "tokenizer": source_path(part.manifest, "tokenizer", whose, "tokenizer", options.tokenizer),
    }
    if part.layout.spans == 1:  # its spans may be shorter than they would be of more rows
        del taken["span_rows"]
    return BuildOptions(**{**taken, **given})


def part_like(options: BuildOptions) -> Part:
    """The part that ``like`` names, opened."""
    assert options.like is not None
    return Store.open(options.store).part(options.like)


def fields_like(part: Part, data: Data, *, stream: bool = False) -> Fields | ResolvedFields:
    """The names of fields of ``part``, where ``data`` has the form of its corpus, compressed or not; else the
    conventional ones.
    """
    form, built_from = (
        "jsonl" if is_stdin(data) else Corpus.open(data, stream=stream).form,
        part.manifest["source"]["form"],
    )
    alike = form.partition(".")[0] == built_from.partition(".")[0]
    return ResolvedFields.from_json(part.manifest["corpus"]["fields"]) if alike else Fields()


def refuse_unlike(part: Part, wanted: Manifest, layout: PartLayout, *, learned: bool) -> None:
    """MismatchError unless vectors of ``wanted`` can be ranked together with those of ``part``, with every value that
    differs. What is ``learned`` is compared once it is known.
    """
    later = () if learned else ("projection.calibration", "projection.hash", "projection.optimizer_state")
    storage = (*STORED, "span_rows") if part.layout.spans > 1 and layout.spans > 1 else STORED
    different: list[Difference] = [
        found for section in ALIKE for found in differences(part.manifest[section], wanted[section], section)
    ]
    stored, kept = ([field.name for field in fields] for fields in (part.layout.fields, layout.fields))
    different += differences(stored, kept, "storage.fields")
    for name in storage if learned else [name for name in storage if name != "groups"]:
        different += differences(part.manifest["storage"][name], wanted["storage"][name], f"storage.{name}")
    different = [found for found in different if not any(f"{found[0]}.".startswith(f"{name}.") for name in later)]
    if different:
        raise MismatchError(
            f"a part like {part.name!r} of {part.path.parent.parent} has its settings; nothing was changed:\n"
            f"{difference_lines(different)}\n"
            "Leave these options out, they are taken from that part; or build without `like`, for a part that is "
            "ranked alone"
        )


def kept_like(part: Part, fields: tuple[KeptField, ...]) -> tuple[KeptField, ...]:
    """The kept ``fields`` of the new rows with the types of those of ``part``. MismatchError where values do not fit.

    Whole numbers are kept as fractions where those of the part are.
    """
    for stored, found in zip(part.layout.fields, fields, strict=True):
        if found.type != stored.type and (found.type, stored.type) != ("int", "float"):
            raise MismatchError(
                f"part {part.name!r} of {part.path.parent.parent} keeps the field {stored.name!r} as {stored.type}; "
                f"it is {found.type} in the new rows: no condition could be asked of both. Build without `like`, or "
                "mend the field"
            )
    return part.layout.fields
