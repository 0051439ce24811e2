"""Which layers of a part are scored."""

from __future__ import annotations

from collections.abc import Sequence

from ghoststore.errors import UsageError
from ghoststore.store import Part
from indexer.layers import layer_type_by_name
from indexer.projection.selection import matches


def choose_groups(part: Part, layers: Sequence[str], exclude_layers: Sequence[str]) -> list[int] | None:
    """Places in ``part.groups`` of the layers that the patterns select; None for all.

    UsageError for a pattern without a layer, and for a part whose blocks were sketched together.
    """
    if not layers and not exclude_layers:
        return None
    if part.sketched_together:
        raise UsageError(
            f"part {part.name!r} keeps one sketch of all layers together: it has no scores by layer. Build a part that "
            "has: ghoststore build … --proj-compress-by layer --name …"
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
