"""The parts and layers that a query searches: one part, a union of parts of several corpora, or several of the same
rows at successive checkpoints.

Parts of one checkpoint and projection, and of other corpora, are read as one (:mod:`ghoststore.store.part.united`).
With several checkpoints the score is a sum over them, weighted by their learning rates: of inner products (TracInCP,
Pruthi et al. 2020, eq. 1) or of cosines (LESS, Xia et al. 2024, eq. 5) of gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ghoststore.corpus.repeated import repeated_words
from ghoststore.errors import MismatchError, UsageError
from ghoststore.progress import Progress
from ghoststore.settings.question import PartWeights as PartWeights
from ghoststore.store import Part, Store
from ghoststore.store.base.manifest import differences
from indexer.layers import layer_type_by_name
from indexer.projection.selection import matches
from query.search.unions import united

SHARED = ("corpus", "tokenizer", "tokens", "loss", "projection", "layers")
"""Sections of the manifest that must be equal for scores of parts to be summed: the same rows, the same projection."""
OWN = ("projection.hash", "projection.optimizer_state", "projection.calibration")
"""Fields of these sections that may differ: scales from the checkpoint's own optimizer state, and what the projection
learned from the checkpoint's own gradients."""


def open_parts(
    store: str | Path, names: str | Sequence[str] | None, weights: PartWeights | None, progress: Progress
) -> tuple[list[Part], list[float]]:
    """The parts called ``names`` (None: the only part of the store), those of one checkpoint and several corpora
    united, and one weight for each.

    The weight of a single part, or union, is 1. Several have the learning rates of their checkpoints (the default), 1
    each (``equal``), or the numbers given.

    UsageError for a part named twice, without rows, or without a learning rate; MismatchError if the parts do not have
    the same rows, nor can be united, and for rows that are in two of them.
    """
    parts = named_parts(store, names, progress)
    return parts, weights_of(parts, weights)


def named_parts(store: str | Path, names: str | Sequence[str] | None, progress: Progress) -> list[Part]:
    """The parts of :func:`open_parts`, before it is known whether they can be summed where there are several."""
    opened_store, wanted = Store.open(store), part_names(names)
    repeated = sorted({str(name) for name in wanted if wanted.count(name) > 1})
    if repeated:
        raise UsageError(f"part {repeated[0]!r} is given twice")
    parts = [opened_store.part(name) for name in wanted]
    for part in parts:
        if not part.spans:
            raise UsageError(
                f"part {part.name!r} has no committed rows yet; the build that makes it has not got that far"
            )
        if not part.complete:
            whole = "of a stream whose end was not seen yet" if part.open else f"of {part.layout.rows:,}"
            progress.note(f"part {part.name!r} is not complete: {part.rows:,} rows {whole} are searched")
    return united(parts)


def weights_of(parts: Sequence[Part], weights: PartWeights | None) -> list[float]:
    """One weight for each of ``parts``, see :func:`open_parts`."""
    _refuse_other_rows(parts)
    return _weights(parts, weights)


def note_repeated(part: Part, progress: Progress) -> None:
    """Say so if ids repeat in ``part`` and do not tell its samples apart."""
    if words := repeated_words(part.repeated_ids):
        progress.note(f"part {part.name!r}: {words} (source_row)")


def part_names(names: str | Sequence[str] | None) -> list[str | None]:
    """``names`` as a list; [None], which stands for the only part of the store, if there is no name."""
    return [names] if names is None or isinstance(names, str) else list(names) or [None]


def _refuse_other_rows(parts: Sequence[Part]) -> None:
    """MismatchError unless all parts have the rows, the projection and the spans of the first one."""
    first = parts[0]
    for part in parts[1:]:
        unequal = [
            difference
            for section in SHARED
            for difference in differences(first.manifest[section], part.manifest[section], section)
            if not any(f"{difference[0]}.".startswith(f"{own}.") for own in OWN)
        ]
        if first.layout.span_rows != part.layout.span_rows:
            unequal.append(("storage.span_rows", first.layout.span_rows, part.layout.span_rows))
        if unequal:
            path, value, other_value = unequal[0]
            raise MismatchError(
                f"parts {first.name!r} and {part.name!r} cannot be summed: {path} is {value!r:.90} in the first and "
                f"{other_value!r:.90} in the second. Build both from the same corpus with the same projection; "
                "parts of several corpora are ranked as one where they have one checkpoint (`ghoststore build --like`)"
            )
        if not set(first.spans) & set(part.spans):
            raise UsageError(f"parts {first.name!r} and {part.name!r} have no committed row in common yet")


def _weights(parts: Sequence[Part], weights: PartWeights | None) -> list[float]:
    """One weight for each part, from the option ``part_weights``. UsageError for weights that do not fit."""
    if len(parts) == 1:
        if weights is not None:
            raise UsageError(
                "`part_weights` belongs to several parts of the same rows, at several checkpoints: one part, or union, "
                "has nothing to be weighed against"
            )
        return [1.0]
    if weights == "equal":
        return [1.0] * len(parts)
    if weights is None or weights == "learning-rate":
        return [_learning_rate(part) for part in parts]
    if isinstance(weights, str):
        raise UsageError(f"`part_weights` {weights!r}: give learning-rate, equal, or a number for each part")
    if len(weights) != len(parts):
        of = " (one for each checkpoint)" if len(parts[0].members) > 1 else ""
        raise UsageError(f"`part_weights` has {len(weights)} numbers for {len(parts)} parts{of}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise UsageError(f"`part_weights` must be 0 or more and not all 0, not {', '.join(f'{w:g}' for w in weights)}")
    return [float(weight) for weight in weights]


def _learning_rate(part: Part) -> float:
    rate = part.manifest["source"].get("learning_rate")
    if not isinstance(rate, int | float) or not (math.isfinite(rate) and rate > 0):
        raise UsageError(
            f"part {part.name!r} does not say at which learning rate its checkpoint was trained (found {rate!r}); give "
            "`part_weights`, equal or a number for each part"
        )
    return float(rate)


def choose_groups(part: Part, layers: Sequence[str], exclude_layers: Sequence[str]) -> list[int] | None:
    """The layers that the patterns select, as places in ``part.groups``; None for all.

    UsageError for a pattern that matches no layer, and for a part with one sketch of all layers.
    """
    if not layers and not exclude_layers:
        return None
    if part.sketched_together:
        raise UsageError(
            f"part {part.name!r} keeps one sketch of all layers together: it has no scores by layer. Build a part that "
            "has: `ghoststore build … --proj-compress-by layer --name …`"
        )
    described = [(str(layer["name"]), layer_type_by_name(layer["type"])) for layer in part.manifest["layers"]]
    for pattern in [*layers, *exclude_layers]:
        if not any(matches(pattern, name, kind) for name, kind in described):
            names = ", ".join(name for name, _ in described[:12])
            raise UsageError(f"layer pattern {pattern!r} matches no layer of part {part.name!r}: {names} …")
    chosen = [
        place
        for place, (name, kind) in enumerate(described)
        if (not layers or any(matches(pattern, name, kind) for pattern in layers))
        and not any(matches(pattern, name, kind) for pattern in exclude_layers)
    ]
    if not chosen:
        raise UsageError(f"no layer of part {part.name!r} is left: {list(layers)} without {list(exclude_layers)}")
    return chosen
