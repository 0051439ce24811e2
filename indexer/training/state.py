"""Checkpoints of a training run: a folder that transformers opens, and beside it what resuming needs. No pickle.

``checkpoint-<step>/`` holds model and tokenizer as ``save_pretrained`` writes them; ``training_state/`` in it the
optimizer's tensors by parameter name (``optimizer.safetensors``), steps that the store does not have yet
(``pending.safetensors``) and ``state.json``, with the checksums of everything that resuming reads. It appears under its
name only when all of it is on the disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ghoststore.checkpoint.load import quiet_transformers
from ghoststore.errors import CorruptError, DivergedError, MismatchError, UsageError
from ghoststore.software import versions_of
from ghoststore.store.base.disk import create_whole, remove, storage_errors
from ghoststore.store.base.manifest import difference_lines, differences
from ghoststore.store.base.opening import read_bounded
from ghoststore.store.base.records import FileRecord, reading, seal, unseal
from ghoststore.store.base.writers import left_behind, unfinished

STATE = "training_state"
_NAME = re.compile(r"checkpoint-(\d+)")
FORMAT = 1
LARGEST_STATE = 64 << 20
STATE_FILES = ("optimizer.safetensors", "pending.safetensors")
CHECKSUM = "sha256"
"""The key of the checksum that ``state.json`` has of itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """What a checkpoint says of where training stood."""

    step: int
    """Finished steps."""
    pending: dict[str, NDArray[Any]]
    """Steps that the store did not have, see ``RunWriter.restore``; empty without a run."""
    scaler: dict[str, float]
    """State of the loss scaler; empty without one."""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_state(
    folder: Path,
    *,
    step: int,
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
    pending: Mapping[str, NDArray[Any]],
    scaler: Mapping[str, float],
) -> Path:
    """Write ``checkpoint-<step>`` in ``folder``. A checkpoint of that name that is there is left as it is.

    StorageError if the disk refuses, DivergedError (and no checkpoint) if a weight is not finite.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise DivergedError.at(step, f"parameter {name!r} is not finite any more, so no checkpoint was written")
    path = folder / f"checkpoint-{step}"
    value: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "identity": dict(identity),
        "scaler": dict(scaler),
        "learning_rate": float(optimizer.param_groups[0]["lr"]),
        "software": versions_of("ghoststore", "torch", "transformers"),
    }

    def fill(begun: Path) -> None:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in pending.items()}
        state = begun / STATE
        state.mkdir()
        with quiet_transformers():
            model.save_pretrained(begun)
        tokenizer.save_pretrained(begun)
        save_file(_optimizer_tensors(model, optimizer), state / "optimizer.safetensors")
        save_file(tensors, state / "pending.safetensors")
        files = [*begun.glob("*.safetensors*"), begun / "config.json", *state.iterdir()]
        value["files"] = {str(file.relative_to(begun)): FileRecord.of(file).to_json() for file in sorted(files)}
        (state / "state.json").write_bytes(seal(value, CHECKSUM))

    with storage_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    create_whole(path, fill)
    return path


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``<parameter>/<quantity>`` to tensor, for every parameter that has been stepped."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value.detach().cpu().contiguous()
    return tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """A checkpoint whose files are those that were written. Made by :func:`read_state`."""

    path: Path
    step: int
    """Finished steps."""
    identity: dict[str, Any]
    """Sections of the run's manifest."""
    scaler: dict[str, float]
    software: dict[str, str]


def read_state(path: Path) -> SavedState:
    """What ``state.json`` of a checkpoint says, before anything of it is loaded; every file's checksum is checked.

    UsageError for a checkpoint that `ghoststore train` did not write, CorruptError naming the file that is damaged.
    """
    file = path / STATE / "state.json"
    try:
        with reading(file, advice=_earlier(path)):
            value = unseal(read_bounded(file, LARGEST_STATE, path), CHECKSUM)
            if value["format"] != FORMAT:
                raise MismatchError(f"{file} has format {value['format']!r:.20}; this release reads format {FORMAT}")
            saved = SavedState(
                path=path,
                step=int(value["step"]),
                identity=dict(value["identity"]),
                scaler={str(name): float(number) for name, number in value["scaler"].items()},
                software=dict(value["software"]),
            )
            records = {str(name): FileRecord.from_json(record) for name, record in value["files"].items()}
    except (FileNotFoundError, NotADirectoryError):
        if (path / STATE).is_dir():
            raise CorruptError(f"{file} is missing; {_earlier(path)}") from None
        raise UsageError(
            f"{path} was not written by `ghoststore train`: it has no {STATE}; give another `output_dir`, or start "
            "from it with `checkpoint`"
        ) from None
    unnamed = [name for name in STATE_FILES if f"{STATE}/{name}" not in records]
    if unnamed:
        raise CorruptError(f"{file} does not name {unnamed[0]}; {_earlier(path)}")
    for name, record in records.items():
        record.check(path / name, _earlier(path), path)
    return saved


def restore(saved: SavedState, model: nn.Module, optimizer: torch.optim.Optimizer) -> Resumed:
    """Put the optimizer's state back (the model's weights are loaded already) and say where training stood.

    CorruptError if it is not that of this model's parameters.
    """
    state = saved.path / STATE
    try:
        tensors = load_file(state / "optimizer.safetensors")
        pending = {key: tensor.numpy() for key, tensor in load_file(state / "pending.safetensors").items()}
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch's, of a file it cannot open
        raise CorruptError(f"{state} cannot be read: {error}; {_earlier(saved.path)}") from error
    parameters = named_parameters(model)
    for key, tensor in tensors.items():
        name, _, quantity = key.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or (quantity != "step" and tensor.shape != parameter.shape):
            raise CorruptError(f"{state}: {key!r} of shape {tuple(tensor.shape)} fits no parameter of the model")
        optimizer.state[parameter][quantity] = tensor if quantity == "step" else tensor.to(parameter.device)
    lacking = [name for name, parameter in parameters.items() if parameter not in optimizer.state]
    if lacking and tensors:  # there are none while a loss scaler has left out every step
        raise CorruptError(f"{state} lacks the optimizer's state of {lacking[0]!r}; {_earlier(saved.path)}")
    return Resumed(step=saved.step, pending=pending, scaler=saved.scaler)


def refuse_other(saved: SavedState, identity: Mapping[str, Any]) -> None:
    """MismatchError, with both values, if a checkpoint is of a run with other settings."""
    changed = differences(saved.identity, dict(identity))
    if changed:
        raise MismatchError(
            f"{saved.path} is of a run with other settings; nothing was changed:\n{difference_lines(changed)}\n"
            "Use the stored settings to go on, or another `output_dir`"
        )


def _earlier(path: Path) -> str:
    return f"remove {path} to go on from an earlier checkpoint"


def prune(folder: Path, keep: int | None) -> None:
    """Remove all but the newest ``keep`` checkpoints (None: keep all), and unfinished ones. A checkpoint is renamed
    before its files are removed, so that no name ever stands for a part of one.
    """
    with storage_errors(str(folder)):
        for path in checkpoints(folder)[: -keep if keep else 0]:
            begun = unfinished(path.with_name(f"{path.name}.old"))
            path.rename(begun)
            remove(begun)
        for path in folder.glob(".checkpoint-*.tmp"):
            if left_behind(path, set()):
                remove(path)
