"""The model to examine: in float32 as the reference, in other dtypes, and with each attention kernel.

A saved model is loaded exactly as in a build. A model in memory belongs to the caller: changes to it are undone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import nn

from ghoststore.checkpoint.load import DTYPES, AnyCheckpoint, load_model, quiet_transformers
from ghoststore.errors import UsageError
from ghoststore.machine import available_memory
from ghoststore.progress import Progress
from indexer.encode.engine import unwrap


class Models(Protocol):
    """A source of one model in several dtypes and with several attention kernels."""

    name: str
    dtype: str
    """The dtype that a build would compute in."""
    device: str

    def reference(self) -> Any:
        """The model in float32; the caller's own if it is in float32 already."""

    def in_dtype(self, dtype: str, kernel: str | None = None) -> Any:
        """A copy of the model in ``dtype`` with an attention ``kernel`` (None: that of the options, or its default)."""


class SavedModels:
    """The models of a checkpoint. ``progress`` hears of it what there is to say when it is read, once."""

    def __init__(
        self, checkpoint: AnyCheckpoint, dtype: str, device: str, kernel: str | None, progress: Progress
    ) -> None:
        self.name, self.dtype, self.device = checkpoint.where, dtype, device
        self._checkpoint, self._kernel = checkpoint, kernel
        self._progress: Progress | None = progress

    def reference(self) -> Any:
        _refuse_too_large(self._checkpoint.numbers(), self.device, self.name)
        return self.in_dtype("float32", None if half_only(self._kernel) else self._kernel)

    def in_dtype(self, dtype: str, kernel: str | None = None) -> Any:
        progress, self._progress = self._progress, None
        return load_model(
            self._checkpoint,
            dtype=dtype,
            device=self.device,
            attn_implementation=kernel or self._kernel,
            progress=progress,
        )


class LoadedModels:
    """The models of a model in memory. Parameters are cast and buffers are not, as transformers does when it loads."""

    def __init__(self, model: nn.Module, dtype: str | None, device: str, kernel: str | None) -> None:
        self._model = unwrap(model)
        first = next(self._model.parameters(), None)
        if first is None:
            raise UsageError(f"{type(self._model).__name__} has no parameters")
        own = str(first.device)
        if device not in ("auto", own, first.device.type):
            raise UsageError(f"`device={device}`: the model that was given is on {own}; move it, or leave `device` out")
        self.name, self.device = type(self._model).__name__, own
        self.dtype = dtype or str(first.dtype).removeprefix("torch.")
        if self.dtype not in DTYPES:
            raise UsageError(f"`model_dtype` {self.dtype!r} is unknown; known: {', '.join(DTYPES)}")
        self._kernel = kernel

    def reference(self) -> Any:
        if all(p.dtype == torch.float32 for p in self._model.parameters()) and self._kernel is None:
            return self._model
        _refuse_too_large(sum(p.numel() for p in self._model.parameters()), self.device, self.name)
        return self.in_dtype("float32", None if half_only(self._kernel) else self._kernel)

    def in_dtype(self, dtype: str, kernel: str | None = None) -> Any:
        cast: dict[int, Any] = {  # deepcopy takes these instead of copying the parameters
            id(p): nn.Parameter(p.detach().to(getattr(torch, dtype), copy=True), p.requires_grad)
            for p in self._model.parameters()
        }
        model = deepcopy(self._model, cast)
        kernel = kernel or self._kernel
        if kernel is not None:
            set_kernel(model, kernel)
        return model


def half_only(kernel: str | None) -> bool:
    """Whether an attention kernel works only in 16-bit dtypes."""
    return (kernel or "").startswith("flash_attention")


def _refuse_too_large(numbers: int, device: str, name: str) -> None:
    free = available_memory(device)
    if free is not None and 4 * numbers > free:
        raise UsageError(
            f"{name} takes {4 * numbers / 2**30:.1f} GiB in float32, with which everything is compared, and "
            f"{free / 2**30:.1f} GiB of {device} are free; try `device=cpu`, or a smaller model of the same family"
        )


def kernel_of(model: Any) -> str | None:
    """The name of the attention kernel of ``model``; None for a model that is not from transformers."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return name if isinstance(name, str) and hasattr(model, "set_attn_implementation") else None


def set_kernel(model: Any, kernel: str) -> None:
    """Switch the attention of ``model`` to ``kernel``. UsageError if it is not available."""
    if kernel_of(model) is None:
        raise UsageError(f"{type(model).__name__} is not of transformers: it has no attention kernels to choose from")
    try:
        with quiet_transformers():
            model.set_attn_implementation(kernel)
    except (ValueError, ImportError) as error:
        raise UsageError(f"attention kernel {kernel!r}: {str(error).splitlines()[0]}") from error
    if kernel_of(model) != kernel:
        raise UsageError(f"attention kernel {kernel!r}: {type(model).__name__} does not have it")


@contextmanager
def attending(model: Any, kernel: str | None) -> Iterator[Any]:
    """``model`` with another attention ``kernel`` (None: its own) until the block ends. UsageError if it is not
    available.
    """
    original = kernel_of(model)
    if kernel is None or kernel == original:
        yield model
        return
    set_kernel(model, kernel)
    try:
        yield model
    finally:
        assert original is not None
        set_kernel(model, original)
