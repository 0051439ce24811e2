"""Check that blocks are autograd's: the gradient may reach a parameter where no branch sees it.

A weight may be used without its module (``h @ self.emb.weight.t()``), an output may leave a module beside what it
returns, or the gradient may differ although the outputs agree (a part of them is detached). The model runs again on one
sample of a batch, with a graph of its parameters, and its outputs, multiplied with random numbers, go backward. Where a
loop calls parts of the model, nobody but the loop can run it: then the parameters are in the graph of the batch itself,
and the sum of its blocks is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from indexer.encode.forward_probe import Call, CannotRun
from indexer.encode.modes import buffers_kept, device_type, devices_of, uncompiled
from indexer.encode.sample_axis import can_be_cut, taken
from indexer.layers.call import tensors_in
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
    """The blocks of a projection by autograd. A parameter's gradient is projected as soon as it is there, and dropped.

    Layers with weights that are no floating-point numbers are left out.
    """

    def __init__(self, model: nn.Module, projection: Projection) -> None:
        self._model, self._projection = model, projection
        self.layers = [
            layer
            for layer in projection.plan.layers
            if all(model.get_parameter(name).is_floating_point() for name in layer.block.parameters)
        ]
        self._arrived: dict[str, dict[str, Tensor]] = {layer.block.name: {} for layer in self.layers}
        self.blocks: dict[str, Tensor] = {}

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the layers, once each."""
        names = dict.fromkeys(name for layer in self.layers for name in layer.block.parameters)
        return [self._model.get_parameter(name) for name in names]

    def gradients(self, total: Tensor, leaves: Sequence[Tensor], *, retain: bool = False) -> tuple[Tensor | None, ...]:
        """The gradients of ``total`` at ``leaves``, while the parameters' own become :attr:`blocks`."""
        handles = []
        try:
            for layer in self.layers:
                for name in layer.block.parameters:
                    parameter = self._model.get_parameter(name)
                    handles.append(parameter.register_hook(partial(self._see, layer, name)))  # type: ignore[no-untyped-call]
            sources = [*leaves, *self.parameters()]
            found = torch.autograd.grad(total, sources, retain_graph=retain, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        for layer in self.layers:  # of some, parameters have no gradient
            if layer.block.name not in self.blocks:
                self._project(layer)
        return found[: len(leaves)]

    def _see(self, layer: BlockPlan, name: str, gradient: Tensor) -> Tensor:
        """The hook of the parameter ``name``; what takes the gradient's place has no memory of its own."""
        arrived = self._arrived[layer.block.name]
        arrived[name] = gradient.detach().to_dense()
        if len(arrived) == len(layer.block.parameters):
            self._project(layer)
        return torch.zeros_like(gradient) if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

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
    model: nn.Module, call: Call, batch: int, sample: int, projection: Projection, leaves: Mapping[str, Tensor]
) -> dict[str, str]:
    """The blocks of one ``sample`` of ``call`` that are not autograd's, each with a phrase that says so.

    ``leaves`` are those of a batch of one, by block name; the branches are in place. Nothing is found where the
    gradients are not finite. CannotRun if the model does not run on one sample.
    """
    expected = AutogradBlocks(model, projection)
    parameters = expected.parameters()
    autocast = torch.autocast(device_type(model), dtype=call.autocast, enabled=call.autocast is not None)
    with uncompiled(), buffers_kept(model), attributes_kept(model):
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            with torch.enable_grad(), autocast, torch.random.fork_rng(devices=devices_of(model)):
                total = _drawn_sum(model, call, batch, sample)
            if total is None:
                return {}
            found = expected.gradients(total, [leaves[layer.block.name] for layer in expected.layers])
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
    return unlike(expected, [None if block is None else block[0] for block in found], narrow=_is_narrow(model, call))


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Tensors that are plain attributes of modules, which a forward pass may set (``torch.nn.utils.weight_norm``), are
    those of before again at the end: they would have the graph of this one.
    """
    kept = [(vars(m), key, x) for m in model.modules() for key, x in vars(m).items() if isinstance(x, Tensor)]
    try:
        yield
    finally:
        for attributes, key, x in kept:
            attributes[key] = x


def _is_narrow(model: nn.Module, call: Call | None) -> bool:
    dtypes = {parameter.dtype for parameter in model.parameters()} | {None if call is None else call.autocast}
    return bool(dtypes & {torch.float16, torch.bfloat16})


def _drawn_sum(model: nn.Module, call: Call, batch: int, sample: int) -> Tensor | None:
    """(): the outputs for a sample, multiplied with random numbers; None if no gradient comes to them."""
    arguments = (call.args, call.kwargs)
    if batch > 1 and not can_be_cut(arguments, batch):
        raise CannotRun(f"{type(model).__name__} is called with nothing whose first axis is the samples")
    args, kwargs = taken(arguments, [sample], batch) if batch > 1 else arguments
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


def unlike(expected: AutogradBlocks, found: Sequence[Tensor | None], *, narrow: bool) -> dict[str, str]:
    """By path of every use of a block (K, J) of ``found``, in the order of the layers, that is not autograd's: a phrase
    that says so.
    """
    sizes = {name: float(block.norm()) for name, block in expected.blocks.items()}
    total = torch.tensor(list(sizes.values())).norm()
    if not bool(total.isfinite()):
        return {}
    most = NARROW_DIFFERENCE if narrow else DIFFERENCE
    problems: dict[str, str] = {}
    for layer, own in zip(expected.layers, found, strict=True):
        name = layer.block.name
        block = expected.blocks[name]
        gap = float((block if own is None else own.float() - block).norm())
        if not gap <= most * (sizes[name] + NEGLIGIBLE * float(total)):
            words = _OTHER.format(gap / sizes[name] if sizes[name] else float("inf"))
            problems |= {use.path: words for use in layer.block.uses}
    return problems
