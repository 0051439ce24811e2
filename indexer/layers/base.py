"""The interface of a layer type, and the registry of layer types.

Legend of the suffixes used in this package: B samples, M positions of one sample (all axes between the
first and the last, flattened), I inputs, O outputs, J = k_in and K = k_out numbers after projection.

The *gradient matrix* of a layer for one sample is (n_out, n_in). For a matrix layer it is [∂ℓ/∂W | ∂ℓ/∂b]: a
bias is a further input that is always 1. For a norm it is the column of ∂ℓ/∂γ above ∂ℓ/∂β. The block is
P_out · gradient · P_inᵀ. It is computed without forming the gradient: block = Σ_m (P_out δ_m)(P_in x_m)ᵀ.
"""

from __future__ import annotations

import inspect
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError, LayerError
from indexer.layers.factors import Factors, summed_gradient

if TYPE_CHECKING:
    from indexer.layers.call import Call

OUTPUT, NARROW_OUTPUT = 1e-3, 0.05
"""Largest relative difference of an output from its formula that can be rounding, in float32 and in 16 bits."""
CHUNK_NUMBERS = 1 << 20
"""Numbers of an output that are compared with the formula at a time."""


class Axis(NamedTuple):
    """Stands in place of a projection matrix for an axis that is not projected, of ``size`` numbers."""

    size: int
    bias_column: int | None = None
    """Index of the bias on the axis, where the input is always 1; None without a bias."""

    def lay_out(self, x_BMN: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, M, size): ``x_BMN``, padded with zeros, and 1 at the bias."""
        padded = torch.nn.functional.pad(x_BMN.to(dtype), (0, self.size - x_BMN.shape[-1]))
        if self.bias_column is not None:
            padded[..., self.bias_column] = 1.0
        return padded


class Sides(NamedTuple):
    """The two projection matrices for one use of a layer, on its device."""

    in_JI: Tensor | Axis
    """Projects the layer's input (without the bias)."""
    in_bias_J: Tensor | None
    """The column of the input side for the bias; None without a bias, or if ``in_JI`` is an axis."""
    out_KO: Tensor | Axis
    """Projects the gradient at the layer's output."""


@dataclass(frozen=True)
class Seen:
    """One run of a layer, with the samples of the batch on the first axis."""

    x: Tensor | Call
    """The input; of a layer without a formula the whole call."""
    outputs: tuple[Tensor, ...]
    """Where the taps go; one tensor where a formula knows the layer."""
    back: Callable[[Sequence[Tensor]], Any]
    """From the tapped :attr:`outputs` to what the module returned."""
    rows: Callable[[Sequence[Tensor | None]], Tensor] = operator.itemgetter(0)
    """From the gradients at the outputs (None where none came) to the gradient that :class:`LayerType` takes."""
    expanded: bool = False
    """Whether the layer ran once for all samples, so that its outputs are repeated."""
    counted: bool = False
    """Whether an index of one axis that counts up, as long as the batch, was taken for one of positions."""
    flat: bool = False
    """Whether the axis of samples was also that of positions: its length shows no batch size."""

    def with_outputs(self, outputs: tuple[Tensor, ...]) -> Seen:
        """The same run with other :attr:`outputs`."""
        return Seen(self.x, outputs, self.back, self.rows, self.expanded, self.counted, self.flat)

    @property
    def dtype(self) -> torch.dtype:
        """The widest of the outputs."""
        if len(self.outputs) == 1:
            return self.outputs[0].dtype
        return reduce(torch.promote_types, (output.dtype for output in self.outputs))

    @property
    def device(self) -> torch.device:
        """That of the outputs."""
        return self.outputs[0].device

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient may come to an output."""
        return any(output.requires_grad for output in self.outputs)


class LayerType(ABC):
    """A type of layer: the modules it handles, its axes and its formulas. It has no state."""

    name: str
    is_matrix: bool = True
    """Whether the weight is a matrix (True) or a vector (norms)."""
    is_lookup: bool = False
    """Whether the input is an index: such a layer may run once for the whole batch (positions)."""

    transposed: bool = False
    """Whether the weight is stored as (n_in, n_out)."""
    has_formula: bool = True
    """Whether gradients come from a formula of ``x`` and ``dy``; else the module runs again, sample by sample."""

    def of(self, parameter: str) -> LayerType:
        """This type for a use of ``parameter`` of the module; a formula serves all parameters."""
        return self

    @abstractmethod
    def handles(self, module: nn.Module) -> bool:
        """Whether ``module`` computes exactly what this type's formulas assume."""

    @abstractmethod
    def axes(self, module: nn.Module) -> tuple[int, int]:
        """(n_out, n_in) of the gradient matrix, without the bias of a matrix layer."""

    def check(self, module: nn.Module, name: str) -> None:  # noqa: B027 - most types have nothing to refuse
        """Raise LayerError for a setting of ``module`` under which the formulas do not hold."""

    @abstractmethod
    def outputs(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        """The output for the input ``x`` by the formula, in each form that modules of this type may have.

        ``x`` is (N, n), N independent rows of an input; for a lookup it is (N,) indices. The module's own ``forward``
        is not called, because it may have been replaced.
        """

    def seen(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any, batch: int, name: str
    ) -> Seen:
        """A run of the layer ``name`` with ``batch`` samples, which returned ``y``.

        CaptureError if its input cannot have them on the first axis.
        """
        return by_sample(input_of(args, kwargs), y, batch, self, name)

    def axis_problem(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any, batch: int) -> str | None:
        """Why the input of a call cannot have the ``batch`` samples on its first axis, in words; None if it can.

        :mod:`indexer.encode.sample_axis` checks whether it has.
        """
        return axis_problem(input_of(args, kwargs), batch, self)

    def output_problem(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> str | None:
        """Why ``y`` is not the output of ``module`` by the formulas, in words; None if it is."""
        return output_problem(self, module, input_of(args, kwargs), y)

    def held(self, x: Any, dtype: torch.dtype) -> Any:
        """The input ``x`` of :class:`Seen`, to be kept for :meth:`factors`; ``dtype`` is that of the output."""
        x = x.detach()
        return x.to(dtype) if x.is_floating_point() and self.is_matrix else x

    def parts(self, x: Any, dy: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """``x`` and ``dy`` cut along the samples, so that the :meth:`factors` of a part fit in memory."""
        yield x, dy

    @abstractmethod
    def keep(self, module: nn.Module, x: Any, sides: Sides, dtype: torch.dtype) -> Any:
        """What the backward pass needs of the input. Nothing else is saved between the two passes.

        ``x`` is the layer's input, first axis B; ``dtype`` that of its output.
        """

    @abstractmethod
    def block(self, module: nn.Module, saved: Any, dy: Tensor, sides: Sides) -> Tensor:
        """The block (B, K, J), float32, from what was saved and the gradient ``dy`` at the output."""

    @abstractmethod
    def factors(self, module: nn.Module, x: Any, dy: Tensor) -> dict[str, Factors]:
        """Each sample's gradient of every parameter of ``module``, by the parameter's name in it.

        ``x`` is the layer's input, ``dy`` the gradient at its output, first axis B. Matrices are ``Outer``, in the
        orientation in which the weight is stored.
        """


LAYER_TYPES: list[LayerType] = []


def register(cls: type[LayerType]) -> type[LayerType]:
    """Class decorator that registers a layer type. Types that are registered later take precedence."""
    LAYER_TYPES.insert(0, cls())
    return cls


def layer_type_of(module: nn.Module) -> LayerType | None:
    """The registered type that handles ``module``, or None."""
    return next((kind for kind in LAYER_TYPES if kind.handles(module)), None)


def layer_type_by_name(name: str) -> LayerType:
    """The registered type ``name``. LayerError if there is none."""
    for kind in LAYER_TYPES:
        if kind.name == name:
            return kind
    known = ", ".join(sorted(kind.name for kind in LAYER_TYPES))
    raise LayerError(f"no layer type is called {name!r}; known types: {known}")


def runs_forward_of(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether ``module`` is a ``cls`` with the forward of ``cls``, a plain weight and no parameters of its own.

    False for a subclass that overrides forward, and for a computed weight (parametrised, quantised).
    """
    return isinstance(module, cls) and type(module).forward is cls.forward and has_plain_weight(module)


def has_plain_weight(module: nn.Module) -> bool:
    """Whether the parameters of ``module`` itself are a weight, and at most a bias."""
    own = {key for key, value in module._parameters.items() if value is not None}
    return "weight" in own and own <= {"weight", "bias"}


_COMPUTES: dict[tuple[Any, ...], bool] = {}


def computes(module: nn.Module, kind: LayerType, x: Tensor) -> bool:
    """Whether ``module``, a class of somebody's own, computes for ``x`` what ``kind`` says, with other weights, too,
    and has its gradients.

    It is tried once for a class and its settings (numbers and words).
    Later each call is held against the formula: see :func:`output_problem`.
    """
    settings = frozenset((k, v) for k, v in vars(module).items() if v is None or isinstance(v, (int, float, str)))
    key = (type(module), kind.name, settings)
    if key not in _COMPUTES:
        _COMPUTES[key] = _computes(module, kind, x)
    return _COMPUTES[key]


def _computes(module: nn.Module, kind: LayerType, x: Tensor) -> bool:
    parameters = inspect.signature(type(module).forward).parameters.values()
    if sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) != 2:  # self and the input
        return False
    generator = torch.Generator().manual_seed(0)
    own = {key: p for key, p in module._parameters.items() if p is not None}
    if any(p.is_meta or not p.is_floating_point() for p in own.values()):
        return False
    # A copy with random weights: at 1 (or 0) other formulas agree by chance.
    copied = deepcopy(module)
    devices = [x.device] if x.is_cuda else []
    with torch.enable_grad(), torch.random.fork_rng(devices=devices):
        for p in copied._parameters.values():
            if p is not None:
                sign = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
                p.requires_grad_(True).data.copy_(sign * (0.5 + torch.rand(p.shape, generator=generator)))
        for scale in (1.0, 0.01):  # with small numbers an epsilon shows
            x_scaled = x if kind.is_lookup else x * scale
            try:
                y = type(copied).forward(copied, x_scaled)
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
                return False
            if not isinstance(y, Tensor) or output_problem(kind, copied, x_scaled, y) is not None:
                return False
            if not y.requires_grad or not _has_gradients_of(kind, copied, x_scaled, y):
                return False
    return True


def _has_gradients_of(kind: LayerType, module: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether the gradients of the parameters of ``module`` are those of the formulas, for a random ``dy``."""
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.device, y.dtype)
    own = {key: p for key, p in module._parameters.items() if p is not None}
    found = torch.autograd.grad(y, list(own.values()), dy, allow_unused=True)
    with torch.no_grad():
        factors = kind.factors(module, kind.held(x, y.dtype), dy)
        for (key, p), gradient in zip(own.items(), found, strict=True):
            if gradient is None or key not in factors:
                return False
            expected = summed_gradient(factors[key], p)
            most = NARROW_OUTPUT if {p.dtype, y.dtype} & {torch.float16, torch.bfloat16} else OUTPUT
            if not (gradient.to_dense() - expected).norm() <= most * expected.norm():
                return False
    return True


def drawn_input(weight: Tensor, width: int) -> Tensor:
    """(1, 2, width): random numbers, on the device of ``weight`` and in its dtype."""
    x = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(1))
    return x.to(weight.device, weight.dtype)


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first argument of a call of a layer."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def output_problem(kind: LayerType, module: nn.Module, x: Tensor, y: Tensor) -> str | None:
    """Why ``y`` is not the output of ``module`` for ``x`` by the formulas of ``kind``, in words; None if it is.

    The forward of a layer may have been replaced, or take more than one input. An output that is not finite is not
    judged: the loss will show it.
    """
    with torch.no_grad(), torch.autocast(device_type=y.device.type, enabled=False):
        error = _output_error(kind, module, x.detach(), y.detach())
    narrow = {x.dtype, y.dtype} & {torch.float16, torch.bfloat16}
    if error is None or error <= (NARROW_OUTPUT if narrow else OUTPUT):
        return None
    return (
        f"computes something else than a {kind.name} ({error:.2g} of its output): a forward that was replaced, or more"
    )


def _output_error(kind: LayerType, module: nn.Module, x: Tensor, y: Tensor) -> float | None:
    """The relative error of ``y`` against the nearest form of the formula; None if ``y`` is not finite.

    It is computed in pieces: the output of a head is the largest tensor of a model, and float64 would double it.
    """
    if y.shape[:-1] != (x.shape if kind.is_lookup else x.shape[:-1]):
        return float("inf")
    x_N, y_NO = x.flatten() if kind.is_lookup else x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    rows = max(1, CHUNK_NUMBERS // y_NO.shape[1])
    finite, gaps, sizes = torch.ones((), dtype=torch.bool, device=y.device), [], []
    for x_part, y_part in zip(torch.split(x_N, rows), torch.split(y_NO, rows), strict=True):
        forms = kind.outputs(module, x_part)
        if any(expected.shape != y_part.shape for expected in forms):
            return float("inf")
        finite &= y_part.isfinite().all()
        gaps.append(torch.stack([(y_part.double() - expected.double()).square().sum() for expected in forms]))
        sizes.append(torch.stack([expected.double().square().sum() for expected in forms]))
    if not bool(finite):
        return None
    gap, size = torch.stack(gaps).sum(0).sqrt(), torch.stack(sizes).sum(0).sqrt()
    return float(torch.where(gap == 0, 0.0, gap / size.clamp_min(torch.finfo(torch.float64).tiny)).min())


def refuse_counted(seen: Seen, name: str) -> None:
    """CaptureError for an index of one axis that may be of samples, where no check tells."""
    if seen.counted:
        raise CaptureError(
            f"layer {name!r} saw an index of one axis that counts up and is as long as the batch: of positions, or of "
            "labels of the samples? No check tells with `check=False`: leave that out, or give the index two axes, "
            "(samples, 1) or (1, positions)"
        )


def axis_problem(x: Tensor, batch: int, kind: LayerType) -> str | None:
    """See :meth:`LayerType.axis_problem`."""
    if batch == 1 and kind.is_lookup and x.dim() == 1:
        return None
    if x.shape[0] == batch and not (kind.is_lookup and x.dim() == 1):
        return None
    if _once_for_all(x, kind) or _flattened(x, batch, kind):
        return None
    shape = tuple(x.shape)
    if kind.is_lookup and x.dim() == 1:
        return (
            f"saw an input of shape {shape}, an index of one axis that does not count up: samples or positions? Give "
            "it two, (samples, 1) or (1, positions)"
        )
    return f"saw an input of shape {shape} in a batch of {batch} samples"


def _once_for_all(x: Tensor, kind: LayerType) -> bool:
    """Whether ``x`` is an index of positions, for which the layer runs once for the whole batch: (1, positions), or
    numbers that count up. Checks of the first batches find an index of samples that looks like one.
    """
    if not kind.is_lookup or x.dim() > 2:
        return False
    if x.dim() == 2:
        return x.shape[0] == 1
    return x.dim() == 1 and bool((x.diff() == 1).all())


def _flattened(x: Tensor, batch: int, kind: LayerType) -> bool:
    """Whether ``x`` (samples · positions, I) can have the positions of each sample one after the other."""
    return not kind.is_lookup and x.dim() == 2 and len(x) > batch and len(x) % batch == 0


def by_sample(x: Tensor, y: Tensor, batch: int, kind: LayerType, name: str) -> Seen:
    """Input and output of the layer ``name`` with the samples of the batch on the first axis.

    A position embedding runs once for the whole batch, so its tensors are expanded to the batch. Later layers then work
    on B copies; dropout right after it would draw for each. Where the axes of samples and positions are one, they are
    told apart. CaptureError for any other layer whose first axis is not the batch.
    """
    problem = axis_problem(x, batch, kind)
    if problem is not None:
        raise CaptureError(
            f"layer {name!r} {problem}; its first axis must be the samples. Leave the layer out with `exclude_layers`"
        )
    if batch == 1 and kind.is_lookup and x.dim() == 1:  # of positions, or of the one sample
        return Seen(x.unsqueeze(0), (y.unsqueeze(0),), _without_samples)
    if _once_for_all(x, kind) and (x.dim() == 1 or batch != 1):
        y = y if y.dim() == 3 else y.unsqueeze(0)  # another tap may have expanded it already
        return Seen(
            x.reshape(1, -1).expand(batch, -1),
            (y.expand(batch, -1, -1),),
            _only,
            expanded=True,
            counted=x.shape == (batch,),
        )
    if len(x) != batch:
        y_BMO = y.reshape(batch, -1, y.shape[-1])
        return Seen(x.reshape(batch, -1, x.shape[-1]), (y_BMO,), _flat_again, flat=True)
    return Seen(x, (y,), _only)


def _only(outputs: Sequence[Tensor]) -> Tensor:
    return outputs[0]


def _without_samples(outputs: Sequence[Tensor]) -> Tensor:
    return outputs[0].squeeze(0)


def _flat_again(outputs: Sequence[Tensor]) -> Tensor:
    return outputs[0].flatten(0, 1)


def flatten_positions(x: Tensor) -> Tensor:
    """(B, …, N) to (B, M, N); (B, N) to (B, 1, N)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def at_least_float(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is if its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def summed(x: Tensor) -> Tensor:
    """(B, …, N) summed over positions: (B, N), at least float32."""
    return at_least_float(flatten_positions(x)).sum(1)


def project(x_BMN: Tensor, matrix_KN: Tensor | Axis, bias_K: Tensor | None, dtype: torch.dtype) -> Tensor:
    """P x (+ the bias column), (B, M, K), computed in ``dtype``."""
    if isinstance(matrix_KN, Axis):
        return matrix_KN.lay_out(x_BMN, dtype)
    bias = None if bias_K is None else bias_K.to(dtype)
    return torch.nn.functional.linear(x_BMN.to(dtype), matrix_KN.to(dtype), bias)


def outer_sum(d_BMK: Tensor, a_BMJ: Tensor) -> Tensor:
    """Σ_m d_m a_mᵀ: (B, K, J) float32, summed in float32 for every dtype of the model."""
    return torch.bmm(d_BMK.float().transpose(1, 2), a_BMJ.float())
