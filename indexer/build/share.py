"""Which spans of a part one worker builds, of several that need not know of each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ghoststore.errors import UsageError
from ghoststore.settings.build import AUTO, worker_of

PIECES = 8
"""Runs of consecutive spans that a worker builds: few, so that a compressed corpus is not read from its beginning too
often; several, so that a corpus in order of length, or of domain, is shared evenly.
"""


@dataclass(frozen=True, slots=True)
class Share:
    """The share of worker ``number`` (from 1) of ``count``. It depends on these and the number of spans alone, so the
    workers agree whenever they start, and each span is in exactly one share.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, spans: int) -> list[int]:
        """Its spans of the ``spans`` of a part, ascending."""
        length = -(-spans // (PIECES * self.count)) or 1
        return [span for span in range(spans) if span // length % self.count == self.number - 1]

    @classmethod
    def given(cls, worker: str | None, environment: Mapping[str, str] = os.environ) -> Share | None:
        """The share that ``worker`` names ("2/8", or "auto": as the launcher's variables say); None without one.

        UsageError for "auto" where no launcher has set its variables.
        """
        if worker is None:
            return None
        return cls.launched(environment) if worker == AUTO else cls(*worker_of(worker))

    @classmethod
    def launched(cls, environment: Mapping[str, str]) -> Share:
        """The share by the variables of torchrun (RANK of WORLD_SIZE) or of SLURM (the task of an array, and the
        process of a task).
        """
        if "RANK" in environment and "WORLD_SIZE" in environment:
            return cls(_number(environment, "RANK") + 1, _number(environment, "WORLD_SIZE"))
        array = _task_of_array(environment) if "SLURM_ARRAY_TASK_ID" in environment else None
        inside = cls(1, 1)
        if "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
            inside = cls(_number(environment, "SLURM_PROCID") + 1, _number(environment, "SLURM_NTASKS"))
        elif array is None:
            raise UsageError(
                "`worker=auto` reads RANK and WORLD_SIZE of torchrun, or SLURM_ARRAY_TASK_ID, or SLURM_PROCID and "
                "SLURM_NTASKS: none of these variables is set. Give the share by numbers: `worker=1/4`"
            )
        array = array or cls(1, 1)
        return cls((array.number - 1) * inside.count + inside.number, array.count * inside.count)


def device_of(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """The GPU of a process that torchrun started, where ``device`` asks for a GPU and not for one by its number."""
    if "LOCAL_RANK" in environment and device in ("auto", "cuda"):
        import torch

        if torch.cuda.is_available():
            return f"cuda:{_number(environment, 'LOCAL_RANK')}"
    return device


def device_in_turn(device: str, number: int) -> str:
    """The GPU of worker ``number`` (from 1) of this machine, where ``device`` asks for a GPU and not for one by its
    number: they take all GPUs in turn.
    """
    import torch

    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{(number - 1) % torch.cuda.device_count()}"
    return device


def _task_of_array(environment: Mapping[str, str]) -> Share:
    task, count = _number(environment, "SLURM_ARRAY_TASK_ID"), _number(environment, "SLURM_ARRAY_TASK_COUNT")
    first, last = _number(environment, "SLURM_ARRAY_TASK_MIN"), _number(environment, "SLURM_ARRAY_TASK_MAX")
    step = (last - first) // (count - 1) if count > 1 else 1
    if first + step * (count - 1) != last or step < 1 or (task - first) % step:
        raise UsageError(
            f"`worker=auto`: the {count} tasks of the SLURM array, from {first} to {last}, are not evenly spaced, so "
            "that a task cannot tell which of them it is. Submit the array with tasks 1 to N, or give `worker=I/N`"
        )
    return Share((task - first) // step + 1, count)


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        raise UsageError(
            f"`worker=auto`: the variable {name} is {environment.get(name)!r}; a number is expected. Give the share "
            "by numbers: `worker=1/4`"
        ) from None
