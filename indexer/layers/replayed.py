"""Modules that no formula knows: each runs again, sample by sample.

``keep`` holds the call. When the gradient at the output is there, the module runs on the arguments of one sample, and
autograd gives the gradient of its parameters: exact, slower, and without a weight gradient of the batch.

Legend: B samples, O, I axes of a gradient matrix, K, J ranks of its block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError
from indexer.layers.base import LayerType, Seen, Sides, project, register
from indexer.layers.call import (
    Call,
    joined,
    mapped,
    may_have_gradient,
    outputs_of,
    samples_in,
    tensors_in,
    with_axes,
    with_sample_axis,
)
from indexer.layers.factors import Factors, Vector


@register
class ReplayedLayer(LayerType):
    """Any module, for the parameters ``keys``, their names in it."""

    name = "replayed"
    has_formula = False

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self.keys = keys

    def of(self, parameter: str) -> LayerType:
        """The type for one parameter."""
        return ReplayedLayer((parameter,))

    def handles(self, module: nn.Module) -> bool:
        return False  # it is asked for by name, where no other type handles a module

    def axes(self, module: nn.Module) -> tuple[int, int]:
        """All axes but the last are outputs; a vector is one column."""
        return matrix_axes(module.get_parameter(self.keys[0]))

    def outputs(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        raise NotImplementedError("there is no formula")

    def axis_problem(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any, batch: int) -> str | None:
        first, outputs = samples_in((args, kwargs), batch), with_axes(outputs_of(y), batch)
        by_sample = [with_sample_axis(output, batch, once=first is None) for output in outputs]
        if outputs and (first is None or len(first) % batch == 0) and all(x is not None for x in by_sample):
            return None
        shapes = [tuple(x.shape) for x in tensors_in((args, kwargs))], [tuple(x.shape) for x in tensors_in(y)]
        return f"saw inputs of shapes {shapes[0]} and gave {shapes[1]} in a batch of {batch} samples"

    def output_problem(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> str | None:
        return None  # each sample's output is compared when it runs alone

    def seen(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any, batch: int, name: str
    ) -> Seen:
        problem = self.axis_problem(args, kwargs, y, batch)
        if problem is not None:
            raise CaptureError(f"layer {name!r} {problem}; leave it out with `exclude_layers`")
        first, everything = samples_in((args, kwargs), batch), outputs_of(y)
        outputs = with_axes(everything, batch)
        numbers = [output for output in everything if not output.dim() and batch > 1]
        by_sample = [with_sample_axis(output, batch, once=first is None) for output in outputs]
        of_samples = tuple(output for output in by_sample if output is not None)
        device = of_samples[0].device.type
        call = Call(
            module,
            args,
            kwargs,
            batch,
            outputs_BN=joined([output.detach() for output in of_samples], batch),
            shapes=tuple(output.shape for output in of_samples),
            places=tuple(range(batch)),
            autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            versions=tuple((x, x._version) for x in tensors_in((args, kwargs))),
            tried=[],
        )

        def back(tapped: Sequence[Tensor]) -> Any:
            following, of_batch = iter(tapped[: len(of_samples)]), iter(tapped[len(of_samples) :])

            def put(x: Tensor) -> Tensor:
                if not may_have_gradient(x):
                    return x
                if batch > 1:
                    return next(following if x.dim() else of_batch)
                return next(following) if x.dim() else next(following).reshape(())

            return mapped(y, put)

        def rows(gradients: Sequence[Tensor | None]) -> Tensor:
            if any(dy is not None and bool(dy.any()) for dy in gradients[len(of_samples) :]):
                raise CaptureError(
                    f"a number that layer {name!r} returns beside its outputs (a loss of its own) is of all {batch} "
                    "samples together, and goes into the loss: no sample has a gradient of its own. Return it by "
                    "sample, leave it out of the loss, or leave the layer out with `exclude_layers`"
                )
            pairs = zip(gradients[: len(of_samples)], of_samples, strict=True)
            return joined([torch.zeros_like(output) if dy is None else dy for dy, output in pairs], batch)

        expanded = any(output is not own for output, own in zip(of_samples, outputs, strict=True))
        flat = first is None or len(first) != batch
        return Seen(call, (*of_samples, *numbers), back, rows, expanded=expanded, flat=flat)

    def held(self, x: Any, dtype: torch.dtype) -> Any:
        return x

    def parts(self, x: Any, dy: Tensor) -> Iterator[tuple[Any, Tensor]]:
        for place in range(len(dy)):
            yield x[place : place + 1], dy[place : place + 1]

    def keep(self, module: nn.Module, x: Any, sides: Sides, dtype: torch.dtype) -> Any:
        return x

    def block(self, module: nn.Module, saved: Any, dy: Tensor, sides: Sides) -> Tensor:
        return torch.stack(
            [
                _projected(gradient[self.keys[0]].reshape(self.axes(module)).float(), sides)
                for gradient in saved.gradients(self.keys, dy)
            ]
        )

    def factors(self, module: nn.Module, x: Any, dy: Tensor) -> dict[str, Factors]:
        gradients = list(x.gradients(self.keys, dy))
        dtype = torch.promote_types(dy.dtype, torch.float32)
        return {key: Vector(torch.stack([one[key].flatten() for one in gradients]).to(dtype)) for key in self.keys}


def matrix_axes(parameter: Tensor) -> tuple[int, int]:
    """(O, I) of the gradient matrix of a parameter that no formula knows; a vector of any shape is a column."""
    if parameter.dim() < 2 or parameter.numel() in (parameter.shape[-1], parameter.numel() // parameter.shape[-1]):
        return parameter.numel(), 1
    return parameter.numel() // parameter.shape[-1], parameter.shape[-1]


def _projected(gradient_OI: Tensor, sides: Sides) -> Tensor:
    """(K, J): P_out G P_inᵀ."""
    half_OJ = project(gradient_OI.unsqueeze(0), sides.in_JI, None, torch.float32)
    return project(half_OJ.transpose(1, 2), sides.out_KO, None, torch.float32)[0].t()
