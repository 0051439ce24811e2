"""A call of a module that no formula knows, which can run again for one sample, with a graph of its own.

What is held against each sample is its own output: a module whose rows do not belong to the samples cannot give the
same.

Legend: B samples, N numbers of all outputs of one sample; of packed rows R rows, T positions of a row, S samples, L
positions of the longest, M numbers of all outputs at one position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError

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


def samples_in(value: Any, batch: int) -> Tensor | None:
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


def with_sample_axis(output: Tensor, batch: int, *, once: bool) -> Tensor | None:
    """``output`` with an axis of samples, first, apart from positions or with them; None if it cannot have one."""
    if not output.dim():
        return output.reshape(1)  # that of the one sample
    if batch > 1 and (once or len(output) == 1):
        shape = output.shape[1:] if len(output) == 1 else output.shape
        return output.expand(batch, *shape)
    return output if len(output) and len(output) % batch == 0 else None


def joined(outputs: Sequence[Tensor], batch: int) -> Tensor:
    """(B, N): the numbers of all outputs by sample, in the widest of their dtypes."""
    return torch.cat([output.reshape(batch, -1) for output in outputs], dim=1)


def has_positions(shape: Sequence[int], rows: int, length: int) -> bool:
    """Whether a tensor of ``shape`` has ``rows`` of ``length`` positions on its first two axes, or on its first."""
    return tuple(shape[:2]) == (rows, length) or (len(shape) > 0 and shape[0] == rows * length)


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
    shapes: tuple[torch.Size, ...]
    """Of the outputs, with all samples of the batch."""
    places: tuple[int, ...]
    """The samples that are meant; of packed rows the row of each."""
    autocast: torch.dtype | None
    versions: tuple[tuple[Tensor, int], ...]
    """The tensors of the arguments, and their versions when the module ran."""
    tried: list[int]
    """Samples of which doubtful arguments were tried cut and whole; the list of all parts of a call."""
    length: int = 0
    """Of packed rows T, the positions of a row."""
    positions: tuple[Tensor, ...] = ()
    """Of packed rows, the positions within its row of each sample that is meant; empty where a row is a sample."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, samples: slice | Tensor) -> Call:
        """The same call for some of the samples."""
        if isinstance(samples, slice):
            chosen = list(range(len(self))[samples])
        else:
            order = samples.nonzero().flatten() if samples.dtype == torch.bool else samples
            chosen = [int(place) for place in order]
        positions = tuple(self.positions[place] for place in chosen) if self.positions else ()
        return replace(self, places=tuple(self.places[place] for place in chosen), positions=positions)

    @property
    def widths(self) -> list[int]:
        """Numbers of each output in a row of :attr:`outputs_BN`."""
        return [shape.numel() // self.batch for shape in self.shapes]

    def by_position(self, dy_RN: Tensor, length: int) -> Tensor:
        """(R, T, M): of packed rows of ``length`` positions, the gradient at the outputs that have these.

        CaptureError if a gradient comes to another output.
        """
        parts = []
        for shape, dy_RW in zip(self.shapes, torch.split(dy_RN, self.widths, dim=1), strict=True):
            if has_positions(shape, self.batch, length):
                parts.append(dy_RW.reshape(self.batch, length, -1))
            elif bool(dy_RW.any()):
                raise CaptureError(
                    f"a {type(self.module).__name__}, which no formula knows, gave an output of shape {tuple(shape)} "
                    f"for packed rows of shape {(self.batch, length)}: which sample each of its numbers belongs to is "
                    "not known. Leave it out with `exclude_layers`, or train without packing"
                )
        return torch.cat(parts, dim=2) if parts else dy_RN.new_zeros(self.batch, length, 0)

    def of_samples(self, places: tuple[int, ...], positions: tuple[Tensor, ...], length: int) -> Call:
        """The call for samples of packed rows of ``length`` positions: the row of each, and its positions there.

        :meth:`gradients` then takes (S, L, M), each sample's positions of :meth:`by_position`, anything after them. A
        module sees the whole row again, and autograd begins at the sample's own positions.
        """
        return replace(self, places=places, positions=positions, length=length)

    def _in_row(self, positions_L: Tensor, dy_LM: Tensor) -> Tensor:
        """(N,): the gradient of one sample at all outputs of its row."""
        first, parts = 0, []
        for shape, width in zip(self.shapes, self.widths, strict=True):
            dy_W = dy_LM.new_zeros(width)
            if has_positions(shape, self.batch, self.length):
                each = width // self.length
                dy_W.view(self.length, each)[positions_L] = dy_LM[: len(positions_L), first : first + each]
                first += each
            parts.append(dy_W)
        return torch.cat(parts)

    @property
    def dtype(self) -> torch.dtype:
        """That of the outputs."""
        return self.outputs_BN.dtype

    def inputs(self) -> Tensor:
        """(B, …): the first tensor of the arguments that has samples. Other arguments may have no axis of them."""
        first = samples_in((self.args, self.kwargs), self.batch)
        if first is None:
            return self.outputs_BN[:, :1]
        return first.detach().reshape(self.batch, -1, first.shape[-1] if first.dim() > 1 else 1)

    def gradients(self, keys: Sequence[str], dy_BN: Tensor) -> Iterator[dict[str, Tensor]]:
        """The gradient of each parameter by its name in the module, for one sample after the other.

        ``dy_BN`` is that at the outputs of each; of packed rows see :meth:`of_samples`. CaptureError if a sample alone
        has another output than in the batch.
        """
        if any(tensor._version != version for tensor, version in self.versions):
            raise CaptureError(
                f"an input of a {type(self.module).__name__} was changed in place after it ran: it cannot run again: "
                "leave the layer out with `exclude_layers`"
            )
        for index, (place, dy_N) in enumerate(zip(self.places, dy_BN, strict=True)):
            if self.positions:
                dy_N = self._in_row(self.positions[index], dy_N)
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
        first = samples_in((self.args, self.kwargs), self.batch)
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
            y_1N = joined(with_axes(outputs_of(y), self.batch), 1)
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
        parts = zip(*(torch.split(numbers.double(), self.widths) for numbers in (y_N, expected_N)), strict=True)
        return any(_gap(y, expected) > most for y, expected in parts)

    def _alone(self, place: int, other: Tensor | None) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments of one sample; see :meth:`_gradient_with`.

        Where the first tensor has samples and positions on one axis, so have others.
        """
        first = samples_in((self.args, self.kwargs), self.batch)
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


def outputs_of(y: Any) -> list[Tensor]:
    """The outputs that a gradient can come to."""
    return [output for output in tensors_in(y) if may_have_gradient(output)]


def may_have_gradient(output: Tensor) -> bool:
    return output.is_floating_point()


def with_axes(outputs: Sequence[Tensor], batch: int) -> list[Tensor]:
    """``outputs`` without single numbers, which of more than one sample are of none."""
    return [output for output in outputs if output.dim() or batch == 1]
