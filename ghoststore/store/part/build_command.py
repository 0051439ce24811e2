"""Makes the command that builds a part again from its manifest."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ghoststore.settings.build import BuildOptions
from ghoststore.settings.flags import entries_of
from ghoststore.settings.projection import unsketched
from ghoststore.store.base.manifest import Manifest
from ghoststore.store.part.kept import fields_of
from ghoststore.store.part.part import Part

DEFAULTS: dict[str, Any] = {
    **{entry.flag: entry.spec.default for entry in entries_of(BuildOptions)},
    "--attn-implementation": "sdpa",
    "--text-field": "text",
    "--id-field": "id",
    "--domain-field": "domain",
}
"""Values that the command leaves out: the defaults of options, and what these defaults stand for."""


def build_command(manifest: Manifest, store: Path, name: str) -> str:
    """The command ``ghoststore build …``, quoted for a shell, that builds what ``manifest`` describes."""
    words = ["ghoststore", "build"]
    for option, value in _options(manifest, store, name):
        if value is None or value is False or value == DEFAULTS.get(option):
            continue
        words += [option] if value is True else [option, str(value)]
    return shlex.join(words)


def command_of(**options: Any) -> str:
    """The command ``ghoststore build …``, quoted for a shell, with these options; each value of a list has its own
    flag, and None leaves an option out.
    """
    words = ["ghoststore", "build"]
    for name, value in options.items():
        for one in value if isinstance(value, list | tuple) else [] if value is None else [value]:
            words += [f"--{name.replace('_', '-')}", str(one)]
    return shlex.join(words)


def flags_of(parts: Iterable[Part]) -> str:
    """The words of a command that name ``parts``."""
    return " ".join(f"--part {part.name}" for part in parts)


def _options(manifest: Manifest, store: Path, name: str) -> Iterator[tuple[str, Any]]:
    """(option, value); None or False leaves the option out, True stands for a switch."""
    source, compute, storage = manifest["source"], manifest["compute"], manifest["storage"]
    adapter = manifest["checkpoint"].get("adapter")
    yield "--checkpoint", source["checkpoint"]
    yield "--base", source.get("base")
    yield "--adapter", None if adapter is None else "merge" if adapter["merged"] else "only"
    yield "--tokenizer", source["tokenizer"]
    yield from (("--data", path) for path in source.get("stream", source["data"]).split("\n"))
    yield "--stream", storage.get("stream") is not None
    yield "--store", store
    yield "--name", name
    yield "--like", source.get("like", {}).get("part")
    yield from _fields(manifest["corpus"]["fields"])
    yield "--max-length", manifest["tokens"]["max_length"]
    yield "--overlong", manifest["tokens"]["overlong"]
    yield "--skip-samples", manifest["corpus"].get("skip_samples", 0)
    yield "--max-samples", manifest["corpus"]["max_samples"]
    yield "--batch-tokens", manifest["batching"]["batch_tokens"]
    yield "--span-rows", storage["span_rows"]
    kept_unasked = source["data"] == "-"
    yield "--store-text", storage["store_text"] and not kept_unasked
    yield "--no-store-text", kept_unasked and not storage["store_text"]
    yield "--keep-fields", ",".join(field.name for field in fields_of(storage)) or None
    yield "--loss-reduction", manifest["loss"]["reduction"]
    yield "--model-dtype", manifest["dtype"]["model"]
    yield "--attn-implementation", compute["attn_implementation"]
    yield "--gradient-checkpointing", compute["gradient_checkpointing"]
    yield "--optimizer-state", source["optimizer_state"]
    yield "--proj-dtype", storage["dtype"]
    yield from _projection(
        manifest["projection"], manifest["layers"], of_adapter=adapter is not None and not adapter["merged"]
    )


def _fields(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if fields["kind"] == "tokens":  # token shards name their fields themselves
        return
    for role in ("text", "prompt", "completion", "messages", "id", "domain"):
        yield f"--{role}-field", fields[role]
    for name in ("encoding", "delimiter"):
        yield f"--{name}", fields.get(name)


def _projection(stored: dict[str, Any], layers: list[dict[str, Any]], *, of_adapter: bool) -> Iterator[tuple[str, Any]]:
    default = ["adapter"] if of_adapter else ["mlp", "attn"]
    yield "--proj-layers", None if stored["layers"] == default else ",".join(stored["layers"])
    yield "--exclude-layers", ",".join(stored["exclude_layers"]) or None
    yield "--include-embeddings", stored["include_embeddings"]
    yield "--proj-rank-total", stored["rank_total"]
    yield "--proj-rank-min", stored["rank_min"]
    yield "--proj-kind", stored["kind"]
    yield "--proj-seed", stored["seed"]
    by_default = stored["rank_total"] is not None or unsketched(stored, layers) == "auto"
    yield "--proj-compress", stored["compress"] or (None if by_default else "none")
    yield "--proj-compress-by", stored["compress_by"] if stored["compress"] else None
    yield "--proj-precondition", stored["precondition"]
    yield "--proj-damping", stored["damping"]
    yield "--calibration-samples", stored["calibration_samples"]
