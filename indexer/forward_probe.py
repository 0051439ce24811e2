"""Layers that no loss of val samples has reached: do the rows of their inputs follow the samples of the batch?

Where there is one training loss alone, nothing can be reweighted (:mod:`indexer.sample_axis`). Then the model runs once
more, without a graph, on two and on three samples of the batch: a layer's input must have as many rows, and each row
must be the one that its sample had in the other company.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from indexer.layers import layer_type_of
from indexer.layers.base import axis_problem, by_sample
from indexer.modes import evaluating
from indexer.sample_axis import NARROW_TOLERANCE, PROBE_SIZES, TOLERANCE, row_sums, taken


class Call(NamedTuple):
    """What the model was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class CallKeeper:
    """Keeps what the model was called with last, while it is asked to."""

    def __init__(self, model: nn.Module) -> None:
        self.call: Call | None = None
        self.wanted = False
        self._handle: RemovableHandle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.wanted and torch.is_grad_enabled():
            self.call = Call(args, dict(kwargs))

    def remove(self) -> None:
        """Take the hook away and let go of the call."""
        self._handle.remove()
        self.call = None


def strangers(model: nn.Module, call: Call, batch: int, layers: Iterable[str]) -> dict[str, str]:
    """Of ``layers``, those whose input does not follow the ``batch`` samples of ``call``, and what is wrong, in words.

    The model runs in eval mode; its mode and the random state are put back. Layers that do not run then are strangers,
    too.
    """
    names = set(layers)
    problems: dict[str, str] = {}
    rows: list[dict[str, list[Tensor]]] = []
    picks = [[0, 1 % batch], [1 % batch, 0, 1 % batch]]
    assert tuple(map(len, picks)) == PROBE_SIZES
    for places in picks:
        seen: dict[str, list[Tensor]] = {}
        inputs = taken((call.args, call.kwargs), places, batch)
        with evaluating(model), torch.no_grad(), _watched(model, names, len(places), seen, problems):
            model(*inputs[0], **inputs[1])
        rows.append(seen)
    for name in sorted(names - set(problems)):
        first, second = (seen.get(name, []) for seen in rows)
        if not first or len(first) != len(second):
            problems[name] = "does not run, or not as often, in eval mode on some samples of the batch alone"
        elif not all(_same_rows(a[[1, 0, 1]], b) for a, b in zip(first, second, strict=True)):
            problems[name] = "its input does not follow the samples of the batch"
    return problems


def _same_rows(expected_BS: Tensor, found_BS: Tensor) -> bool:
    error, size = float((found_BS - expected_BS).norm()), float(expected_BS.norm())
    tolerance = NARROW_TOLERANCE if expected_BS.dtype in (torch.float16, torch.bfloat16) else TOLERANCE
    return error <= tolerance * size


@contextmanager
def _watched(
    model: nn.Module, names: Iterable[str], batch: int, seen: dict[str, list[Tensor]], problems: dict[str, str]
) -> Any:
    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            kind = layer_type_of(module)
            assert kind is not None
            problem = axis_problem(x, batch, kind)
            if problem is not None:
                problems[name] = problem
                return
            seen.setdefault(name, []).append(row_sums(by_sample(x, y, batch, kind, name)[0]))

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(hook_of(name), with_kwargs=True, prepend=True) for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
