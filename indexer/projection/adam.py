"""Scales of the projection's two sides from the optimizer state of a training checkpoint (Adam's second moment).

Adam moves a weight by about -η g/√v. So the sample whose Adam step lowers the val loss most has the highest ⟨∇L_val,
V^-½ ∇ℓ⟩ (LESS, Xia et al. 2024, section 3.2, without momentum). V is as large as the model; Adafactor (Shazeer, Stern
2018, section 3) approximates it by a row r and a column c: V ≈ r cᵀ / mean(r). Then V^-¼ = (r/√m)^-¼ ⊗ (c/√m)^-¼ with m
= mean(r), and the inner product of two vectors that are both scaled by V^-¼ is the product above. So the columns of
P_out are multiplied by (r/√m)^-¼ and those of P_in by (c/√m)^-¼.

Legend: O, I axes of a gradient matrix.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ghoststore.checkpoint.adapter import IN_PEFT, has_adapter, is_adapter_path
from ghoststore.errors import CheckpointError
from ghoststore.store.base.opening import parse_json, read_bounded
from indexer.projection.blocks import Block

OURS = Path("training_state") / "optimizer.safetensors"
TORCH = "optimizer.pt"
QUANTITY = "exp_avg_sq"
LARGEST_STATE = 64 << 20
"""Most bytes of a file with the state of a training (step, learning rate)."""
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    pickle.UnpicklingError,
)
"""The errors that reading a damaged file of tensors raises."""
SCALES = ("optimizer_scale_in", "optimizer_scale_out")
"""Names of the arrays of a part that hold the scales of all blocks, one after the other, in the order of the layers."""
LEAST = 1e-6
"""Least second moment of a row or column, as a share of the mean: so weights that were never trained are scaled up by a
factor of about 32 at most."""


@dataclass(frozen=True, slots=True)
class SideScales:
    """The factors of the columns of P_in (I,) and of P_out (O,) of one block; float32."""

    scale_in: Tensor
    scale_out: Tensor


def factored(v_OI: Tensor) -> SideScales:
    """The scales V^-¼ of a second moment ``v_OI`` (all at least 0, and not all 0); see the head of this file."""
    v_OI = v_OI.double()
    row_O, column_I = v_OI.mean(1), v_OI.mean(0)
    mean = row_O.mean()
    row_O, column_I = row_O.clamp_min(LEAST * mean), column_I.clamp_min(LEAST * mean)
    if v_OI.shape[1] == 1:  # a norm: its layers have no input side
        return SideScales(torch.ones(1), row_O.pow(-0.25).float())
    root = mean.sqrt()
    return SideScales((column_I / root).pow(-0.25).float(), (row_O / root).pow(-0.25).float())


def read_scales(source: str | Path, model: nn.Module, blocks: Sequence[Block]) -> dict[str, SideScales]:
    """Scales by block name from the optimizer state in ``source``: a checkpoint folder of ``ghoststore train`` or of
    transformers' Trainer (``optimizer.pt``), or such a file. No code from the file is run.

    CheckpointError if there is no state, if it is not that of Adam, or if it does not fit the parameters of ``model``.
    """
    where, v = _second_moments(Path(source), model)
    lacking = sorted({name for block in blocks for name in block.parameters} - set(v))
    if lacking:
        raise CheckpointError(
            f"`optimizer_state={where}` has no {QUANTITY} of parameter {lacking[0]!r} ({len(lacking)} are missing); "
            "leave its layer out with `exclude_layers`, or give the optimizer state of this checkpoint"
        )
    scales = {}
    for block in blocks:
        v_OI = block.lay_out(v)
        if not bool(torch.isfinite(v_OI).all()) or float(v_OI.min()) < 0 or not float(v_OI.sum()) > 0:
            raise CheckpointError(
                f"`optimizer_state={where}`: the second moment of layer {block.name!r} is zero, negative or not "
                "finite: it was not trained by Adam. Leave the layer out with `exclude_layers`"
            )
        scales[block.name] = factored(v_OI)
    return scales


def scales_digest(scales: Mapping[str, SideScales]) -> str:
    """The SHA-256 of all scales, as ``sha256:…``."""
    digest = hashlib.sha256()
    for name, pair in scales.items():
        digest.update(json.dumps([name, len(pair.scale_in), len(pair.scale_out)]).encode())
        for scale in (pair.scale_in, pair.scale_out):
            digest.update(scale.numpy().astype("<f4", copy=False).tobytes())
    return f"sha256:{digest.hexdigest()}"


def flat(scales: Mapping[str, SideScales]) -> dict[str, NDArray[np.float32]]:
    """The arrays that a part keeps, by the names in SCALES."""
    sides = ([pair.scale_in for pair in scales.values()], [pair.scale_out for pair in scales.values()])
    return {name: torch.cat(side).numpy() for name, side in zip(SCALES, sides, strict=True)}


def unflat(arrays: Mapping[str, NDArray[np.float32]], blocks: Sequence[Block]) -> dict[str, SideScales]:
    """The inverse of :func:`flat`. ValueError if the arrays do not fit the blocks."""
    sides = []
    for name, lengths in zip(SCALES, ([b.n_in for b in blocks], [b.n_out for b in blocks]), strict=True):
        if len(arrays[name]) != sum(lengths):
            raise ValueError(f"{name} has {len(arrays[name])} numbers; the layers have {sum(lengths)}")
        sides.append(torch.split(torch.from_numpy(np.asarray(arrays[name], dtype=np.float32)), lengths))
    return {block.name: SideScales(*pair) for block, *pair in zip(blocks, *sides, strict=True)}


def _second_moments(source: Path, model: nn.Module) -> tuple[Path, dict[str, Tensor]]:
    """(path of the file, Adam's second moment by parameter name). The shapes are checked."""
    candidates = [source] if source.is_file() else [source / OURS, source / TORCH]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise CheckpointError(
            f"`optimizer_state={source}`: found neither {OURS} (of ghoststore train) nor {TORCH} (of transformers' "
            "Trainer); give the folder of a training checkpoint"
        )
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if has_adapter(model):  # of which nothing else was trained
        parameters = {name: shape for name, shape in parameters.items() if is_adapter_path(name.split("."))}
    try:
        moments = _by_name(path, parameters) if path.suffix == ".safetensors" else _by_number(path, parameters)
    except DAMAGE as error:
        raise CheckpointError(
            f"`optimizer_state={path}` cannot be read: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error
    for name, v in moments.items():
        if tuple(v.shape) != parameters.get(name):
            raise CheckpointError(
                f"`optimizer_state={path}`: {name!r} has shape {tuple(v.shape)}; the model's is {parameters.get(name)}"
            )
    return path, {name: v.float() for name, v in moments.items()}


def _by_name(path: Path, parameters: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    tensors = load_file(path)
    moments = {key.removesuffix(f"/{QUANTITY}"): v for key, v in tensors.items() if key.endswith(f"/{QUANTITY}")}
    return {name: v for name, v in moments.items() if name in parameters}


def _by_number(path: Path, parameters: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The second moments by parameter name from a ``state_dict`` of torch's Adam, which numbers its parameters.

    Names follow from the order, the groups and the shapes. Shapes alone are not enough, because the layers of a model
    have equal shapes: an optimizer with one group for each layer, from the last to the first, would pass for one in the
    order of the model. CheckpointError if no known order fits, or if several fit and give different names.
    """
    value = torch.load(path, map_location="cpu", weights_only=True)
    groups, states = value["param_groups"], value["state"]
    numbers = [int(number) for group in groups for number in group["params"]]
    shapes = {number: tuple(states[number][QUANTITY].shape) for number in numbers if QUANTITY in states.get(number, {})}
    if not shapes:
        raise CheckpointError(f"`optimizer_state={path}` holds no {QUANTITY}: it is not the state of Adam or AdamW")
    if all("param_names" in group for group in groups):
        likely_groups = [[[str(name).removeprefix(IN_PEFT) for name in group["param_names"]] for group in groups]]
    else:
        likely_groups = _likely_groups(parameters)
    sizes = [len(group["params"]) for group in groups if group["params"]]
    orders = [list(chain(*named)) for named in likely_groups if [len(names) for names in named if names] == sizes]
    fitting = [
        order
        for order in orders
        if len(order) == len(numbers)
        and all(
            shapes.get(number, parameters.get(name)) == parameters.get(name)
            for number, name in zip(numbers, order, strict=True)
        )
    ]
    if not fitting or any(order != fitting[0] for order in fitting):
        problem = "fits no order of the model's parameters" if not fitting else "fits several orders of the parameters"
        raise CheckpointError(
            f"`optimizer_state={path}` numbers its {len(numbers)} parameters, in {len(sizes)} group(s), and {problem} "
            f"({len(parameters)}); save "
            "it with names: torch.optim.AdamW(model.named_parameters(), …)"
        )
    return {
        name: states[number][QUANTITY] for number, name in zip(numbers, fitting[0], strict=True) if number in shapes
    }


def _likely_groups(parameters: Mapping[str, tuple[int, ...]]) -> list[list[list[str]]]:
    """The known ways to group parameters: one group in the order of the model; or two, those with weight decay first,
    by the rule of transformers (no biases, no norms) or of nanoGPT (no vectors).
    """
    names = list(parameters)

    def split(decays: Callable[[str], bool]) -> list[list[str]]:
        return [[name for name in names if decays(name)], [name for name in names if not decays(name)]]

    def by_name(name: str) -> bool:
        return not (name.endswith("bias") or "norm" in name.lower() or "ln_" in name)

    return [[names], split(by_name), split(lambda name: len(parameters[name]) >= 2)]


def learning_rate_of(folder: Path) -> float | None:
    """The learning rate of the last step before a training checkpoint; None if it is not recorded.

    ``ghoststore train`` writes it to ``state.json``, transformers' Trainer to ``trainer_state.json``. The Trainer logs
    only every few steps; a rate that it logged at an earlier step than the checkpoint's is not used.
    """
    try:
        own_state = folder / OURS.parent / "state.json"
        if own_state.is_file():
            return _rate(parse_json(read_bounded(own_state, LARGEST_STATE)).get("learning_rate"))
        trainer_state = folder / "trainer_state.json"
        if trainer_state.is_file():
            state = parse_json(read_bounded(trainer_state, LARGEST_STATE))
            # The Trainer logs every few steps: its last entry may be from long before the checkpoint.
            logged = [
                entry["learning_rate"]
                for entry in state["log_history"]
                if "learning_rate" in entry and entry["step"] == state["global_step"]
            ]
            return _rate(logged[-1]) if logged else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # only a query of several parts needs the rate, and says so if it is missing
    return None


def _rate(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else None
