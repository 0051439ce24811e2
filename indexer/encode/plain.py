"""The slow, obvious way to a vector: plain autograd of one sample, then the projection's matrices. The engine must give
the same.

It uses no hooks, side branches or formulas of layer types. It needs a gradient of every parameter, as much memory as
the weights.

Legend: K and J the ranks of a block, O and I the axes of a gradient matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from indexer.projection.blocks import Block
from indexer.projection.matrices import Projection


@contextmanager
def all_trainable(model: nn.Module) -> Iterator[None]:
    """Every parameter of ``model`` requires a gradient until the block ends. Then each has its own flag again."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of a scalar ``loss`` for each parameter by name, in its dtype; zeros if the loss does not depend on
    it.

    Tied parameters appear once, under their first name.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True)
    }


def plain_blocks(projection: Projection, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """P_out G P_inᵀ of every block by name, (K, J) in the dtype of ``gradients``."""
    return {layer.block.name: plain_block(projection, layer.block, gradients) for layer in projection.plan.layers}


def plain_block(projection: Projection, block: Block, gradients: dict[str, Tensor]) -> Tensor:
    """P_out G P_inᵀ of one block, (K, J) in the dtype of ``gradients``."""
    matrix = block.lay_out(gradients)
    p_in, p_out = (torch.as_tensor(side).to(matrix) for side in projection.sides[block.name])
    return p_out @ matrix @ p_in.t()


class BlockGradients:
    """Computes the blocks of a projection from gradients that arrive parameter by parameter, in any order, each once.

    The gradients of a block are dropped as soon as it is computed, so only those of one or a few blocks are in memory.
    """

    def __init__(self, projection: Projection, blocks: Iterable[Block]) -> None:
        self._projection = projection
        self._blocks = {block.name: block for block in blocks}
        self._pending: dict[str, dict[str, Tensor]] = {name: {} for name in self._blocks}
        self._done: dict[str, Tensor] = {}

    def owners(self) -> dict[str, Block]:
        """The block of each parameter, by the parameter's name."""
        return {name: block for block in self._blocks.values() for name in block.parameters}

    def arrived(self, block: Block, name: str, gradient: Tensor) -> None:
        """Add the ``gradient`` of parameter ``name`` of ``block``."""
        pending = self._pending[block.name]
        pending[name] = gradient.detach().to_dense().float()
        if len(pending) == len(set(block.parameters)):
            del self._pending[block.name]
            self._done[block.name] = plain_block(self._projection, block, pending)

    def finished(self, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(K, J) float32 for each block by name. A gradient that did not arrive counts as zeros like
        ``shapes[name]``.
        """
        for name, pending in self._pending.items():
            block = self._blocks[name]
            for parameter in block.parameters:  # the loss does not depend on it
                pending.setdefault(parameter, torch.zeros_like(shapes[parameter], dtype=torch.float32))
            self._done[name] = plain_block(self._projection, block, pending)
        self._pending = {}
        return self._done


class ArrivingBlocks:
    """Computes the blocks of a projection from one ``loss.backward()`` in its ``with`` block: see
    :class:`BlockGradients`.

    Inside, only the parameters of the blocks are trainable. At the end each parameter has its own flag and ``.grad``
    again.
    """

    def __init__(self, model: nn.Module, projection: Projection) -> None:
        self._gradients = BlockGradients(projection, [layer.block for layer in projection.plan.layers])
        self._names = [layer.block.name for layer in projection.plan.layers]
        self._parameters = dict(model.named_parameters())
        self._flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in self._parameters.values()]
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> ArrivingBlocks:
        for parameter, _, _ in self._flags:
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, block in self._gradients.owners().items():
            parameter = self._parameters[name]
            parameter.requires_grad_(True)
            hook = partial(self._arrived, name, block)
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter, flag, gradient in self._flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient

    def _arrived(self, name: str, block: Block, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self._gradients.arrived(block, name, gradient)

    def blocks(self) -> list[Tensor]:
        """(K, J) float32 for each block, in the order of the projection; zeros if the loss does not depend on it."""
        blocks = self._gradients.finished(self._parameters)
        return [blocks[name] for name in self._names]
