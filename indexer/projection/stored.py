"""The projection of a part, from its manifest, its scales of an optimizer state, and what its build learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from ghoststore.errors import MismatchError
from ghoststore.settings.projection import ProjectionConfig, config_of
from ghoststore.store import Part, Run
from ghoststore.store.base.records import reading
from ghoststore.store.part.encoding import numbers_per_layer
from ghoststore.store.part.part import fixed_array
from indexer.projection.adam import SCALES, SideScales, unflat
from indexer.projection.blocks import Block
from indexer.projection.calibration import FACTORS, KEPT, SIDES, Calibration
from indexer.projection.matrices import Projection
from indexer.projection.plan import ProjectionPlan


def projection_of(part: Part, model: nn.Module) -> Projection:
    """The projection of ``part``, drawn for ``model``.

    MismatchError if its layers or its hash are not those of the manifest.
    """
    stored = part.manifest["projection"]
    with reading(part.path / "zarr.json", "does not describe a projection"):
        config = config_of(stored, part.manifest["layers"])
    numbers = numbers_per_layer(part.layout.dtype)
    plan = calibrated_as(part, ProjectionPlan.for_model(model, config, numbers=numbers))
    if plan.layers_json() != part.manifest["layers"]:
        raise MismatchError(f"part {part.name!r}: the layers of this model are not those that the part was built from")
    projection = Projection(plan, scales_of(part, plan))
    if projection.hash != stored["hash"]:
        raise MismatchError(
            f"part {part.name!r}: its projection matrices have the hash {stored['hash']}, but this release draws "
            f"{projection.hash} from the same seed; query with the release that built it ({part.manifest['software']})"
        )
    return projection


def projection_of_run(run: Run, model: nn.Module) -> Projection:
    """The projection of the gradients that ``run`` keeps, drawn for ``model``. Where the run does not describe it, the
    default one, if it is that.

    MismatchError if its layers or its hash are not those of the manifest.
    """
    scoring, config = run.manifest["scoring"], ProjectionConfig()
    described = scoring.get("gradients")
    if described is not None:
        with reading(run.path / "zarr.json", "does not describe a projection"):
            config = config_of(described["projection"], described["layers"])
    plan = ProjectionPlan.for_model(model, config)
    if described is not None and plan.layers_json() != described["layers"]:
        raise MismatchError(f"run {run.name!r}: the layers of this model are not those whose gradients the run keeps")
    projection = Projection(plan)
    if projection.hash != scoring.get("projection"):
        what = "this release draws another one from the same seed" if described else "it is not the default one"
        raise MismatchError(
            f"run {run.name!r} keeps gradients projected by matrices with the hash {scoring.get('projection')}; for "
            f"this model {what}: {projection.hash}"
        )
    return projection


def scales_of(part: Part, plan: ProjectionPlan) -> dict[str, SideScales] | None:
    """The scales of the part from its ``optimizer_state``; None without one. MismatchError if they are of
    other layers.
    """
    if part.manifest["projection"]["optimizer_state"] is None:
        return None
    arrays = {name: fixed_array(part, name) for name in SCALES}
    try:
        return unflat(arrays, [layer.block for layer in plan.layers])
    except ValueError as error:
        raise MismatchError(f"part {part.name!r}: its scales are not of these layers: {error}") from error


def metric_of(
    part: Part, plan: ProjectionPlan, damping: float | None = None
) -> Callable[[Block, Tensor], Tensor] | None:
    """A function from the gradient matrix (n_out, n_in) of a block to the matrix in the metric of ``part``, which its
    vectors are projections of; None if they are projections of the gradient itself.

    ``plan`` is that of the part, with what its build learned. ``damping`` of Kronecker factors replaces the part's.
    """
    scales = scales_of(part, plan)
    if scales is not None:

        def scaled(block: Block, g_OI: Tensor) -> Tensor:
            side = scales[block.name]
            return g_OI * side.scale_out.to(g_OI.device).unsqueeze(1) * side.scale_in.to(g_OI.device)

        return scaled
    learned = None if plan.calibration is None else plan.calibration.preconditioner
    if learned is None:
        return None
    damped = learned if damping is None else replace(learned, damping=damping)
    return lambda block, g_OI: damped.matrix(block.name, g_OI)


def calibrated_as(part: Part, plan: ProjectionPlan) -> ProjectionPlan:
    """``plan`` with what the build of ``part`` learned.

    MismatchError if that does not fit these layers or the manifest, CorruptError if it is damaged.
    """
    entry = part.manifest["projection"]["calibration"]
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
        calibration = Calibration.of_arrays(
            arrays, plan.shapes, samples=int(entry["samples"]), damping=config.damping, sizes=sizes
        )
    except ValueError as error:
        raise MismatchError(f"part {part.name!r}: what it learned is not of these layers: {error}") from error
    if calibration.digest() != entry["digest"]:
        raise MismatchError(
            f"part {part.name!r}: what it keeps of its projection has the digest {calibration.digest()}, not the "
            f"{entry['digest']} of its manifest; build it anew"
        )
    return replace(plan, calibration=calibration)
