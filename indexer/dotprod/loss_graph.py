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
"""Operations that pass their input on, at most in another dtype. Tap and SideBranch are our own."""

_HIDDEN = re.compile(r"aux(iliary)?_?loss", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class GraphPath:
    """The part of the graph between a loss and its logits."""

    node: Node | None
    """The node at which the graph of the loss reaches the logits; None if it does not."""
    native: bool
    """Whether all operations between are torch's own. Others may work in place: their backward can run only once."""
    bypassing: list[Tensor]
    """Parameters that the loss depends on by a path that does not pass through the logits."""


def path_to(loss: Tensor, logits: Tensor, excluded_terms: Collection[Tensor] = ()) -> GraphPath:
    """Walk from ``loss`` back to ``logits``, not beyond ``excluded_terms``."""
    origins = _origins(logits)
    reached, native, bypassing = None, True, []
    for node in _walk(loss.grad_fn, origins | {term.grad_fn for term in excluded_terms}):
        if node in origins:
            reached = reached or node
        elif isinstance(node, BackwardCFunction):
            native = False
        elif hasattr(node, "variable"):
            bypassing.append(node.variable)
    return GraphPath(reached, native, bypassing if reached is not None else [])


def gradient_at(loss: Tensor, node: Node, like: Tensor, scale: float) -> Tensor | None:
    """``scale`` · ∂loss/∂(output of ``node``) in the shape of ``like``, or None if it does not fit. Keeps the graph."""
    seed = torch.full_like(loss, scale)
    edge = GradientEdge(node, output_index(node, like))
    (gradient,) = torch.autograd.grad(loss, [edge], seed, retain_graph=True, allow_unused=True)
    return gradient.reshape(like.shape) if gradient is not None and gradient.numel() == like.numel() else None


def output_index(node: Node, tensor: Tensor) -> int:
    """The index of ``tensor`` among the outputs of ``node``: the pieces of a split share a node."""
    return tensor.output_nr if tensor.grad_fn is node else 0


def coefficient_of(term: Tensor, loss: Tensor) -> float | None:
    """∂loss/∂term of a term that the loss depends on; None if a custom operation lies between."""
    path = _nodes_between(loss.grad_fn, term.grad_fn)
    if path is None or any(isinstance(node, BackwardCFunction) for node in path[:-1]):
        return None
    (gradient,) = torch.autograd.grad(loss, [term], torch.ones_like(loss), retain_graph=True, allow_unused=True)
    return 0.0 if gradient is None else float(gradient)


def depends_on(loss: Tensor, term: Tensor) -> bool:
    """Whether ``term`` is part of the graph of ``loss``."""
    return loss is term or _nodes_between(loss.grad_fn, term.grad_fn) is not None


def hidden_auxiliary_loss(loss: Tensor) -> str | None:
    """The name of an operation that adds an auxiliary loss in its backward pass, invisible in the value of ``loss``."""
    names = (type(node).__name__ for node in _walk(loss.grad_fn, ()) if isinstance(node, BackwardCFunction))
    return next((name.removesuffix("Backward") for name in names if _HIDDEN.search(name)), None)


def _origins(logits: Tensor) -> set[Node]:
    """The nodes that hold the logits' numbers: the loss may use them from before a cast, copy or reshape."""
    origins = set()
    node = logits.grad_fn
    while node is not None:
        origins.add(node)
        name = type(node).__name__
        if not name.startswith(tuple(f"{copy}Backward" for copy in _COPIES)) or not node.next_functions:
            break
        node = node.next_functions[-1][0]  # our own operations take the output last
    return origins


def _walk(first: Node | None, stops: Collection[Node]) -> Iterator[Node]:
    """Each node of the graph once, not beyond ``stops``."""
    seen, stack = {first}, [first]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        yield node
        for following, _ in () if node in stops else node.next_functions:
            if following not in seen:
                seen.add(following)
                stack.append(following)


def _nodes_between(first: Node | None, last: Node | None) -> list[Node] | None:
    """The nodes of one path from ``first`` to ``last``, both included; None if there is no path."""
    if first is None or last is None:
        return None
    previous: dict[Node, Node] = {first: None}
    stack = [first]
    while stack:
        node = stack.pop()
        if node is last:
            path = []
            while node is not None:
                path.append(node)
                node = previous[node]
            return path[::-1]
        for following, _ in node.next_functions:
            if following is not None and following not in previous:
                previous[following] = node
                stack.append(following)
    return None
