"""Check: what share of the model do the chosen layers cover, of its parameters and of the squared norm of
its gradient?
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from torch import nn

from indexer.layers import layer_type_of
from query.doctor.exactness import EVERY_GRADIENT
from query.doctor.finding import GRADIENTS, Check, Finding, right, skipped
from query.doctor.subject import Subject

LOW = 0.5
"""Share of the squared gradient norm below which the check advises more layers."""
DOMINANT = 0.5
"""Share of the covered squared norm from which one layer dominates every score."""
TOP = 5


def types_of_parameters(model: nn.Module) -> dict[str, str]:
    """For each parameter the layer type that owns it, or the class of a module that no type handles. Tied ones once."""
    types: dict[str, str] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        kind = layer_type_of(module)
        for parameter in module.parameters(recurse=False):
            types.setdefault(names[id(parameter)], type(module).__name__ if kind is None else kind.name)
    return types


def shares(squares: Mapping[str, float]) -> dict[str, float]:
    """``squares`` divided by their sum, largest first."""
    total = sum(squares.values()) or 1.0
    return {name: value / total for name, value in sorted(squares.items(), key=lambda item: -item[1])}


def examine(subject: Subject) -> Finding:
    """Measure the shares of the squared norm by plain autograd, averaged over a few samples."""
    of_parameters = subject.plan.coverage
    reason = subject.lacks_memory(4, EVERY_GRADIENT)
    if reason is not None:
        return skipped(f"the layers hold {of_parameters:.1%} of the parameters; of the gradient: {reason}")
    each = [shares(plain.squares) for plain in subject.plain]
    mean = {name: float(np.mean([of_sample[name] for of_sample in each])) for name in each[0]}
    kinds, by_type = types_of_parameters(subject.model), defaultdict[str, float](float)
    for name, share in mean.items():
        by_type[kinds[name]] += share
    layers = [layer.block for layer in subject.plan.layers]
    blocks = {block.name: sum(mean[name] for name in block.parameters) for block in layers}
    covered_names = {name for block in layers for name in block.parameters}
    left_out = {name: share for name, share in mean.items() if name not in covered_names}
    covered = sum(share for name, share in mean.items() if name in covered_names)
    top, share = next(iter(shares(blocks).items()))
    largest_left_out = sorted(left_out, key=lambda name: -left_out[name])[:TOP]
    details = {
        "parameters": of_parameters,
        "squared_norm": covered,
        "by_type": dict(sorted(by_type.items(), key=lambda item: -item[1])),
        "largest_layers": dict(sorted(blocks.items(), key=lambda item: -item[1])[:TOP]),
        "largest_left_out": {name: left_out[name] for name in largest_left_out},
    }
    advice = []
    if covered < LOW:
        advice.append(
            f"Most of the gradient lies elsewhere, above all in {', '.join(largest_left_out[:3])}: "
            "add layers to `projection.layers` (norm, embeddings, head, all) where you need it."
        )
    if share > DOMINANT and len(blocks) > 1:
        advice.append(
            f"{top} holds {share:.0%} of the covered squared norm and so decides every score: consider "
            f"`exclude_layers` '{top}', or plain blocks (`rank_total`) that are scored by layer."
        )
    coverage = f"{of_parameters:.1%} of the parameters, {covered:.1%} of the squared norm of their gradient"
    return right(f"{len(blocks)} layers: {coverage}", *advice, **details)


CHECK = Check(name="coverage", asks="How much of the gradient do the layers see?", run=examine, needs=GRADIENTS)
