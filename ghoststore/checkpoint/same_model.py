"""Checking that a model and a tokenizer are those that a part was built from. Errors show both values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ghoststore.checkpoint.bounds import ADAPTER_CONFIG
from ghoststore.checkpoint.config_identity import agreed_config, config_differences
from ghoststore.checkpoint.find import Checkpoint, holds_model, locate
from ghoststore.checkpoint.load import AnyCheckpoint, AnyTokenizer, find_checkpoint
from ghoststore.checkpoint.nanogpt import is_checkpoint_file
from ghoststore.checkpoint.objects import place_of
from ghoststore.checkpoint.tokenizer_identity import tokenizer_identity
from ghoststore.errors import MismatchError
from ghoststore.progress import Progress
from ghoststore.settings.option import in_objects
from ghoststore.settings.shared import AdapterUse, in_memory
from ghoststore.settings.shared import Checkpoint as CheckpointSource
from ghoststore.store.base.manifest import Manifest, difference_lines, differences
from ghoststore.store.base.own import is_own, is_place
from ghoststore.store.part.build_command import build_command
from ghoststore.store.part.part import Part

IDENTIFYING: dict[str, dict[str, type]] = {
    "checkpoint": {"fingerprint": str, "architecture": str, "config": dict},
    "tokenizer": {"fingerprint": str, "class": str, "special_tokens": dict},
}
"""The fields of a manifest that identify a model and a tokenizer, with their types."""


def checkpoint_section(identity: Mapping[str, Any], model: Any, stored: Manifest | None = None) -> dict[str, Any]:
    """The manifest's ``checkpoint``: the ``identity`` of the weights (see :meth:`Checkpoint.identity`), the class of
    the model, and its configuration.

    ``stored`` is the manifest that this one will be compared with. If both configurations mean the same in different
    releases of transformers, that of ``stored`` is used.
    """
    stored_config = None if stored is None else stored["checkpoint"]["config"]
    return {
        **identity,
        "architecture": type(model).__name__,
        "config": agreed_config(stored_config, model.config),
    }


def find_as_built(
    part: Part, checkpoint: CheckpointSource, base: str | Path | None = None, progress: Progress | None = None
) -> AnyCheckpoint:
    """:func:`find_checkpoint`, used as the build of ``part`` did where it is an adapter."""
    base, adapter = adapter_as_built(part, checkpoint, base, progress)
    return find_checkpoint(checkpoint, base=base, adapter=adapter, progress=progress)


def adapter_as_built(
    part: Part, checkpoint: CheckpointSource, base: str | Path | None, progress: Progress | None = None
) -> tuple[str | Path | None, AdapterUse | None]:
    """(base, use) of ``checkpoint`` where it is an adapter, as the build of ``part`` had them; None where it is none.

    ``base`` is what the user gives, else what the user's own build read.
    """
    if in_memory(checkpoint):
        return base, None
    assert isinstance(checkpoint, str | Path)
    adapter = part.manifest["checkpoint"].get("adapter")
    if adapter is None:
        if is_checkpoint_file(checkpoint):
            return base, None
        folder = locate(checkpoint, progress) if in_objects(checkpoint) else Path(checkpoint)
        beside = (folder / ADAPTER_CONFIG).exists() and holds_model(folder)
        return base, "ignore" if beside else None
    if base is None and is_own(part.manifest) and is_place(part.manifest["source"].get("base") or ""):
        base = part.manifest["source"]["base"]
    return base, "merge" if adapter["merged"] else "only"


def refuse_other_model(
    part: Part,
    checkpoint: AnyCheckpoint,
    identity: Mapping[str, Any],
    model: Any,
    tokenizer: Any,
    tokenizer_folder: AnyTokenizer,
) -> None:
    """MismatchError unless ``model`` and ``tokenizer`` are those that ``part`` was built from. It shows every
    difference.

    ``identity`` is that of the weights of ``checkpoint``, from which ``model`` was loaded.
    """
    stored = part.manifest["checkpoint"]
    own = {**identity, "architecture": type(model).__name__}
    weights = differences({name: value for name, value in stored.items() if name != "config"}, own, "checkpoint")
    config = config_differences(stored["config"], model.config)
    tokens = differences(part.manifest["tokenizer"], tokenizer_identity(tokenizer), "tokenizer")
    if not (weights or config or tokens):
        return
    others = [
        *([f"other weights than those in {checkpoint.where}"] if weights else []),
        *([f"another configuration than that of {checkpoint.config_where}"] if config else []),
        *([f"another tokenizer than that in {_where(tokenizer_folder)}"] if tokens else []),
    ]
    raise MismatchError(
        f"part {part.name!r} was built from {', '.join(others)}:\n"
        f"{difference_lines([*weights, *config, *tokens], 'found')}\n"
        "Bring the stored ones back, give `checkpoint` the folder that holds them, or build a part of this model under "
        "another name"
    )


def _where(tokenizer: AnyTokenizer) -> str:
    return place_of(tokenizer) if isinstance(tokenizer, Path) else str(tokenizer)


def refuse_incomplete(part: Part) -> None:
    """MismatchError for a part whose manifest does not identify its model and its tokenizer.

    The message has the missing fields, and the command that builds the part again.
    """
    manifest = part.manifest
    lacking = [
        f"{section}.{name}"
        for section, names in IDENTIFYING.items()
        for name, kind in names.items()
        if not isinstance(manifest[section].get(name), kind)
    ]
    if "template_date" not in manifest["tokens"]:
        lacking.append("tokens.template_date")
    if not lacking:
        return
    stdin = " (with its corpus on standard input)" if manifest["source"]["data"] == "-" else ""
    raise MismatchError(
        f"part {part.name!r} lacks {', '.join(lacking)} in its manifest, so nothing tells whether a model is the one "
        f"that it was built from. Remove {part.path}, or choose another name, and build it again{stdin}:\n"
        f"  {build_command(manifest, part.path.parent.parent, part.name)}"
    )


def start_section(checkpoint: Checkpoint | None, stored: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The section of a training run's manifest about the checkpoint that it started from: the fingerprint of its
    weights, and the configuration in its config.json. None for a new model.

    ``stored`` is the section that this one will be compared with.
    """
    if checkpoint is None:
        return None
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    stored_config = None if stored is None else stored["config"]
    return {"fingerprint": checkpoint.fingerprint(), "config": agreed_config(stored_config, config, training=True)}


def tokenizer_lines(stored: dict[str, Any], identity: dict[str, Any]) -> str:
    """For an error message: one line for each section in which two tokenizers differ."""
    return difference_lines(differences(stored, identity, "tokenizer"), "found")
