"""Check: are the engine's vectors the gradients? Each block is compared with plain autograd of one sample at a time.

The engine sees calls of modules. If a weight is used in another way, too (``F.linear(x, module.weight)``, a weight made
of several, a compiled call), the gradient by autograd has a share that the vectors lack.
"""

from __future__ import annotations

import torch
from torch import Tensor

from query.doctor.compare import EXACT, worst
from query.doctor.finding import GRADIENTS, Check, Finding, right, skipped, wrong
from query.doctor.subject import Subject

EVERY_GRADIENT = "a gradient of every parameter"
NAMED = 5
"""Most layers that a sentence names."""
FAINT = 1e-3
"""A block with a smaller share of the vector's length is compared relative to that share, because its own digits are
rounding errors."""


def examine(subject: Subject) -> Finding:
    """Compare the blocks, and the vectors that a store would hold."""
    reason = subject.lacks_memory(4, EVERY_GRADIENT)
    if reason is not None:
        return skipped(reason)
    layers = subject.projection.plan.layers
    kronecker = subject.alone(subject.model, subject.few, subject.projection.unsketched()).vectors
    vectors = subject.exact.vectors[subject.few_places]
    blocks = [torch.stack([plain.blocks[layer.block.name] for plain in subject.plain]) for layer in layers]
    error = worst(vectors, subject.projection.assemble(blocks))
    floor = FAINT * torch.cat([block.flatten(1) for block in blocks], dim=1).norm(dim=1).cpu()
    by_layer = {
        layer.block.name: _error(kronecker[:, layer.start : layer.stop], block.flatten(1).cpu(), floor)
        for layer, block in zip(layers, blocks, strict=True)
    }
    largest_first = sorted(by_layer.items(), key=lambda item: -item[1])
    differing = {name: layer_error for name, layer_error in largest_first if not layer_error <= EXACT}
    details = {"vector": error, "layers": differing, "tolerance": EXACT}
    if differing:
        named = ", ".join(f"{name} ({layer_error:.2g})" for name, layer_error in [*differing.items()][:NAMED])
        more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
        return wrong(
            f"vectors differ from autograd's by {error:.2g}: {named}{more}",
            "The weight of a layer is used other than by calling the layer, where the engine does not see it. Call the "
            f"layer itself, or leave it out: `exclude_layers` '{','.join(differing)}'.",
            **details,
        )
    count = len(subject.few)
    return right(f"the vectors of {count} samples are autograd's, to {error:.1g} ({len(layers)} layers)", **details)


def _error(measured: Tensor, expected: Tensor, floor: Tensor) -> float:
    error = (measured - expected).norm(dim=1) / torch.maximum(expected.norm(dim=1), floor)
    return float(error.nan_to_num(nan=0.0).max())  # 0 ÷ 0: a layer without a gradient


CHECK = Check(name="exactness", asks="Are the vectors what autograd gives?", run=examine, needs=GRADIENTS)
