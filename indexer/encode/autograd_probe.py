"""Check that the blocks of one sample are autograd's: its gradient may reach a parameter where no branch sees it.

A weight may be used without its module (``h @ self.emb.weight.t()``), an output may leave a module beside what it
returns, or the gradient may differ although the outputs agree (a part of them is detached). The model runs again on one
sample of a batch, with a graph of its parameters, and its outputs, multiplied with random numbers, go backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from indexer.encode.forward_probe import Call, CannotRun
from indexer.encode.modes import buffers_kept, device_type, devices_of
from indexer.encode.sample_axis import can_be_cut, taken
from indexer.layers.replayed import tensors_in
from indexer.projection.matrices import Projection
from indexer.projection.plan import BlockPlan

DIFFERENCE, NARROW_DIFFERENCE = 1e-2, 0.2
"""Largest relative difference of a block from autograd's that can be rounding, in float32 and with 16-bit numbers."""
NEGLIGIBLE = 1e-2
"""A block that is a smaller share of all of them may be rounding noise (that of a key's bias is zero)."""
_OTHER = (
    "its gradient is not autograd's ({:.2g} of its size): the weight is used where no branch sees it, or the module "
    "detaches a part of its output, or passes it on beside what it returns"
)


class AutogradBlocks:
    """The blocks of ``layers`` by autograd. A parameter's gradient is projected as soon as it is there, and dropped."""

    def __init__(self, model: nn.Module, projection: Projection, layers: Sequence[BlockPlan]) -> None:
        self._model, self._projection, self._layers = model, projection, layers
        self._arrived: dict[str, dict[str, Tensor]] = {layer.block.name: {} for layer in layers}
        self.blocks: dict[str, Tensor] = {}

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the layers, once each."""
        names = dict.fromkeys(name for layer in self._layers for name in layer.block.parameters)
        return [self._model.get_parameter(name) for name in names]

    def see(self, layer: BlockPlan, name: str, gradient: Tensor) -> Tensor:
        """The hook of the parameter ``name``; what takes the gradient's place has no memory of its own."""
        arrived = self._arrived[layer.block.name]
        arrived[name] = gradient.detach().to_dense()
        if len(arrived) == len(layer.block.parameters):
            self._project(layer)
        return torch.zeros_like(gradient) if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

    def finish(self) -> None:
        """Form the blocks of which some parameters have no gradient."""
        for layer in self._layers:
            if layer.block.name not in self.blocks:
                self._project(layer)

    def _project(self, layer: BlockPlan) -> None:
        arrived, (p_in, p_out) = self._arrived.pop(layer.block.name), self._projection.sides[layer.block.name]
        tensors = {
            name: arrived[name].float() if name in arrived else torch.zeros_like(p, dtype=torch.float32)
            for name, p in ((name, self._model.get_parameter(name)) for name in layer.block.parameters)
        }
        block = layer.block.lay_out(tensors)
        block = block if p_out is None else p_out.float() @ block
        self.blocks[layer.block.name] = block if p_in is None else block @ p_in.float().t()


def differing(
    model: nn.Module, call: Call, batch: int, projection: Projection, leaves: Mapping[str, Tensor]
) -> dict[str, str]:
    """The blocks of one sample of ``call`` that are not autograd's, each with a phrase that says so.

    ``leaves`` are those of a batch of one, by block name; the branches are in place. Layers with weights that are no
    floating-point numbers are left out, and nothing is found where the gradients are not finite. CannotRun if the model
    does not run on one sample.
    """
    layers = [
        layer
        for layer in projection.plan.layers
        if all(model.get_parameter(name).is_floating_point() for name in layer.block.parameters)
    ]
    expected = AutogradBlocks(model, projection, layers)
    parameters = expected.parameters()
    autocast = torch.autocast(device_type(model), dtype=call.autocast, enabled=call.autocast is not None)
    handles = []
    with buffers_kept(model), _attributes_kept(model):
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for layer in layers:
                for name in layer.block.parameters:
                    parameter = model.get_parameter(name)
                    handles.append(parameter.register_hook(partial(expected.see, layer, name)))  # type: ignore[no-untyped-call]
            with torch.enable_grad(), autocast, torch.random.fork_rng(devices=devices_of(model)):
                total = _drawn_sum(model, call, batch)
            if total is None:
                return {}
            names = [layer.block.name for layer in layers]
            found = torch.autograd.grad(total, [*(leaves[name] for name in names), *parameters], allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
            for parameter in parameters:
                parameter.requires_grad_(False)
    expected.finish()
    return _problems(layers, expected.blocks, dict(zip(names, found, strict=False)), narrow=_is_narrow(model, call))


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Tensors that are plain attributes of modules, which a forward pass may set (``torch.nn.utils.weight_norm``), are
    those of before again at the end: they would have the graph of this one.
    """
    kept = [(vars(m), key, x) for m in model.modules() for key, x in vars(m).items() if isinstance(x, Tensor)]
    try:
        yield
    finally:
        for attributes, key, x in kept:
            attributes[key] = x


def _is_narrow(model: nn.Module, call: Call) -> bool:
    dtypes = {parameter.dtype for parameter in model.parameters()} | {call.autocast}
    return bool(dtypes & {torch.float16, torch.bfloat16})


def _drawn_sum(model: nn.Module, call: Call, batch: int) -> Tensor | None:
    """(): the outputs for the first sample, multiplied with random numbers; None if no gradient comes to them."""
    arguments = (call.args, call.kwargs)
    if batch > 1 and not can_be_cut(arguments, batch):
        raise CannotRun(f"{type(model).__name__} is called with nothing whose first axis is the samples")
    args, kwargs = taken(arguments, [0], batch) if batch > 1 else arguments
    try:
        output = model(*args, **kwargs)
    except Exception as error:
        raise CannotRun(f"{type(model).__name__} does not run on one sample of a batch ({error!r:.200})") from error
    generator = torch.Generator().manual_seed(0)
    sums = []
    for tensor in tensors_in(output):
        if tensor.requires_grad:
            drawn = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
            sums.append((tensor * drawn).sum().float())
    return torch.stack(sums).sum() if sums else None


def _problems(
    layers: Sequence[BlockPlan], expected: Mapping[str, Tensor], found: Mapping[str, Tensor | None], *, narrow: bool
) -> dict[str, str]:
    """By path of every use of a block that is not autograd's."""
    sizes = {name: float(block.norm()) for name, block in expected.items()}
    total = torch.tensor(list(sizes.values())).norm()
    if not bool(total.isfinite()):
        return {}
    most = NARROW_DIFFERENCE if narrow else DIFFERENCE
    problems: dict[str, str] = {}
    for layer in layers:
        name = layer.block.name
        own, block = found[name], expected[name]
        gap = float((block if own is None else own[0].float() - block).norm())
        if not gap <= most * (sizes[name] + NEGLIGIBLE * float(total)):
            words = _OTHER.format(gap / sizes[name] if sizes[name] else float("inf"))
            problems |= {use.path: words for use in layer.block.uses}
    return problems
