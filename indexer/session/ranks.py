"""The processes of one training run: one, or those that ``torchrun`` started."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from traceback import clear_frames
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from ghoststore.errors import CaptureError, GhostStoreError, UsageError, WorkerError

T = TypeVar("T")

LONGEST_START = timedelta(minutes=5)
"""For the ranks to find one another: if they do not, that is an error, and torchrun ends them."""
LONGEST_END = timedelta(seconds=5)
"""After an error, for the other ranks to hear of it before this one closes its connections."""
LONGEST_WAIT = timedelta(hours=12)
"""While one rank tokenizes or writes, the others wait."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """The ranks of the process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over ranks, on every rank."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Each of ``tensors`` becomes its sum over ranks; they come in one order on every rank."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def led(self, work: Callable[[], T]) -> T | None:
        """What ``work`` gives on the rank that leads, None on the others, which wait for it. If it fails, every rank
        raises: the first its own error, the others WorkerError.
        """
        result: T | None = None
        failure: Exception | None = None
        if self.leads:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - raised below, when the others know
                failure = error
        if self.any(failure is not None):
            raise failure or WorkerError("the first rank could not go on; see its message")
        return result

    def each(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on this rank; every rank does its own. If it fails on some, every rank raises: these
        their own errors, the others WorkerError with the words of the first of them, and its exit code.
        """
        if self.count == 1:
            return work()
        try:
            result, failure = [work()], None
        except Exception as error:  # noqa: BLE001 - raised below, when the others know
            result, failure = [], error
        if not self.any(failure is not None):
            return result[0]
        told: list[tuple[int, str] | None] = [None] * self.count
        dist.all_gather_object(told, None if failure is None else _told(failure))
        if failure is not None:
            raise failure
        rank, (code, words) = next((rank, said) for rank, said in enumerate(told) if said is not None)
        other = WorkerError(f"rank {rank} could not go on: {words}")
        other.exit_code = code
        raise other

    def any(self, happened: bool) -> bool:
        """Whether it happened on any rank."""
        if self.count == 1:
            return happened
        on = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        return bool(self.sum(torch.tensor(float(happened), device=on)))

    def highest(self, number: int) -> int:
        """The highest of the ranks' numbers, on every rank."""
        return int(self.stacked(torch.tensor(number)).max())

    def stacked(self, values: Tensor) -> Tensor:
        """(ranks, …): the values of every rank, on every rank, where ``values`` lie."""
        if self.count == 1:
            return values.unsqueeze(0)
        moved = values.contiguous()
        if dist.get_backend() == "nccl":
            moved = moved.cuda()
        each = [torch.empty_like(moved) for _ in range(self.count)]
        dist.all_gather(each, moved)
        return torch.stack(each).to(values.device)


def _told(error: Exception) -> tuple[int, str]:
    """(exit code, words) of an error that other ranks shall know of."""
    if isinstance(error, GhostStoreError):
        return error.exit_code, str(error)
    return GhostStoreError.exit_code, f"{type(error).__name__}: {error}"


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, str]]:
    """(ranks, this rank's device): under ``torchrun`` a process group (gloo on a CPU, nccl on CUDA), else alone.

    A process group that exists already is used and left.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks.here(), _own(device)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Ranks(), device
        return
    own = _own(device)
    kind = torch.device(own).type
    if kind == "cuda":
        torch.cuda.set_device(own)
    _begin_group("nccl" if kind == "cuda" else "gloo")
    try:
        dist.distributed_c10d._set_pg_timeout(LONGEST_WAIT)
        yield Ranks.here(), own
    except BaseException as error:
        _drop_frames(error)
        _wait_for_the_others()
        raise
    finally:
        # What is left of DistributedDataParallel must be gone before its process group is. Where it is the last to
        # hold the group, it destroys it without letting go of the interpreter's lock, and waits for ever for threads
        # of the group that wait for this lock.
        gc.collect()
        dist.destroy_process_group()


@dataclass(slots=True)
class _Meeting:
    """Where the ranks of this process's groups find one another."""

    store: Any = None
    """None before the first group. It is kept: under torchrun it outlives a group in any case, and without, the first
    rank serves it, whose next one would take the place of one that others may still talk to."""
    groups: int = 0
    """Groups that were begun."""


_MEETING = _Meeting()


def _begin_group(backend: str) -> None:
    """The default process group, whose ranks find one another at keys of its own. The addresses of a group that ended
    stay in the store: a second one of the same process that read them would wait for ever, or talk to nobody.
    """
    meeting = _MEETING
    if meeting.store is None:
        meeting.store, _, _ = next(rendezvous("env://", timeout=LONGEST_START))
        meeting.store.set_timeout(LONGEST_START)
    prefix = f"ghoststore/group/{meeting.groups}"
    own = dist.PrefixStore(prefix, meeting.store)  # type: ignore[attr-defined]  # public, and not in torch's __all__
    meeting.groups += 1
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=own, rank=rank, world_size=count, timeout=LONGEST_START)


def _wait_for_the_others() -> None:
    """Until every rank has ended with an error, but not long: an error that all have in common may reach one while
    another still reads what it was sent. Through the store, so that no open collective is disturbed.
    """
    store = dist.distributed_c10d._get_default_store()
    with suppress(RuntimeError):
        store.set(f"ghoststore/ended/{dist.get_rank()}", "")
        store.wait([f"ghoststore/ended/{rank}" for rank in range(dist.get_world_size())], LONGEST_END)


def _drop_frames(error: BaseException | None) -> None:
    """Let go of the variables that an error's traceback keeps."""
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def refuse_drift(model: nn.Module, ranks: Ranks) -> None:
    """CaptureError unless every rank has the same weights, by the sum of their bits."""
    if ranks.count == 1:
        return
    kinds = {2: torch.int16, 4: torch.int32}
    sums = torch.stack([p.detach().view(kinds[p.element_size()]).sum(dtype=torch.int64) for p in model.parameters()])
    every = ranks.stacked(sums)
    if not bool((every == every[0]).all()):
        place = int((every != every[0]).any(0).nonzero()[0])
        name = list(dict(model.named_parameters()))[place]
        raise CaptureError(f"the ranks' weights have drifted apart, first in {name!r}: nothing was saved")


def _own(device: str) -> str:
    """Each rank of a machine takes a CUDA device of its own."""
    if torch.device(device).type != "cuda":
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise UsageError(f"rank {local} of this machine has no CUDA device: there are {torch.cuda.device_count()}")
    return f"cuda:{local}"
