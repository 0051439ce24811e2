"""Do the rows of a layer's input follow the samples of the batch, whatever their company?

The model runs again, without a graph, on the whole batch, on two and three samples of it and on single ones: a layer's
input must have as many rows, and each row must be the one that its sample has in the whole. That the gradients at a
layer's output belong to the samples is what :mod:`indexer.sample_axis` shows; this shows that nothing before the layer
mixes them, and stands in where there is one training loss alone, which cannot be reweighted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import CaptureError
from indexer.layers import layer_type_of
from indexer.layers.base import axis_problem, by_sample, input_of
from indexer.modes import autocast_dtype, buffers_kept, device_type, evaluating
from indexer.sample_axis import NARROW_TOLERANCE, TOLERANCE, row_sums, taken

ABSENT = "does not run in eval mode"
ALONE = 16
"""Samples that run alone: all of a small batch."""


class CannotRun(CaptureError):
    """The model does not run on some of the samples of a batch alone."""


class Call(NamedTuple):
    """What the model was called with, and under which autocast."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype | None


class CallKeeper:
    """Keeps what the model was called with last, while it is asked to."""

    def __init__(self, model: nn.Module) -> None:
        self.call: Call | None = None
        self.wanted = False
        self._handle: RemovableHandle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.wanted and torch.is_grad_enabled():
            self.call = Call(args, dict(kwargs), autocast_dtype(module))

    def remove(self) -> None:
        """Take the hook away and let go of the call."""
        self._handle.remove()
        self.call = None


def strangers(model: nn.Module, call: Call, batch: int, layers: Iterable[str]) -> dict[str, str]:
    """Of ``layers``, those whose input does not follow the ``batch`` samples of ``call``, and what is wrong, in words.

    The model runs in eval mode; its mode, its buffers and the random state are put back. A layer that does not run then
    is one of them: nothing is known of it. CannotRun where the model takes no other batch than the whole one.
    """
    names = set(layers)
    problems: dict[str, str] = {}
    last = batch - 1
    alone = sorted({place * last // (ALONE - 1) for place in range(ALONE)})
    picks: list[Sequence[int]] = [range(batch), [last, 0], [batch // 2, 0, last], *([place] for place in alone)]
    whole: dict[str, list[Tensor]] = {}
    autocast = torch.autocast(device_type(model), dtype=call.autocast, enabled=call.autocast is not None)
    with evaluating(model), buffers_kept(model), torch.no_grad(), autocast:
        for places in picks:
            seen: dict[str, list[Tensor]] = {}
            with _watched(model, names, len(places), seen, problems):
                watched = _run(model, call, places, batch)
            if not whole and not _same_output(watched, _run(model, call, places, batch)):
                problems |= dict.fromkeys(_lookups(model, names), "an index for the whole batch, not of positions")
            whole = whole or seen
            for name in names - set(problems):
                expected, found = whole.get(name, []), seen.get(name, [])
                if not expected:
                    problems[name] = ABSENT
                elif len(expected) != len(found):
                    problems[name] = "runs more often for some samples of a batch than for all of them"
                elif not all(_same_rows(a[list(places)], b) for a, b in zip(expected, found, strict=True)):
                    problems[name] = "its input does not follow the samples: they are mixed, routed or in another order"
    return problems


def _run(model: nn.Module, call: Call, places: Sequence[int], batch: int) -> Any:
    args, kwargs = taken((call.args, call.kwargs), places, batch)
    try:
        return model(*args, **kwargs)
    except Exception as error:
        raise CannotRun(
            f"{type(model).__name__} does not run on {len(places)} of the {batch} samples of a batch ({error!r:.200}), "
            "so it cannot be told which axis of each layer carries the samples; check=False trusts that it is the first"
        ) from error


def _lookups(model: nn.Module, names: Iterable[str]) -> list[str]:
    kinds = {name: layer_type_of(model.get_submodule(name)) for name in names}
    return [name for name, kind in kinds.items() if kind is not None and kind.is_lookup]


def _same_output(found: Any, expected: Any) -> bool:
    """Whether two outputs of a model hold the same tensors, up to rounding."""
    if isinstance(expected, Tensor):
        return found.shape == expected.shape and torch.allclose(
            found.double(), expected.double(), rtol=NARROW_TOLERANCE, atol=1e-3, equal_nan=True
        )
    if isinstance(expected, Mapping):
        return all(_same_output(found[key], value) for key, value in expected.items())
    if isinstance(expected, (list, tuple)):
        return all(_same_output(one, other) for one, other in zip(found, expected, strict=True))
    return True


def _same_rows(expected_BS: Tensor, found_BS: Tensor) -> bool:
    error, size = float((found_BS - expected_BS).norm()), float(expected_BS.norm())
    tolerance = NARROW_TOLERANCE if expected_BS.dtype in (torch.float16, torch.bfloat16) else TOLERANCE
    return error <= tolerance * size


@contextmanager
def _watched(
    model: nn.Module, names: Iterable[str], batch: int, seen: dict[str, list[Tensor]], problems: dict[str, str]
) -> Any:
    def hook_of(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor | None:
            x = input_of(args, kwargs)
            kind = layer_type_of(module)
            assert kind is not None
            problem = axis_problem(x, batch, kind)
            if problem is not None:
                problems[name] = problem
                return None
            x_B, y_B = by_sample(x, y, batch, kind, name)
            seen.setdefault(name, []).append(row_sums(x_B))
            return y_B  # as the engines give it back: positions, once a sample

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(hook_of(name), with_kwargs=True, prepend=True) for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
