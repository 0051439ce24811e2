"""The forward pass of the first training batch: its input, its output, and how to run it again.

Legend: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ghoststore.errors import UsageError
from indexer.encode.modes import autocast_dtype, buffers_kept, device_type, devices_of

_LABEL_NAMES = ("labels", "targets", "target")
"""The names that models give to the labels of tokens."""

_NOT_TOKENS = re.compile(r"mask|type|position|cache", re.IGNORECASE)
"""Names of integer inputs (B, T) that are no tokens."""

LABEL_ARGUMENTS = (*_LABEL_NAMES, "shift_labels", "num_items_in_batch", "fused_lm_head")
"""Arguments that make a model compute a loss."""


@dataclass(frozen=True, slots=True)
class ForwardState:
    """What a forward pass depends on, apart from weights and input: random state and autocast."""

    rng: Tensor
    cuda_rng: dict[int, Tensor]
    """By device index."""
    autocast: torch.dtype | None

    @classmethod
    def current(cls, model: nn.Module) -> ForwardState:
        """The present state on the devices of ``model``."""
        cuda = {index: torch.cuda.get_rng_state(index) for index in devices_of(model)}
        return cls(torch.get_rng_state(), cuda, autocast_dtype(model))


@dataclass(frozen=True, slots=True)
class ForwardRecord:
    """One forward pass of the whole model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    versions: dict[int, int]
    """The version of each tensor in the output, by id: a loss that works in place overwrites the logits."""
    state: ForwardState

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, state: ForwardState) -> ForwardRecord:
        """Make the record. Call it right after the forward pass, before anything can change the output."""
        versions = {id(tensor): tensor._version for tensor in tensors_in(output).values()}
        return cls(args, kwargs, output, versions, state)

    def unchanged(self, tensor: Tensor) -> bool:
        """Whether a tensor of the output still holds what the model put there."""
        return self.versions.get(id(tensor)) == tensor._version


def tensors_in(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by name; those of a tuple by position."""
    if isinstance(output, Tensor):
        items: Any = {"the output": output}.items()
    elif isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, tuple | list):
        items = ((f"output[{index}]", value) for index, value in enumerate(output))
    else:
        items = getattr(output, "__dict__", {}).items()
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


def logits_in(output: Any, labels: Tensor) -> list[Tensor]:
    """Tensors that may be the logits for ``labels`` (B, T), one called "logits" first.

    Their shape is (B, T, V) or (B, T − 1, V).
    """
    batch, length = labels.shape
    largest = int(labels.max()) if labels.numel() else 0
    fitting = {
        name: tensor
        for name, tensor in tensors_in(output).items()
        if tensor.dim() == 3
        and tensor.is_floating_point()
        and tensor.shape[-1] > largest
        and tensor.shape[0] == batch
        and tensor.shape[1] in (length, length - 1)
    }
    return [fitting[name] for name in sorted(fitting, key=lambda name: name != "logits")]


def labels_by_name(model: nn.Module, record: ForwardRecord, batch: int) -> Tensor | None:
    """The labels (B, T) that the model was called with, under one of the usual names.

    None if there are none, or if the output shows that they label something else than tokens.
    """
    arguments = _arguments(model, record)
    for name in _LABEL_NAMES:
        labels = arguments.get(name)
        if _are_tokens(labels, batch):
            return labels if _may_predict_tokens(record.output, labels) else None
    return None


def token_inputs(model: nn.Module, record: ForwardRecord, batch: int) -> list[Tensor]:
    """Inputs (B, T) that may be tokens, under any name, where the output has logits (B, T, V) for them.

    The last argument comes first: labels follow the input, as a rule.
    """
    return [
        tokens
        for name, tokens in _arguments(model, record).items()
        if _are_tokens(tokens, batch) and not _NOT_TOKENS.search(name) and logits_in(record.output, tokens)
    ][::-1]


def num_items_in(record: ForwardRecord) -> float | None:
    """``num_items_in_batch``, by which the model divides its loss; None if the model was not given it."""
    items = record.kwargs.get("num_items_in_batch")
    return None if items is None else float(items)


def _arguments(model: nn.Module, record: ForwardRecord) -> dict[str, Any]:
    names = _positional_names(model)
    names += [f"args[{index}]" for index in range(len(names), len(record.args))]
    return {**dict(zip(names, record.args, strict=False)), **record.kwargs}


def _are_tokens(value: Any, batch: int) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor)
        and value.dim() == 2
        and len(value) == batch
        and not value.is_floating_point()
        and value.dtype != torch.bool
    )


def _may_predict_tokens(output: Any, labels: Tensor) -> bool:
    """Whether the output has logits for ``labels`` (B, T), with its axes in any order, or nothing but losses."""
    batch, length = labels.shape
    lengths = (length, length - 1)
    wide = [tensor for tensor in tensors_in(output).values() if tensor.dim() > 1 and tensor.is_floating_point()]
    return not wide or any(
        (tensor.dim() == 3 and batch in tensor.shape and any(n in tensor.shape for n in lengths))
        or (tensor.dim() == 2 and len(tensor) != batch and len(tensor) in [batch * n for n in lengths])
        for tensor in wide
    )


def without_labels(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward pass that gives logits, and sees what one with ``kwargs`` sees."""
    uncached = {"use_cache": False} if kwargs.get("fused_lm_head") else {}  # TRL's fused head does so
    return {name: value for name, value in kwargs.items() if name not in LABEL_ARGUMENTS} | uncached


@torch.no_grad()
def output_without_labels(model: nn.Module, record: ForwardRecord) -> Any:
    """Run the forward pass again, without labels, from the same random state; returns its output.

    UsageError if the model does not run without labels.
    """
    names = _positional_names(model)
    args = [None if names[i : i + 1] and names[i] in LABEL_ARGUMENTS else value for i, value in enumerate(record.args)]
    kwargs = without_labels(record.kwargs)
    with replayed(model, record.state):
        try:
            return model.forward(*args, **kwargs)  # not __call__: the hooks must not run twice
        except Exception as error:
            raise UsageError(
                f"the forward pass of {type(model).__name__} does not run without labels ({error!r:.200}), and with "
                "them it returns no logits that its loss could be compared with; say what the loss is of, "
                "watch(loss, weights=…, batch=batch), or trust it: `check=False`"
            ) from error


@contextmanager
def replayed(model: nn.Module, state: ForwardState) -> Iterator[None]:
    """Run the block under ``state``. Afterwards random state, autocast and every buffer are as before."""
    with (
        buffers_kept(model),
        torch.random.fork_rng(devices=devices_of(model)),
        torch.autocast(device_type(model), dtype=state.autocast, enabled=state.autocast is not None),
    ):
        torch.set_rng_state(state.rng)
        for index, cuda_state in state.cuda_rng.items():
            torch.cuda.set_rng_state(cuda_state, index)
        yield


def _positional_names(model: nn.Module) -> list[str]:
    """Names of the parameters that ``forward`` takes by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, spec in inspect.signature(model.forward).parameters.items() if spec.kind in kinds]
