"""Lists the parameters that are scored and the modules that use them; refuses by name what cannot be scored."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from ghoststore.errors import LayerError, UsageError
from indexer.layers import LayerType, ReplayedLayer
from indexer.layers.callers import replayed_parameters
from indexer.projection.selection import ALIASES, formula_layers, matches, matches_path


@dataclass(frozen=True, slots=True)
class Tapped:
    """A module with at least one scored parameter."""

    module: nn.Module
    kind: LayerType
    parameters: dict[str, str]
    """Name in the module to name in the model, for each scored parameter."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A scored parameter."""

    name: str
    parameter: nn.Parameter
    block: str
    """The module that owns it; the first if several do."""
    matrix_uses: int
    """Number of modules that use it in a matrix product, not in a lookup."""
    is_lookup: bool
    """Whether every use is a lookup."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """The result of :func:`survey`, in the order of the model."""

    parameters: dict[str, Scored]
    tapped: dict[str, Tapped]
    covered: int
    trainable: int
    """Numbers in the scored and in all trainable parameters."""

    @property
    def blocks(self) -> list[str]:
        """Names of the modules that own scored parameters."""
        return list(dict.fromkeys(scored.block for scored in self.parameters.values()))

    @property
    def by_module(self) -> dict[str, list[nn.Parameter]]:
        """By tapped module, its scored parameters."""
        return {
            name: [self.parameters[full].parameter for full in tapped.parameters.values()]
            for name, tapped in self.tapped.items()
        }


def refuse_unsupported_wrappers(model: nn.Module) -> None:
    """UsageError for what splits the parameters (FSDP, sharded tensors, several devices), and for batch norm."""
    refuse_batch_statistics(batch_norms_of(model))
    for name, module in model.named_modules():
        where = name or type(model).__name__
        if "FullyShardedDataParallel" in type(module).__name__ or "FSDP" in type(module).__name__:
            raise UsageError(f"{where} is sharded by {type(module).__name__}: not supported; use DDP")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise UsageError(f"the parameters lie on {', '.join(devices)}: one device is supported, or DDP")
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise UsageError(f"parameter {name!r} is a sharded tensor (DTensor): not supported; use DDP")


def batch_norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The batch norms of ``model``, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def refuse_batch_statistics(batch_norms: Mapping[str, nn.Module]) -> None:
    """UsageError if a batch norm normalises by the statistics of the batch."""
    for name, module in batch_norms.items():
        if module.training or not module.track_running_stats:
            raise UsageError(
                f"{name or 'the model'} is a {type(module).__name__} that mixes the samples of a batch: no sample has "
                "a gradient of its own. Freeze its statistics (module.eval(), after model.train()) or use another norm"
            )


def survey(model: nn.Module, exclude: Sequence[str] = (), *, only: Collection[str] | None = None) -> Ledger:
    """List every trainable parameter of ``model`` outside ``exclude``.

    ``exclude`` holds patterns as for ``exclude_layers``, or of names of parameters. ``only`` names modules, and
    parameters of modules that run again: other parameters are left out; these count wherever they are used.

    Raises LayerError for a trainable parameter of a module that is never called with samples and for a pattern that
    matches nothing, UsageError for a model without a trainable parameter.
    """
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names.setdefault(id(parameter), name)
    trainable = {id(p): p for p in model.parameters() if p.requires_grad}
    if not trainable:
        raise UsageError(f"{type(model).__name__} has no trainable parameter: nothing can be scored")
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    excluded: set[int] = set()
    kinds = formula_layers(model)
    again = replayed_parameters(model, kinds)
    paths = {f"{name}.{key}": (name, key) for name, keys in again.items() for key in keys}
    if only is not None:
        used = [model.get_submodule(name)._parameters.values() for name in only if name in kinds]
        used_again = [model.get_parameter(name) for name in only if name in paths]
        excluded = set(names) - {id(p) for p in [*chain(*used), *used_again]}
    matched = set()
    for name, module in model.named_modules():
        kind = kinds.get(name)
        matching = [p for p in patterns if (matches(p, name, kind) if kind is not None else matches_path(p, name))]
        matched.update(matching)
        if matching:
            excluded.update(id(p) for p in module.parameters())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        matching = [p for p in patterns if (p not in ALIASES and matches_path(p, name)) or _replays(p, name, paths)]
        matched.update(matching)
        if matching:
            excluded.add(id(parameter))
    unknown = [pattern for pattern in patterns if pattern not in matched]
    if unknown:
        raise LayerError(f"layer pattern {unknown[0]!r} matches no module and no parameter of {type(model).__name__}")
    wanted = trainable.keys() - excluded
    _refuse_unhandled(model, kinds, again, {id_: names[id_] for id_ in wanted})
    scored_by_formula = {id(p): name for name in kinds for p in model.get_submodule(name)._parameters.values()}
    tapped: dict[str, Tapped] = {}
    scored: dict[str, Scored] = {}
    for name, module in model.named_modules():
        kind = kinds.get(name)
        keys = again.get(name, ()) if kind is None else tuple(k for k, p in module._parameters.items() if p is not None)
        own = {key: names[id(p)] for key in keys if id(p := module.get_parameter(key)) in wanted}
        if not own:
            continue
        if kind is None:
            _refuse_mixed_uses(name, module, own, scored_by_formula)
            kind = ReplayedLayer(tuple(own))
        kind.check(module, name)
        tapped[name] = Tapped(module, kind, own)
        for key, full in own.items():
            earlier = scored.get(full)
            scored[full] = Scored(
                name=full,
                parameter=module.get_parameter(key),
                block=earlier.block if earlier else name,
                matrix_uses=(earlier.matrix_uses if earlier else 0) + (not kind.is_lookup),
                is_lookup=kind.is_lookup and (earlier.is_lookup if earlier else True),
            )
    if not scored:
        raise LayerError(
            f"every trainable parameter is excluded by {patterns}"
            if patterns or only is None
            else f"no parameter of {', '.join(list(only)[:3])}, … is trainable"
        )
    return Ledger(
        parameters=scored,
        tapped=tapped,
        covered=sum(s.parameter.numel() for s in scored.values()),
        trainable=sum(p.numel() for p in trainable.values()),
    )


def _replays(pattern: str, name: str, paths: Collection[str]) -> bool:
    """Whether ``pattern``, an alias, selects the parameter ``name``, for which its module runs again."""
    return name in paths and pattern in ALIASES and matches(pattern, name, ReplayedLayer())


def _refuse_mixed_uses(name: str, module: nn.Module, own: Mapping[str, str], formulas: Mapping[int, str]) -> None:
    """LayerError for a parameter that a module without a formula shares with a layer that has one."""
    for key, full in own.items():
        other = formulas.get(id(module.get_parameter(key)))
        if other is not None:
            raise LayerError(
                f"module {name!r}, a {type(module).__name__} that no formula knows, shares {full!r} with {other!r}: "
                f"their gradients cannot be added up. Freeze it, or leave it out with `exclude_layers={[full]}`"
            )


def _refuse_unhandled(
    model: nn.Module, kinds: Collection[str], again: Mapping[str, Sequence[str]], wanted: Mapping[int, str]
) -> None:
    """LayerError, with every parameter of ``wanted`` (names by id) that no tap of a module can see used."""
    handled = {id(p) for name in kinds for p in model.get_submodule(name)._parameters.values()}
    handled |= {id(model.get_submodule(name).get_parameter(key)) for name, keys in again.items() for key in keys}
    missing = [name for id_, name in wanted.items() if id_ not in handled]
    if missing:
        owners = {name.rpartition(".")[0] for name in missing}
        kinds_of = {owner or "the model itself": type(model.get_submodule(owner)).__name__ for owner in owners}
        raise LayerError(
            f"{len(missing)} trainable parameter(s) of modules that are never called with samples cannot be scored: "
            f"{', '.join(f'{owner} ({kind})' for owner, kind in kinds_of.items())}. Freeze them, or leave them out "
            f"of the score with `exclude_layers={missing}`"
        )


def version_of(model: nn.Module) -> int:
    """A number that grows whenever a parameter is changed in place, as optimizers do."""
    return sum(parameter._version for parameter in model.parameters())


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile: its layers and their names are the model's own."""
    while True:
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        inner = getattr(inner, "_orig_mod", inner)
        assert isinstance(inner, nn.Module)
        if inner is model:
            return inner
        model = inner


def unwrapped_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer inside accelerate's wrapper, whose hooks fire for the steps that are made; None for None."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"`optimizer` is torch's (torch.optim.Optimizer), or wraps one; found {type(optimizer).__name__}"
        )
    return optimizer
