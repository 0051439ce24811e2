"""Uses of weights that a compiled graph hides, found where a graph is new: the model runs once more as it was written.

A graph of torch.compile is one node of autograd, in which uses do not show. But what it uses does not change: another
branch of the model is another graph. So the batch in which a graph may have been made runs forward again without
graphs, and its uses are looked at as in any other batch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError
from indexer.encode.autograd_probe import attributes_kept
from indexer.encode.forward_probe import Call
from indexer.encode.modes import buffers_kept, device_type, devices_of, uncompiled
from indexer.encode.sample_axis import unsupported
from indexer.encode.uses import FrozenInCalls
from indexer.layers.call import tensors_in

_OLD_GRAPH = (
    ". Or the model was compiled and run before the engine was attached, and keeps its old graph: attach first, or "
    "torch._dynamo.reset()"
)
_made = 0


def _count(arguments: Any) -> None:
    global _made
    _made += 1


def graphs_made() -> int:
    """A number that differs from the last answer if torch.compile began to make a graph since, or may have."""
    global _made
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.callback import callback_handler  # not at the top: it takes seconds where nothing is compiled

    callbacks = callback_handler.start_callbacks
    if _count not in callbacks:  # the first time, and after torch._dynamo.reset()
        callbacks.append(_count)
        _made += 1
    return _made


def refuse_not_run(names: Sequence[str], *, compiled: bool) -> None:
    """CaptureError that names the layers or parameters ``names`` whose modules did not run, if there are any."""
    if names:
        raise unsupported(
            f"the forward pass did not run {len(names)} projected layer(s): this input does not use them, or their "
            f"weights are used without calling them. Leave them out: `exclude_layers` '{','.join(names)}'"
            f"{_OLD_GRAPH if compiled else ''}",
            names,
        )


def refuse_unreached(names: Sequence[str]) -> None:
    """CaptureError that names the layers ``names`` on which the loss does not depend, if there are any."""
    if names:
        raise unsupported(
            f"the loss does not depend on {len(names)} projected layer(s). Leave them out: `exclude_layers` "
            f"'{','.join(names)}'. Gradient checkpointing with use_reentrant=True hides layers: use "
            "use_reentrant=False",
            names,
        )


class NewGraphs:
    """Whether graphs that were not looked at may have run."""

    def __init__(self) -> None:
        self._looked_at = -1

    def begin(self) -> None:
        """Begin a batch."""
        graphs_made()

    def any(self) -> bool:
        """Whether there may be one."""
        return graphs_made() != self._looked_at

    def looked(self) -> None:
        """All that have been made are looked at."""
        self._looked_at = graphs_made()


def called(model: nn.Module, call: Call | None) -> Call:
    """``call``; CaptureError if there is none: the loop calls parts of ``model``."""
    if call is None:
        raise CaptureError(
            f"the loop calls parts of {type(model).__name__} and not the model, and torch.compile compiled some of "
            "them: whether these use weights where nothing sees it cannot be told. Call the model itself, do not "
            "compile its parts, or trust them: `check=False`"
        )
    return call


def hidden_in_graphs(model: nn.Module, call: Call, parameters: Mapping[str, Sequence[nn.Parameter]]) -> list[Tensor]:
    """The ``parameters``, given by module, that ``model`` uses outside calls of their modules when it is called so.

    It runs as it was written, with a graph of autograd; branches or taps must take no notice.
    """
    uses = FrozenInCalls(model, parameters)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    autocast = torch.autocast(device_type(model), dtype=call.autocast, enabled=call.autocast is not None)
    handles = uses.attach()
    try:
        with (
            uncompiled(),
            buffers_kept(model),
            attributes_kept(model),
            torch.random.fork_rng(devices=devices_of(model)),
            torch.enable_grad(),
            autocast,
        ):
            uses.begin(whole=False)
            outputs = tensors_in(model(*call.args, **call.kwargs))
            found = [tensor for output in outputs if output.grad_fn is not None for tensor in uses.hidden(output)]
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return found
