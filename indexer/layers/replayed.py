"""Modules that no formula knows: each runs again, sample by sample, with a graph of its own.

``keep`` holds the call. When the gradient at the output is there, the module runs on the arguments of one sample, and
autograd gives the gradient of its parameters: exact, slower, and without a weight gradient of the batch. What is held
against each sample is its own output: a module whose rows do not belong to the samples cannot give the same.

Legend: B samples, N numbers of all outputs of one sample, O, I axes of a gradient matrix, K, J ranks of its block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ghoststore.errors import CaptureError
from indexer.layers.base import LayerType, Seen, Sides, project, register
from indexer.layers.factors import Factors, Vector

TOLERANCE, NARROW_TOLERANCE = 1e-3, 0.05
"""Largest relative difference of a sample's output alone from that in the batch, in float32 and in 16 bits."""


def mapped(value: Any, function: Callable[[Tensor], Any], of_others: Callable[[Any], Any] = lambda x: x) -> Any:
    """``value`` with ``function`` of every tensor in its tuples, lists and mappings, and ``of_others`` of the rest."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        items = {key: mapped(item, function, of_others) for key, item in value.items()}
        if type(value) is dict:
            return items
        same_kind: Any = copy(value)
        same_kind.update(items)
        return same_kind
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, function, of_others) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item, function, of_others) for item in value)
    return of_others(value)


def _without_cache(value: Any) -> Any:
    """``value``, or None for a cache of keys and values: the first run found it empty, and filled it."""
    return None if hasattr(value, "get_seq_length") and hasattr(value, "update") else value


def _tensors(value: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    mapped(value, tensors.append)
    return tensors


def _rows(outputs: Sequence[Tensor], batch: int) -> Tensor | None:
    """(B, N): the numbers of all outputs by sample; None if the first axis of one cannot be that of the samples."""
    rows = []
    for output in outputs:
        if not output.dim():
            return None
        if len(output) == 1 and batch > 1:
            rows.append(output.expand(batch, *output.shape[1:]).flatten(1))
        elif len(output) and len(output) % batch == 0:
            rows.append(output.reshape(batch, -1))
        else:
            return None
    return torch.cat(rows, dim=1) if rows else None  # of mixed dtypes the widest


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """``module`` and all in it without hooks after their forward: taps must not see it run again.

    Hooks before it stay, because some make the weights (``torch.nn.utils.weight_norm``).
    """
    kept = [(part, part._forward_hooks) for part in module.modules() if part._forward_hooks]
    try:
        for part, hooks in kept:
            part._forward_hooks = type(hooks)()
        yield
    finally:
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
    places: tuple[int, ...]
    """The samples that are meant."""
    autocast: torch.dtype | None
    versions: tuple[tuple[Tensor, int], ...]
    """The tensors of the arguments, and their versions when the module ran."""

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
            places,
            self.autocast,
            self.versions,
        )

    @property
    def dtype(self) -> torch.dtype:
        """That of the outputs."""
        return self.outputs_BN.dtype

    def inputs(self) -> Tensor:
        """(B, …): the first tensor of the arguments by sample. Other arguments may have no axis of samples."""
        first = _tensors((self.args, self.kwargs))[0].detach()
        return first.reshape(self.batch, -1, first.shape[-1] if first.dim() > 1 else 1)

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
        leaves = {key: self.module.get_parameter(key).detach().requires_grad_() for key in keys}
        args, kwargs = self._alone(place)
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
            y_1N = _rows(_outputs(y), 1)
        expected_N = self.outputs_BN[place]
        if y_1N is None or y_1N.shape[1:] != expected_N.shape or self._differs(y_1N[0].detach(), expected_N):
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
        y_N, expected_N = y_N.double().nan_to_num(), expected_N.double().nan_to_num()
        return bool((y_N - expected_N).norm() > most * expected_N.norm())

    def _alone(self, place: int) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments of one sample. Where the first tensor has samples and positions on one axis, so have others."""
        length = _first_length((self.args, self.kwargs))
        each = length // self.batch

        def cut(x: Tensor) -> Tensor:
            x = x.detach()
            if x.dim() and len(x) == self.batch:
                return x[place : place + 1]
            if x.dim() and len(x) == length and each > 1:
                return x[place * each : (place + 1) * each]
            return x

        args, kwargs = mapped((self.args, self.kwargs), cut, _without_cache)
        return args, kwargs


def _first_length(value: Any) -> int:
    tensors = _tensors(value)
    return len(tensors[0]) if tensors and tensors[0].dim() else 0


def _outputs(y: Any) -> list[Tensor]:
    """The outputs that a gradient can come to."""
    return [output for output in _tensors(y) if _may_have_gradient(output)]


def _may_have_gradient(output: Tensor) -> bool:
    return output.is_floating_point() and output.dim() > 0


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
        length = _first_length((args, kwargs))
        if length and length % batch == 0 and _rows(_outputs(y), batch) is not None:
            return None
        shapes = [tuple(x.shape) for x in _tensors((args, kwargs))], [tuple(x.shape) for x in _tensors(y)]
        return f"saw inputs of shapes {shapes[0]} and gave {shapes[1]} in a batch of {batch} samples"

    def output_problem(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> str | None:
        return None  # each sample's output is compared when it runs alone

    def seen(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any, batch: int, name: str
    ) -> Seen:
        problem = self.axis_problem(args, kwargs, y, batch)
        if problem is not None:
            raise CaptureError(f"layer {name!r} {problem}; leave it out with `exclude_layers`")
        outputs = _outputs(y)
        rows_BN = _rows(outputs, batch)
        assert rows_BN is not None
        device = rows_BN.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        versions = tuple((x, x._version) for x in _tensors((args, kwargs)))
        call = Call(module, args, kwargs, batch, rows_BN.detach(), tuple(range(batch)), autocast, versions)
        expanded = batch > 1 and any(len(output) == 1 for output in outputs)

        of_samples = tuple(
            output.expand(batch, *output.shape[1:]) if len(output) == 1 and batch > 1 else output for output in outputs
        )

        def back(tapped: Sequence[Tensor]) -> Any:
            following = iter(tapped)
            return mapped(y, lambda x: next(following) if _may_have_gradient(x) else x)

        def rows(gradients: Sequence[Tensor | None]) -> Tensor:
            pairs = zip(gradients, of_samples, strict=True)
            all_BN = _rows([torch.zeros_like(output) if dy is None else dy for dy, output in pairs], batch)
            assert all_BN is not None
            return all_BN

        flat = _first_length((args, kwargs)) != batch
        return Seen(call, of_samples, back, rows, expanded=expanded, flat=flat)

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


WHOLE = (nn.MultiheadAttention,)
"""Modules that use the weights of the modules in them without calling these. So do peft's of DoRA (a ``lora_variant``),
which call them with the identity as well.
"""
NOT_CALLED = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict, ParametrizationList)
"""Modules that hold parameters but are not called with samples: the module around them is."""


def replayed_parameters(model: nn.Module, handled: Collection[str]) -> dict[str, tuple[str, ...]]:
    """By module, the names in it of the parameters that it is run again for.

    These are the parameters of modules outside ``handled`` (names), unless a handled module inside shares them: BERT's
    head has the bias of the decoder in it. ``model`` itself is never run again: parameters that only it uses are not
    among the results.
    """
    users: dict[int, list[str]] = {}
    for name in handled:
        for p in model.get_submodule(name)._parameters.values():
            users.setdefault(id(p), []).append(name)
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        inside = f"{name}." if name else ""
        own = [
            key
            for key, p in module._parameters.items()
            if p is not None and not any(user.startswith(inside) for user in users.get(id(p), []))
        ]
        if name in handled or not own:
            continue
        owner = caller_of(model, name) if name else ""
        if owner:
            inner = name[len(owner) + 1 :]
            found.setdefault(owner, []).extend(f"{inner}.{key}" if inner else key for key in own)
    return {name: tuple(keys) for name, keys in found.items()}


def caller_of(model: nn.Module, name: str) -> str:
    """The module at ``name``, or the nearest around it that is called with samples; "" if that is the model."""
    parts = name.split(".")
    for stop in range(1, len(parts)):
        around = model.get_submodule(".".join(parts[:stop]))
        if _is_whole(around):
            return ".".join(parts[:stop])
    name = _list_of_experts(name) or name
    while name and not _called_with_samples(model.get_submodule(name)):
        name = name.rpartition(".")[0]
    return name


def _is_whole(module: nn.Module) -> bool:
    return isinstance(module, WHOLE) or bool(getattr(module, "lora_variant", None))


def _list_of_experts(name: str) -> str | None:
    """The list of experts that the module at ``name`` is in; None if it is in none."""
    parts = name.split(".")
    for place, (part, after) in enumerate(pairwise(parts)):
        if part == "experts" and (after.isdigit() or after.startswith("expert_")):
            return ".".join(parts[: place + 1])
    return None


def _called_with_samples(module: nn.Module) -> bool:
    if isinstance(module, NOT_CALLED):
        return type(module).forward not in (nn.Module.forward, ParametrizationList.forward)
    return "expert_size" not in inspect.signature(module.forward).parameters  # rows in the order of experts


def is_part_of_another(model: nn.Module, name: str) -> bool:
    """Whether the module at ``name`` is not called with the rows of samples, so that one around it must run again: an
    expert of a list, which is called with the tokens that a router picked, or a part of torch's attention.
    """
    return _list_of_experts(name) is not None or _is_whole(model.get_submodule(caller_of(model, name)))


def matrix_axes(parameter: Tensor) -> tuple[int, int]:
    """(O, I) of the gradient matrix of a parameter that no formula knows."""
    if parameter.dim() < 2:
        return parameter.numel(), 1
    return parameter.numel() // parameter.shape[-1], parameter.shape[-1]


def _projected(gradient_OI: Tensor, sides: Sides) -> Tensor:
    """(K, J): P_out G P_inᵀ."""
    half_OJ = project(gradient_OI.unsqueeze(0), sides.in_JI, None, torch.float32)
    return project(half_OJ.transpose(1, 2), sides.out_KO, None, torch.float32)[0].t()
