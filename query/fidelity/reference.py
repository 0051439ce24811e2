"""The reference of `ghoststore.plot_error`, and the parts of a store that can be points of one curve."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ghoststore.errors import MismatchError, UsageError
from ghoststore.store import Part, Store
from ghoststore.store.base.manifest import differences

SHARED = ("checkpoint", "tokenizer", "corpus", "tokens", "loss")
REFERENCE = re.compile(r"full|full_layers|(rank|naive_proj_layers)=(\d{1,12})")
MORE_PARTS = (
    "build more parts of the same checkpoint and corpus, `ghoststore build --name NAME --proj-rank-total N …` with "
    "another N each"
)


def parse_reference(reference: str) -> tuple[str, int]:
    """(mode, N or 0) of the option ``reference``; UsageError for an unknown one."""
    matched = REFERENCE.fullmatch(reference)
    if matched is None:
        raise UsageError(f"`reference` {reference!r}: give full, full_layers, rank=N or naive_proj_layers=N")
    return (matched[1], int(matched[2])) if matched[1] else (reference, 0)


def fitting_parts(store: Store, names: Sequence[str]) -> list[Part]:
    """The parts called ``names``, or all parts with rows.

    MismatchError unless they share checkpoint, corpus, tokens, loss and layers; UsageError if there are none.
    """
    parts = [store.part(name) for name in names or store.part_names()]
    parts = [part for part in parts if names or part.spans]
    if not parts:
        raise UsageError(f"{store.path} has no part with committed rows")
    first = parts[0]
    for part in parts[1:]:
        unequal = differences(exact_identity(first), exact_identity(part))
        if unequal:
            path, value, other_value = unequal[0]
            raise MismatchError(
                f"parts {first.name!r} and {part.name!r} are no points of one curve: {path} is {value!r:.90} in the "
                f"first and {other_value!r:.90} in the second. Name those that are with `part`"
            )
    return parts


def exact_identity(part: Part) -> dict[str, Any]:
    """Everything that the exact gradients of the rows of ``part`` depend on. Parts of one curve share it."""
    layers = {layer["name"]: layer["parameters"] for layer in part.manifest["layers"]}
    projection = part.manifest["projection"]
    metric: dict[str, Any] = {"optimizer_state": projection["optimizer_state"]}
    if projection["precondition"] != "none":  # it follows from these, except for its last bits
        metric["precondition"] = {name: projection[name] for name in ("precondition", "damping", "calibration_samples")}
    return {**{name: part.manifest[name] for name in SHARED}, "layers": layers, **metric}


def part_of_rank(parts: Sequence[Part], rank: int) -> Part:
    """The part that was built with a rank total of ``rank``; UsageError unless there is exactly one, and
    another part.
    """
    of_rank = [part for part in parts if part.manifest["projection"]["rank_total"] == rank]
    if len(of_rank) != 1:
        totals = ", ".join(f"{part.name} {part.manifest['projection']['rank_total'] or 'by default'}" for part in parts)
        problem = "no part was" if not of_rank else f"{len(of_rank)} parts were"
        raise UsageError(f"`reference=rank={rank}`: {problem} built with a rank total of {rank}; there are: {totals}")
    if len(parts) == 1:
        raise UsageError(f"`reference=rank={rank}`: no other part is there to be compared with it: {MORE_PARTS}")
    return of_rank[0]
