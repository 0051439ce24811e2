"""Running a model temporarily in another mode, and restoring its mode, buffers and random state."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import UsageError

_unsettled: WeakSet[RemovableHandle] = WeakSet()


def devices_of(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that hold parameters of ``model``."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []  # asked for each pass of a check: no walk over the parameters where none can be there
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def reseed(seed: int, devices: Sequence[int] = ()) -> None:
    """The random numbers of the CPU and of these CUDA devices begin at ``seed``, as after ``torch.manual_seed``.

    That one seeds every device, also those that a surrounding ``fork_rng`` does not restore. Where CUDA has not begun,
    it notes the seed, with a stack trace, for when it does.
    """
    torch.default_generator.manual_seed(seed)
    for device in devices:
        torch.cuda.default_generators[device].manual_seed(seed)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode. The random state and the mode of every module are restored at the end of the block."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=devices_of(model)):
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restores every buffer at the end of the block, because a forward pass may count or update statistics."""
    buffers = [
        (module, name, buffer, buffer.clone(), buffer._version)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, values, version in buffers:
            module._buffers[name] = buffer
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(values)


def refuse_randomness(model: nn.Module) -> None:
    """UsageError if a forward pass of ``model`` is random or mixes the samples of a batch.

    It finds dropout modules in training mode, modules in training mode with a positive attribute whose name contains
    "dropout" (the attention of transformers), and batch norms that use the batch's statistics.
    """
    for name, module in model.named_modules():
        where = name or type(model).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
            raise UsageError(
                f"{where} is a {type(module).__name__} that mixes the samples of a batch; call model.eval()"
            )
        if not module.training:
            continue
        rates = {"p": module.p} if isinstance(module, nn.modules.dropout._DropoutNd) else vars(module)
        for attribute, value in rates.items():
            named = attribute == "p" or "dropout" in attribute
            if named and isinstance(value, float) and value > 0.0:
                raise UsageError(
                    f"{where} ({type(module).__name__}) is in training mode with {attribute}={value}: gradients would "
                    "be random; call model.eval()"
                )


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """No autocast on devices of ``kind``. Where none is open this costs nothing: it is entered for each layer."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def autocast_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of autocast, if it is enabled for the device of ``model``; else None."""
    kind = device_type(model)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def device_type(model: nn.Module) -> str:
    """The type of the device of ``model``: ``cpu`` or ``cuda``."""
    return str(next(model.parameters()).device.type)


def uncompiled() -> AbstractContextManager[Any]:
    """Every compiled model runs as it was written."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def is_compiled(model: nn.Module) -> bool:
    """Whether ``model`` was compiled, or a module of it in place."""
    return any(is_compiled_itself(module) for module in model.modules())


def is_compiled_itself(module: nn.Module) -> bool:
    """Whether ``module`` is the wrapper of ``torch.compile``, or was compiled in place."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


class Removable(Protocol):
    """Something on a module that can be taken away."""

    def remove(self) -> None:
        """Take it away."""


class _CallInPlace:
    """Stands in for the call of a module that was compiled in place, whose hooks are inside its graph.

    All who watch the module share one, and the last to go puts the call of the module back.
    """

    def __init__(self, module: nn.Module) -> None:
        self.call: Any = module._compiled_call_impl
        self.watching: list[_Watch] = []
        module._compiled_call_impl = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self.call(*args, **kwargs)
        watching = list(self.watching)
        for watch in watching:
            watch.enter()
        try:
            return self.call(*args, **kwargs)
        finally:
            for watch in reversed(watching):
                watch.leave()


class _Watch:
    """One who watches the calls of a module that was compiled in place."""

    def __init__(self, module: nn.Module, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        self._module, self.enter, self.leave = module, enter, leave
        call: Any = module._compiled_call_impl
        self._around = call if isinstance(call, _CallInPlace) else _CallInPlace(module)
        self._around.watching.append(self)

    def remove(self) -> None:
        around = self._around
        if self in around.watching:
            around.watching.remove(self)
        if not around.watching and self._module._compiled_call_impl is around:  # else it was compiled again
            self._module._compiled_call_impl = around.call


def around_calls(module: nn.Module, enter: Callable[[], None], leave: Callable[[], None]) -> list[Removable]:
    """Call ``enter`` before and ``leave`` after each call of the compiled ``module``, outside of its graphs and also
    after an exception. Nothing is called where the call itself is part of a graph.
    """
    if not hasattr(module, "_orig_mod"):
        return [_Watch(module, enter, leave)]

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_dynamo_compiling():
            enter()

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_dynamo_compiling():
            leave()

    return [
        module.register_forward_pre_hook(before, prepend=True),
        module.register_forward_hook(after, always_call=True),
    ]


def outermost_compiled(model: nn.Module) -> list[nn.Module]:
    """The compiled modules among ``model`` and what is in it, but none that is inside of another."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module not in inside and is_compiled_itself(module):
            found.append(module)
            inside.update(module.modules())
    return found


def outside_graphs(handle: RemovableHandle) -> RemovableHandle:
    """``handle``, whose hook of a model itself torch.compile shall neither look into nor leave out.

    Saying so imports the compiler, which takes seconds: it is said here if something was compiled, else later by
    :func:`settle_hooks`.
    """
    _unsettled.add(handle)
    settle_hooks()
    return handle


def settle_hooks() -> None:
    """Keep every hook of :func:`outside_graphs` outside compiled graphs, if there may be any. Call it before a model
    runs that may have been compiled since.
    """
    if not _unsettled or "torch._dynamo" not in sys.modules:
        return
    for handle in list(_unsettled):
        hooks = handle.hooks_dict_ref()
        if hooks is not None and handle.id in hooks:
            hooks[handle.id] = torch.compiler.disable(hooks[handle.id])  # type: ignore[no-untyped-call]
    _unsettled.clear()


def forward_options(model: Any) -> dict[str, Any]:
    """The keywords for the model's forward beside its inputs: no cache of keys and values, if it has one."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
