"""The run that a training is about to write: its place in a store, its arrays, its rows and its manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ghoststore.checkpoint.config_identity import agreed_config
from ghoststore.settings.train import OnStoreError
from ghoststore.software import versions_of
from ghoststore.store import Store
from ghoststore.store.base.manifest import RUN, Manifest, refuse_differences
from ghoststore.store.base.names import check_name
from ghoststore.store.base.object_folders import is_there
from ghoststore.store.base.object_path import location
from ghoststore.store.run.layout import RunLayout
from ghoststore.store.run.rows import RowTable
from ghoststore.store.run.run import Run, create_run
from ghoststore.store.spans.soundness import refuse_damaged
from indexer.dotprod import GradDotProdEngine


class Rows(Protocol):
    """The samples of a training."""

    def table(self) -> RowTable:
        """The row table of its run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run is made of, before its first step."""

    store: str | Path
    name: str
    layout: RunLayout
    manifest: Manifest
    rows: Rows
    on_store_error: OnStoreError
    config: Any = None
    """A transformers configuration, where that of ``manifest`` may be said in the words of the run that is there."""

    def open(self) -> tuple[Run, bool]:
        """The run, and whether it is new. MismatchError if it is there with other settings, CorruptError if it is
        damaged as far as records and sizes of files tell.
        """
        path = Store.create(self.store).run_path(check_name(self.name))
        new = not is_there(path)
        if new:
            manifest = self.manifest
        else:
            stored = Run(path)
            refuse_damaged(stored)
            manifest = self._in_words_of(stored.manifest)
        return create_run(path, manifest, self.rows.table()), new

    def refuse_other(self) -> None:
        """MismatchError if the run is there with other settings. Writes nothing."""
        path = location(self.store) / "runs" / check_name(self.name)
        if is_there(path):
            stored = Run(path).manifest
            wanted = json.loads(json.dumps(self._in_words_of(stored)))
            refuse_differences(stored, wanted, f"run {self.name!r} of {self.store}", RUN)

    def _in_words_of(self, stored: Manifest) -> Manifest:
        """The manifest, in the spans of ``stored``, and with the configuration as it has it if a release of
        transformers that knew other fields wrote the same there.
        """
        manifest = {**self.manifest, "storage": self.layout.in_spans_of(stored["storage"]).to_json()}
        if self.config is None:
            return manifest
        config = agreed_config(stored["model"].get("config"), self.config, training=True)
        return {**manifest, "model": {**manifest["model"], "config": config}}


def run_manifest(sections: Mapping[str, Any], layout: RunLayout, *packages: str) -> Manifest:
    """The manifest of a run (``docs/format.md``): ``sections`` as its training states them, with the layout of its
    arrays, and the versions of ``packages`` among those of all runs.
    """
    software = versions_of("ghoststore", "torch", *packages, "numpy", "zarr")
    known = {**sections, "storage": layout.to_json(), "software": software}
    return {name: known[name] for name in (*RUN.identity, *RUN.description)}


def parameter_count(model: torch.nn.Module, *, trainable: bool = False) -> int:
    """Numbers in the weights, or in those that are ``trainable``; a tied weight counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def projection_hash(engine: GradDotProdEngine | None) -> str | None:
    """What tells the projection of sketched scores from others; None for exact scores."""
    projection = getattr(engine.method, "projection", None) if engine is not None else None
    return None if projection is None else str(projection.hash)
