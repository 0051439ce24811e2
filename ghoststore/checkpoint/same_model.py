"""Whether a model and a tokenizer are those that a part was built from; what is not is refused with both values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ghoststore.checkpoint.config_identity import agreed_config, config_differences
from ghoststore.checkpoint.load import Checkpoint
from ghoststore.checkpoint.tokenizer_identity import tokenizer_identity
from ghoststore.errors import MismatchError
from ghoststore.store.base.manifest import Manifest, difference_lines, differences
from ghoststore.store.part.build_command import build_command
from ghoststore.store.part.part import Part

IDENTIFYING: dict[str, dict[str, type]] = {
    "checkpoint": {"fingerprint": str, "architecture": str, "config": dict},
    "tokenizer": {"fingerprint": str, "class": str, "special_tokens": dict},
}
"""Fields of a manifest without which a model or a tokenizer cannot be told from another, and their types."""


def checkpoint_section(fingerprint: str, model: Any, stored: Manifest | None = None) -> dict[str, Any]:
    """The manifest's ``checkpoint``: the fingerprint of the weights, the class of the model, its configuration.

    ``stored`` is the manifest that this one is going to be compared with: where both configurations say the same, in
    the words of different releases of transformers, those of ``stored`` are taken.
    """
    said = None if stored is None else stored["checkpoint"]["config"]
    return {
        "fingerprint": fingerprint,
        "architecture": type(model).__name__,
        "config": agreed_config(said, model.config),
    }


def refuse_other_model(
    part: Part, checkpoint: Checkpoint, fingerprint: str, model: Any, tokenizer: Any, tokenizer_folder: Path
) -> None:
    """MismatchError naming every field in which the model in the folder of ``checkpoint``, whose weights have this
    ``fingerprint``, or the tokenizer in its folder, are not those that ``part`` was built from.
    """
    stored = part.manifest["checkpoint"]
    own = {"fingerprint": fingerprint, "architecture": type(model).__name__}
    weights = differences({name: stored[name] for name in own}, own, "checkpoint")
    config = config_differences(stored["config"], model.config)
    tokens = differences(part.manifest["tokenizer"], tokenizer_identity(tokenizer), "tokenizer")
    if not (weights or config or tokens):
        return
    folder = checkpoint.folder
    others = [
        *([f"other weights than those in {folder}"] if weights else []),
        *([f"another configuration than that of {folder / 'config.json'}"] if config else []),
        *([f"another tokenizer than that in {tokenizer_folder}"] if tokens else []),
    ]
    raise MismatchError(
        f"part {part.name!r} was built from {', '.join(others)}:\n"
        f"{difference_lines([*weights, *config, *tokens], 'found')}\n"
        "Bring the stored ones back, give `checkpoint` the folder that holds them, or build a part of this model under "
        "another name"
    )


def refuse_incomplete(part: Part) -> None:
    """MismatchError for a part whose manifest does not identify its model and its tokenizer: nothing tells whether a
    model is the one. Says which fields are missing, and the command that builds the part again.
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
    """What a training run says of the checkpoint that it began with: its weights, and its configuration as its
    config.json has it. None for a new model. ``stored`` is the section that this one is going to be compared with.
    """
    if checkpoint is None:
        return None
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    said = None if stored is None else stored["config"]
    return {"fingerprint": checkpoint.fingerprint(), "config": agreed_config(said, config, training=True)}


def tokenizer_lines(stored: dict[str, Any], found: dict[str, Any]) -> str:
    """A line for each section in which two tokenizers differ, for the message of an error."""
    return difference_lines(differences(stored, found, "tokenizer"), "found")
