"""Checkpoints of a training run: a folder that transformers opens, and beside it what resuming needs. No pickle.

``checkpoint-<step>/`` holds model and tokenizer as ``save_pretrained`` writes them; ``training_state/`` in it the
optimizer's tensors by parameter name (``optimizer.safetensors``), steps that the store does not have yet
(``pending.safetensors``) and ``state.json``. It appears under its name only when all of it is on the disk.
"""

from __future__ import annotations

import json
import re
import shutil
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

from ghoststore.checkpoint import quiet_transformers
from ghoststore.errors import CheckpointError, MismatchError, UsageError
from ghoststore.store.commits import json_digest
from ghoststore.store.disk import create_whole, storage_errors
from ghoststore.store.manifest import differences

STATE = "training_state"
_NAME = re.compile(r"checkpoint-(\d+)")
FORMAT = 1


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
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


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
    """Write ``checkpoint-<step>`` in ``folder``; StorageError if the disk refuses. What stands there is left alone."""
    value = {
        "format": FORMAT, "step": step, "identity": dict(identity), "identity_sha256": json_digest(dict(identity)),
        "scaler": dict(scaler), "torch": torch.__version__,
    }  # fmt: skip

    def fill(begun: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(begun)
        tokenizer.save_pretrained(begun)
        state = begun / STATE
        state.mkdir()
        save_file(_optimizer_tensors(model, optimizer), state / "optimizer.safetensors")
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in pending.items()}
        save_file(tensors, state / "pending.safetensors")
        (state / "state.json").write_text(json.dumps(value, indent=1) + "\n")

    path = folder / f"checkpoint-{step}"
    with storage_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    create_whole(path, f"checkpoint {path}", fill, "--output-dir")
    return path


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``<parameter>/<quantity>`` to tensor, for every parameter that has been stepped."""
    found: dict[str, Tensor] = {}
    for name, parameter in named_parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = value.detach().cpu().contiguous()
    return found


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: Mapping[str, Any]) -> Resumed:
    """Put optimizer state from ``path`` back (the model is loaded already) and say where training stood.

    MismatchError if the checkpoint is of another run, CheckpointError if it is damaged or lacks a parameter.
    """
    state = path / STATE
    try:
        value = json.loads((state / "state.json").read_text())
        step, stored, scaler = int(value["step"]), dict(value["identity"]), dict(value["scaler"])
        if value["format"] != FORMAT or value["identity_sha256"] != json_digest(stored):
            raise ValueError("its checksum or its format does not fit")
        tensors = load_file(state / "optimizer.safetensors")
        pending = {key: tensor.numpy() for key, tensor in load_file(state / "pending.safetensors").items()}
    except FileNotFoundError as error:
        raise UsageError(
            f"{path} was not written by `ghoststore train` (no {Path(str(error.filename)).name}); give another "
            "--output-dir, or start from it with --checkpoint"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{state} is damaged: {error}; remove {path} to go on from an earlier one") from error
    _refuse_other(stored, identity, path)
    parameters = named_parameters(model)
    for key, tensor in tensors.items():
        name, _, quantity = key.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or (quantity != "step" and tensor.shape != parameter.shape):
            raise CheckpointError(f"{state}: {key!r} of shape {tuple(tensor.shape)} fits no parameter of the model")
        on = tensor if quantity == "step" else tensor.to(parameter.device)
        optimizer.state[parameter][quantity] = on
    if step and any(name for name, p in parameters.items() if p not in optimizer.state):
        raise CheckpointError(f"{state} lacks the optimizer's state of some parameters; remove {path}")
    return Resumed(step=step, pending=pending, scaler={str(k): float(v) for k, v in scaler.items()})


def _refuse_other(stored: Mapping[str, Any], identity: Mapping[str, Any], path: Path) -> None:
    found = differences(dict(stored), dict(identity))
    if found:
        lines = "\n".join(f"  {where}: stored {old!r:.90}, asked for {new!r:.90}" for where, old, new in found[:12])
        raise MismatchError(
            f"{path} is of a run with other settings; nothing was changed:\n{lines}\n"
            "Use the stored settings to go on, or another --output-dir"
        )


def prune(folder: Path, keep: int | None) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what was begun and not finished."""
    with storage_errors(str(folder)):
        for path in folder.glob(".checkpoint-*.tmp"):
            shutil.rmtree(path)
        for path in checkpoints(folder)[: -keep if keep else 0]:
            shutil.rmtree(path)
