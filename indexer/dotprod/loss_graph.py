"""The autograd graph of a training loss: whether everything in it comes from the logits, and its gradient there.

Legend: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

Node = Any

_COPIES = ("ToCopy", "View", "UnsafeView", "ReshapeAlias", "Alias", "Clone", "Tap", "SideBranch")
"""What only hands its input on: the same numbers, perhaps of another dtype. Tap and SideBranch are our own."""

_HIDDEN = re.compile(r"aux(iliary)?_?loss", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Way:
    """What lies between a loss and the logits that it is of."""

    logits: Node | None
    """Where the graph of the loss meets the logits; None if it never does."""
    native: bool
    """Whether torch's own operations alone lie between. Others may work in place: their backward can run only once."""
    beside: list[Tensor]
    """Parameters that the loss reaches without passing through the logits."""


def way_to(loss: Tensor, logits: Tensor, without: Collection[Tensor] = ()) -> Way:
    """From ``loss`` back to ``logits``; what lies behind the terms ``without`` is left out."""
    origins = _origins(logits)
    met, native, beside = None, True, []
    for node in _walk(loss.grad_fn, origins | {term.grad_fn for term in without}):
        if node in origins:
            met = met or node
        elif isinstance(node, BackwardCFunction):
            native = False
        elif hasattr(node, "variable"):
            beside.append(node.variable)
    return Way(met, native, beside if met is not None else [])


def gradient_at(loss: Tensor, node: Node, like: Tensor, scale: float) -> Tensor | None:
    """``scale`` · ∂loss/∂logits, of the shape of ``like``; the graph stays. None where the shapes do not fit."""
    seed = torch.full_like(loss, scale)
    edge = GradientEdge(node, place_at(node, like))
    (gradient,) = torch.autograd.grad(loss, [edge], seed, retain_graph=True, allow_unused=True)
    return gradient.reshape(like.shape) if gradient is not None and gradient.numel() == like.numel() else None


def place_at(node: Node, tensor: Tensor) -> int:
    """Which output of ``node``, one of its origins, the tensor is: those of a split have one node."""
    return tensor.output_nr if tensor.grad_fn is node else 0


def coefficient_of(term: Tensor, loss: Tensor) -> float | None:
    """∂loss/∂term of a term that the loss depends on; None where a custom operation lies between."""
    path = _path(loss.grad_fn, term.grad_fn)
    if path is None or any(isinstance(node, BackwardCFunction) for node in path[:-1]):
        return None
    (gradient,) = torch.autograd.grad(loss, [term], torch.ones_like(loss), retain_graph=True, allow_unused=True)
    return 0.0 if gradient is None else float(gradient)


def depends_on(loss: Tensor, term: Tensor) -> bool:
    """Whether ``term`` is part of the graph of ``loss``."""
    return loss is term or _path(loss.grad_fn, term.grad_fn) is not None


def hidden_auxiliary_loss(loss: Tensor) -> str | None:
    """The name of an operation that adds an auxiliary loss in its backward pass, where no value shows it."""
    names = (type(node).__name__ for node in _walk(loss.grad_fn, ()) if isinstance(node, BackwardCFunction))
    return next((name.removesuffix("Backward") for name in names if _HIDDEN.search(name)), None)


def _origins(logits: Tensor) -> set[Node]:
    """The nodes that are the logits: the loss may use them before they were cast, copied or reshaped."""
    origins = set()
    node = logits.grad_fn
    while node is not None:
        origins.add(node)
        name = type(node).__name__
        if not name.startswith(tuple(f"{copy}Backward" for copy in _COPIES)) or not node.next_functions:
            break
        node = node.next_functions[0][0]
    return origins


def _walk(first: Node | None, stops: Collection[Node]) -> Iterator[Node]:
    """Every node once; what lies behind ``stops`` is not entered."""
    seen, todo = {first}, [first]
    while todo:
        node = todo.pop()
        if node is None:
            continue
        yield node
        for following, _ in () if node in stops else node.next_functions:
            if following not in seen:
                seen.add(following)
                todo.append(following)


def _path(first: Node | None, last: Node | None) -> list[Node] | None:
    """The nodes of one way from ``first`` to ``last``, both included."""
    if first is None or last is None:
        return None
    before: dict[Node, Node] = {first: None}
    todo = [first]
    while todo:
        node = todo.pop()
        if node is last:
            path = []
            while node is not None:
                path.append(node)
                node = before[node]
            return path[::-1]
        for following, _ in node.next_functions:
            if following is not None and following not in before:
                before[following] = node
                todo.append(following)
    return None
