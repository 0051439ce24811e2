"""What a part keeps of its projection: the scales of an optimizer state, and what was learned from its corpus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ghoststore.errors import MismatchError
from ghoststore.store import Part
from ghoststore.store.part.part import fixed_array
from indexer.projection.adam import SCALES, SideScales, unflat
from indexer.projection.calibration import FACTORS, KEPT, SIDES, Calibration
from indexer.projection.plan import ProjectionPlan
from indexer.projection.selection import Block


def scales_of(part: Part, plan: ProjectionPlan) -> dict[str, SideScales] | None:
    """Those that ``--optimizer-state`` gave the part."""
    if part.manifest["projection"].get("optimizer_state") is None:
        return None
    arrays = {name: fixed_array(part, name) for name in SCALES}
    try:
        return unflat(arrays, [layer.block for layer in plan.layers])
    except ValueError as error:
        raise MismatchError(f"part {part.name!r}: its scales are not of these layers: {error}") from error


def metric_of(part: Part, plan: ProjectionPlan) -> Callable[[Block, Tensor], Tensor] | None:
    """What makes of a gradient matrix (n_out, n_in) of a block that which the vectors of ``part`` are projections of;
    None where it is the gradient itself. ``plan`` is that of the part, with what it learned.
    """
    scales = scales_of(part, plan)
    if scales is not None:

        def scaled(block: Block, g_OI: Tensor) -> Tensor:
            side = scales[block.name]
            return g_OI * side.scale_out.to(g_OI.device).unsqueeze(1) * side.scale_in.to(g_OI.device)

        return scaled
    learned = None if plan.calibration is None else plan.calibration.preconditioner
    return None if learned is None else lambda block, g_OI: learned.matrix(block.name, g_OI)


def calibrated_as(part: Part, plan: ProjectionPlan) -> ProjectionPlan:
    """``plan`` with what the build of ``part`` learned. MismatchError if that is not of these layers, CorruptError if
    it is damaged.
    """
    entry = part.manifest["projection"].get("calibration")
    if entry is None:
        return plan
    config = plan.config
    names = [
        *(SIDES if config.learns_sides else ()),
        *(FACTORS if config.preconditioned else ()),
        *((KEPT,) if entry["kept"] else ()),
    ]
    arrays = {name: fixed_array(part, name) for name in names}
    sizes = [stop - start for _, start, stop in part.groups] if plan.shared_out else None
    try:
        found = Calibration.of_arrays(
            arrays, plan.shapes, samples=int(entry["samples"]), damping=config.damping, sizes=sizes
        )
    except ValueError as error:
        raise MismatchError(f"part {part.name!r}: what it learned is not of these layers: {error}") from error
    if found.digest() != entry["digest"]:
        raise MismatchError(
            f"part {part.name!r}: what it keeps of its projection has the digest {found.digest()}, not the "
            f"{entry['digest']} of its manifest; build it anew"
        )
    return replace(plan, calibration=found)
