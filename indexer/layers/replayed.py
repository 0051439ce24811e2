"""Modules that no formula knows: each runs again, sample by sample, with a graph of its own.

``keep`` holds the call. When the gradient at the output is there, the module runs on the arguments of one sample, and
autograd gives the gradient of its parameters: exact, slower, and without a weight gradient of the batch. What is held
against each sample is its own output: a module whose rows do not belong to the samples cannot give the same.

Legend: B samples, N numbers of all outputs of one sample, O, I axes of a gradient matrix, K, J ranks of its block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError
from indexer.layers.base import LayerType, Seen, Sides, project, register
from indexer.layers.factors import Factors, Vector

TOLERANCE, NARROW_TOLERANCE = 1e-3, 0.05
"""Largest relative difference of a sample's output alone from that in the batch, in float32 and in 16 bits."""
MASK = 1e4
"""Size from which equal numbers of an output are taken for those of a mask. They would hide all others."""


def mapped(value: Any, function: Callable[[Tensor], Any], of_others: Callable[[Any], Any] = lambda x: x) -> Any:
    """``value`` with ``function`` of every tensor in its tuples, lists and mappings, and ``of_others`` of the rest."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        items = {key: mapped(item, function, of_others) for key, item in value.items()}
        return items if type(value) is dict else type(value)(**items)  # an output of transformers
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, function, of_others) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item, function, of_others) for item in value)
    return of_others(value)


def _without_cache(value: Any) -> Any:
    """``value``, or None for a cache of keys and values: the first run found it empty, and filled it."""
    return None if hasattr(value, "get_seq_length") and hasattr(value, "update") else value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in ``value``, in the order of :func:`mapped`."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def _samples_in(value: Any, batch: int) -> Tensor | None:
    """The first tensor of the arguments that may have ``batch`` samples on its first axis, apart from positions or with
    them: rather one with an axis more and this length (a table of positions may come first), and no weight. None where
    all are of positions, or there is none: the module runs once for all samples.
    """
    may = [x for x in tensors_in(value) if x.dim() and (len(x) > 1 or batch == 1) and not _counts_up(x)]
    may = [x for x in may if not isinstance(x, nn.Parameter)] or may
    if not may or len(may[0]) == batch:
        return may[0] if may else None
    return next((x for x in may if len(x) == batch and x.dim() > may[0].dim()), may[0])


def _counts_up(x: Tensor) -> bool:
    """Whether ``x`` is an index of positions on one axis."""
    return x.dim() == 1 and not x.is_floating_point() and x.dtype != torch.bool and bool((x.diff() == 1).all())


def _by_sample(output: Tensor, batch: int, *, once: bool) -> Tensor | None:
    """``output`` with an axis of samples, first, apart from positions or with them; None if it cannot have one."""
    if not output.dim():
        return output.reshape(1)  # that of the one sample
    if batch > 1 and (once or len(output) == 1):
        shape = output.shape[1:] if len(output) == 1 else output.shape
        return output.expand(batch, *shape)
    return output if len(output) and len(output) % batch == 0 else None


def _rows(outputs: Sequence[Tensor], batch: int) -> Tensor:
    """(B, N): the numbers of all outputs by sample, in the widest of their dtypes."""
    return torch.cat([output.reshape(batch, -1) for output in outputs], dim=1)


def _without_result(hook: Callable[..., Any]) -> Callable[..., None]:
    def run(*args: Any) -> None:
        hook(*args)

    return run


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """``module`` and all in it without hooks after their forward: taps must not see it run again.

    Hooks before it stay, because some make the weights (``torch.nn.utils.weight_norm``), but those of ``module`` itself
    change its arguments no more: these are what they returned.
    """
    kept = [(part, part._forward_hooks) for part in module.modules() if part._forward_hooks]
    before = module._forward_pre_hooks
    try:
        for part, hooks in kept:
            part._forward_hooks = type(hooks)()
        module._forward_pre_hooks = type(before)((key, _without_result(hook)) for key, hook in before.items())
        yield
    finally:
        module._forward_pre_hooks = before
        for part, hooks in kept:
            part._forward_hooks = hooks


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a module, which can be cut to some of its samples and run again."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch: int
    """Samples of the call."""
    outputs_BN: Tensor
    widths: tuple[int, ...]
    """Numbers of each output in a row of :attr:`outputs_BN`."""
    places: tuple[int, ...]
    """The samples that are meant."""
    autocast: torch.dtype | None
    versions: tuple[tuple[Tensor, int], ...]
    """The tensors of the arguments, and their versions when the module ran."""
    tried: list[int]
    """Samples of which doubtful arguments were tried cut and whole; the list of all parts of a call."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, samples: slice | Tensor) -> Call:
        """The same call for some of the samples."""
        if isinstance(samples, slice):
            places = self.places[samples]
        else:
            order = samples.nonzero().flatten() if samples.dtype == torch.bool else samples
            places = tuple(self.places[int(place)] for place in order)
        return Call(
            self.module,
            self.args,
            self.kwargs,
            self.batch,
            self.outputs_BN,
            self.widths,
            places,
            self.autocast,
            self.versions,
            self.tried,
        )

    @property
    def dtype(self) -> torch.dtype:
        """That of the outputs."""
        return self.outputs_BN.dtype

    def inputs(self) -> Tensor:
        """(B, …): the first tensor of the arguments that has samples. Other arguments may have no axis of them."""
        first = _samples_in((self.args, self.kwargs), self.batch)
        if first is None:
            return self.outputs_BN[:, :1]
        return first.detach().reshape(self.batch, -1, first.shape[-1] if first.dim() > 1 else 1)

    def gradients(self, keys: Sequence[str], dy_BN: Tensor) -> Iterator[dict[str, Tensor]]:
        """The gradient of each parameter by its name in the module, for one sample after the other.

        CaptureError if a sample alone has another output than in the batch.
        """
        if any(tensor._version != version for tensor, version in self.versions):
            raise CaptureError(
                f"an input of a {type(self.module).__name__} was changed in place after it ran: it cannot run again: "
                "leave the layer out with `exclude_layers`"
            )
        for place, dy_N in zip(self.places, dy_BN, strict=True):
            yield self._gradient(place, keys, dy_N)

    def _gradient(self, place: int, keys: Sequence[str], dy_N: Tensor) -> dict[str, Tensor]:
        """That of the sample at ``place``. Where it is not known which arguments are of samples, all that give its
        output must give one gradient.
        """
        found: dict[str, Tensor] | None = None
        problem: CaptureError | None = None
        for other in (None, *self._doubtful()):
            if other is not None and found is not None and self.tried and not self._often:
                break
            try:
                gradient = self._gradient_with(place, keys, dy_N, other)
            except CaptureError as error:
                problem = problem or error
                continue
            if found is None:
                found = gradient
            elif any((gradient[key] - found[key]).norm() > TOLERANCE * found[key].norm() for key in keys):
                assert other is not None
                raise CaptureError(
                    f"a {type(self.module).__name__}, which no formula knows, was called with a tensor of shape "
                    f"{tuple(other.shape)} in a batch of {self.batch} samples: whose axis is the first, its output "
                    "does not tell. Give a batch of another size, or leave it out with `exclude_layers`"
                )
        if found is None:
            assert problem is not None
            raise problem
        if bool(dy_N.any()):
            self.tried.append(place)
        return found

    @property
    def _often(self) -> bool:
        """Whether a sample has as many positions as there are samples, so that each is tried in every way."""
        tensors = [x for x in tensors_in((self.args, self.kwargs)) if x.dim()]
        return any(len(x) == self.batch**2 or self.batch in x.shape[1:] for x in tensors)

    def _doubtful(self) -> list[Tensor]:
        """Arguments as long as the batch, or a multiple of it: they may be of samples, or of something else."""
        first = _samples_in((self.args, self.kwargs), self.batch)
        if first is None or self.batch == 1:
            return []
        tensors = [x for x in tensors_in((self.args, self.kwargs)) if x.dim()]
        return [x for x in tensors if len(x) and len(x) % self.batch == 0]

    def _gradient_with(self, place: int, keys: Sequence[str], dy_N: Tensor, other: Tensor | None) -> dict[str, Tensor]:
        """The gradients of the sample at ``place``; the argument ``other`` is cut if it were whole, and the other way
        round.
        """
        leaves = {key: self.module.get_parameter(key).detach().requires_grad_() for key in keys}
        args, kwargs = self._alone(place, other)
        device = self.outputs_BN.device.type
        with (
            _without_hooks(self.module),
            torch.enable_grad(),
            torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None),
        ):
            try:
                y = torch.func.functional_call(self.module, leaves, args, dict(kwargs))
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise CaptureError(f"{self._cannot}: {error!r:.200}") from error
            y_1N = _rows(_of_samples(_outputs(y), self.batch), 1)
        expected_N = self.outputs_BN[place]
        if y_1N.shape[1:] != expected_N.shape or self._differs(y_1N[0].detach(), expected_N):
            raise CaptureError(self._cannot)
        if not y_1N.requires_grad:  # an expert that this sample does not meet
            return {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
        found = torch.autograd.grad(y_1N, list(leaves.values()), dy_N.unsqueeze(0).to(y_1N.dtype), allow_unused=True)
        return {
            key: torch.zeros_like(leaf) if gradient is None else gradient
            for (key, leaf), gradient in zip(leaves.items(), found, strict=True)
        }

    @property
    def _cannot(self) -> str:
        return (
            f"a {type(self.module).__name__}, which no formula knows, gives another output for a sample alone than in "
            "its batch: it mixes samples, is random, or has a state. Leave it out with `exclude_layers`"
        )

    def _differs(self, y_N: Tensor, expected_N: Tensor) -> bool:
        narrow = {y_N.dtype, *(p.dtype for p in self.module.parameters()), self.autocast}
        most = NARROW_TOLERANCE if narrow & {torch.float16, torch.bfloat16} else TOLERANCE
        widths = list(self.widths)
        parts = zip(torch.split(y_N.double(), widths), torch.split(expected_N.double(), widths), strict=True)
        return any(_gap(y, expected) > most for y, expected in parts)

    def _alone(self, place: int, other: Tensor | None) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments of one sample; see :meth:`_gradient_with`.

        Where the first tensor has samples and positions on one axis, so have others.
        """
        first = _samples_in((self.args, self.kwargs), self.batch)
        length = 0 if first is None else len(first)

        def cut(x: Tensor) -> Tensor:
            is_other, x = x is other, x.detach()
            if not length or not x.dim():
                return x
            is_cut = len(x) in (self.batch, length) and not _counts_up(x)
            if is_cut == is_other:
                return x
            each = len(x) // self.batch
            return x[place * each : (place + 1) * each]

        args, kwargs = mapped((self.args, self.kwargs), cut, _without_cache)
        return args, kwargs


def _gap(y_N: Tensor, expected_N: Tensor) -> float:
    """‖y - expected‖ ÷ ‖expected‖, without equal numbers of masks; infinite if others are not finite."""
    same = (y_N == expected_N) & (expected_N.abs() >= MASK) | (y_N.isnan() & expected_N.isnan())
    gap, size = (y_N - expected_N)[~same].norm(), expected_N[~same].norm()
    if not bool((gap + size).isfinite()):
        return float("inf")
    return float(gap / size) if bool(gap) else 0.0  # infinite where nothing was expected


def _outputs(y: Any) -> list[Tensor]:
    """The outputs that a gradient can come to."""
    return [output for output in tensors_in(y) if _may_have_gradient(output)]


def _may_have_gradient(output: Tensor) -> bool:
    return output.is_floating_point()


def _of_samples(outputs: Sequence[Tensor], batch: int) -> list[Tensor]:
    """``outputs`` without single numbers, which of more than one sample are of none."""
    return [output for output in outputs if output.dim() or batch == 1]


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
        first, outputs = _samples_in((args, kwargs), batch), _of_samples(_outputs(y), batch)
        by_sample = [_by_sample(output, batch, once=first is None) for output in outputs]
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
        first, everything = _samples_in((args, kwargs), batch), _outputs(y)
        outputs = _of_samples(everything, batch)
        numbers = [output for output in everything if not output.dim() and batch > 1]
        by_sample = [_by_sample(output, batch, once=first is None) for output in outputs]
        of_samples = tuple(output for output in by_sample if output is not None)
        device = of_samples[0].device.type
        call = Call(
            module,
            args,
            kwargs,
            batch,
            outputs_BN=_rows([output.detach() for output in of_samples], batch),
            widths=tuple(output.numel() // batch for output in of_samples),
            places=tuple(range(batch)),
            autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            versions=tuple((x, x._version) for x in tensors_in((args, kwargs))),
            tried=[],
        )

        def back(tapped: Sequence[Tensor]) -> Any:
            following, of_batch = iter(tapped[: len(of_samples)]), iter(tapped[len(of_samples) :])

            def put(x: Tensor) -> Tensor:
                if not _may_have_gradient(x):
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
            return _rows([torch.zeros_like(output) if dy is None else dy for dy, output in pairs], batch)

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
