"""A val set through the same model, tokens and projection as the part it is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.checkpoint import find_checkpoint, fingerprint_tokenizer, load_model, load_tokenizer
from ghoststore.corpus import Corpus
from ghoststore.errors import MismatchError, UsageError
from ghoststore.progress import Progress
from ghoststore.store import Part, Status
from ghoststore.store.part import fixed_array
from indexer.encoder import RowEncoder
from indexer.optimizer_state import SCALES, SideScales, unflat
from indexer.plan import plan_batches
from indexer.projection import Projection, ProjectionConfig, ProjectionPlan
from indexer.rows import Row, Tokenizer, TokenSettings, rows_of
from indexer.selection import select_blocks

ROWS_AT_ONCE = 1024
Grouping = Literal["mean", "each", "domain"]


@dataclass(slots=True, kw_only=True)
class ValVectors:
    """What a val set became: one vector a val sample, a domain, or for all."""

    vectors: Tensor
    """(M, D) float32 on the CPU."""
    ids: list[str]
    """One each for a vector: the sample's id, the domain, or ``mean``."""
    used: int
    """Val rows that have a vector."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Val rows without one, by status."""
    rows_of: dict[str, int] = field(default_factory=dict)
    """Val rows of each mean."""


def projection_of(part: Part, model: Any) -> Projection:
    """The projection that the manifest of ``part`` describes, drawn again for ``model``.

    MismatchError if its layers or its hash come out otherwise.
    """
    stored = part.manifest["projection"]
    config = ProjectionConfig(
        layers=tuple(stored["layers"]),
        exclude_layers=tuple(stored["exclude_layers"]),
        include_embeddings=stored["include_embeddings"],
        rank_total=stored["rank_total"],
        rank_min=stored["rank_min"],
        seed=stored["seed"],
        kind=stored["kind"],
        compress=stored["compress"] or "none",
    )
    selection = select_blocks(model, config.layers, config.exclude_layers, include_embeddings=config.include_embeddings)
    plan = ProjectionPlan.of(selection, config)
    if plan.layers_json() != part.manifest["layers"]:
        raise MismatchError(f"part {part.name!r}: the layers of this model are not those that the part was built from")
    drawn = Projection(plan, _scales(part, plan))
    if drawn.hash != stored["hash"]:
        raise MismatchError(
            f"part {part.name!r}: its projection matrices have the hash {stored['hash']}, but this release draws "
            f"{drawn.hash} from the same seed; query with the release that built it ({part.manifest['software']})"
        )
    return drawn


def _scales(part: Part, plan: ProjectionPlan) -> dict[str, SideScales] | None:
    """Those that ``--optimizer-state`` gave the part."""
    if part.manifest["projection"].get("optimizer_state") is None:
        return None
    arrays = {name: fixed_array(part, name) for name in SCALES}
    try:
        return unflat(arrays, [layer.block for layer in plan.layers])
    except ValueError as error:
        raise MismatchError(f"part {part.name!r}: its scales are not of these layers: {error}") from error


def load_for(part: Part, checkpoint: str | Path | None, device: str) -> tuple[Any, Tokenizer]:
    """The model and tokenizer of ``part``, from where it was built or from another path to the same weights.

    MismatchError, both fingerprints shown, if they are not the same.
    """
    source = part.manifest["source"]
    found = find_checkpoint(checkpoint if checkpoint is not None else source["checkpoint"])
    with ThreadPoolExecutor(1) as pool:  # every byte is read while tokenizer and model load
        fingerprint = pool.submit(found.fingerprint)
        folder = Path(source["tokenizer"]) if source["tokenizer"] else found.folder
        tokenizer = load_tokenizer(folder)
        model = load_model(
            found,
            dtype=part.manifest["dtype"]["model"],
            device=device,
            attn_implementation=part.manifest["compute"]["attn_implementation"],
        )
        is_there = fingerprint.result()
    wanted = part.manifest["checkpoint"]["fingerprint"]
    if wanted != is_there:
        raise MismatchError(
            f"part {part.name!r} was built from other weights than those in {found.folder}: stored {wanted}, "
            f"found {is_there}. Give --checkpoint the folder of the stored ones"
        )
    wanted, is_there = part.manifest["tokenizer"]["fingerprint"], fingerprint_tokenizer(tokenizer)
    if wanted != is_there:
        raise MismatchError(
            f"part {part.name!r} was built with another tokenizer than that in {folder}: "
            f"stored {wanted}, found {is_there}"
        )
    return model, Tokenizer(tokenizer)


def _batches(rows: list[Row], batch_tokens: int) -> Iterator[list[int]]:
    usable = [place for place, row in enumerate(rows) if row.status.usable]
    for batch in plan_batches([len(rows[place].tokens) for place in usable], batch_tokens):
        yield [usable[index] for index in batch]


def encode_val_set(
    part: Part,
    corpus: Corpus,
    *,
    grouping: Grouping,
    checkpoint: str | Path | None,
    device: str,
    max_samples: int | None,
    progress: Progress,
) -> ValVectors:
    """Vectors of every usable row of ``corpus``, or their mean (over rows, in float64): of all, or of each domain.

    Rows that cannot be used (too short, masked, not finite) are left out and counted. UsageError if none is
    left, or one has no domain where domains are asked for; MismatchError if checkpoint, tokenizer or projection are not
    the part's.
    """
    _ = corpus.resolved
    model, tokenizer = load_for(part, checkpoint, device)
    settings = TokenSettings(**part.manifest["tokens"])
    batch_tokens = int(part.manifest["batching"]["batch_tokens"])
    dimension = part.layout.dimension
    sums: dict[str, NDArray[np.float64]] = {}
    counts: Counter[str] = Counter()
    ids: list[str] = []
    kept: list[Tensor] = []
    left_out: Counter[str] = Counter()
    rows = rows_of(islice(corpus.samples(), max_samples), tokenizer, settings)
    with (
        RowEncoder(model, projection_of(part, model), reduction=part.manifest["loss"]["reduction"]) as encoder,
        closing(progress.task("val set", None)) as task,
    ):
        while some := list(islice(rows, ROWS_AT_ONCE)):
            vectors = torch.zeros(len(some), dimension)
            for places in _batches(some, batch_tokens):
                encoded = encoder([some[place] for place in places])
                vectors[places] = encoded.vectors.cpu()
                task.advance(len(places), sum(len(some[place].tokens) for place in places))
            finite = torch.isfinite(vectors).all(1)
            fates = [
                row.status if finite[place] or not row.status.usable else Status.NOT_FINITE
                for place, row in enumerate(some)
            ]
            used = [place for place, fate in enumerate(fates) if fate.usable]
            left_out.update(fate.name.lower() for fate in fates if not fate.usable)
            if grouping == "each":
                ids += [some[place].sample.id for place in used]
                kept.append(vectors[used])
                continue
            for label, places in _by_label([some[place] for place in used], used, grouping).items():
                sums[label] = sums.get(label, np.zeros(dimension)) + vectors[places].double().sum(0).numpy()
                counts[label] += len(places)
    if not ids and not counts:
        raise UsageError(f"no row of the val set {corpus.source} can be used: {dict(left_out)}")
    if grouping != "each":
        ids = sorted(sums)
        kept = [torch.from_numpy((sums[label] / counts[label]).astype(np.float32)).unsqueeze(0) for label in ids]
    used_rows = counts.total() if counts else len(ids)
    return ValVectors(vectors=torch.cat(kept), ids=ids, used=used_rows, left_out=dict(left_out), rows_of=dict(counts))


def _by_label(rows: list[Row], places: list[int], grouping: Grouping) -> dict[str, list[int]]:
    """``places`` by the domain of their rows, or all under ``mean``."""
    found: dict[str, list[int]] = {}
    for row, place in zip(rows, places, strict=True):
        label = "mean" if grouping == "mean" else row.sample.domain
        if label is None:
            raise UsageError(
                f"val sample {row.sample.id!r} (row {row.sample.source_row}) has no group: the field of --group-field "
                "is null there"
            )
        found.setdefault(label, []).append(place)
    return found
