"""Trainings on halves, several at once, each result kept the moment it is there: what is interrupted goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import CorruptError, MismatchError, WorkerError
from ghoststore.progress import Progress
from ghoststore.store.commits import json_digest
from ghoststore.store.disk import publish, storage_errors
from indexer.training.retrain import Retrainer, Retraining
from query.evaluate.lds import half


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which trainings there are."""

    job: Retraining
    identity: dict[str, Any]
    """What the results are of: fingerprints and settings."""
    samples: int
    seed: int
    halves: int

    @property
    def digest(self) -> str:
        """Of everything that a result depends on; the number of halves does not enter, so that more may follow."""
        return json_digest({**self.identity, "recipe": asdict(self.job.recipe), "samples": self.samples,
                            "seed": self.seed, "max_length": self.job.max_length})  # fmt: skip

    def kept(self) -> NDArray[np.bool_]:
        """(M, N): the samples of each half."""
        return np.stack([half(self.seed, number, self.samples) for number in range(self.halves)])


def losses_of_halves(plan: Plan, folder: Path, workers: int, progress: Progress) -> NDArray[np.float64]:
    """(V, M): the loss of each val sample after each training, from ``folder`` or made now.

    MismatchError if a result in ``folder`` is of another plan, CorruptError if one is damaged, WorkerError if a
    process ends before its work.
    """
    with storage_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    found = {number: _read(_path(folder, number), plan) for number in range(plan.halves)}
    missing = [number for number, losses in found.items() if losses is None]
    with closing(progress.task("training on halves", plan.halves, plan.halves - len(missing), "trainings")) as task:
        for number, losses in _train(plan, missing, workers):
            value = {"plan": plan.digest, "half": number, "val_loss": losses.tolist()}
            value["sha256"] = json_digest(value)
            with storage_errors(str(folder)):
                publish(_path(folder, number), (json.dumps(value) + "\n").encode())
            found[number] = losses
            task.advance(1)
    return np.stack([np.asarray(found[number]) for number in range(plan.halves)], axis=1)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.json"


def _read(path: Path, plan: Plan) -> NDArray[np.float64] | None:
    """The losses that were kept, or None."""
    try:
        value = json.loads(path.read_bytes())
        stated = value.pop("sha256")
        if stated != json_digest(value):
            raise ValueError("its checksum does not hold")
        if value["plan"] != plan.digest:
            raise MismatchError(
                f"{path} is of another evaluation (other data, model or settings); give --out another folder"
            )
        return np.asarray(value["val_loss"], dtype=np.float64)
    except FileNotFoundError:
        return None
    except MismatchError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} is damaged ({error}); remove it, and it is made anew") from error


def _train(plan: Plan, numbers: Sequence[int], workers: int) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """(number, losses) of each training as it ends."""
    if workers == 1 or len(numbers) <= 1:
        retrainer = Retrainer(plan.job) if numbers else None
        for number in numbers:
            assert retrainer is not None
            yield number, retrainer.val_losses(half(plan.seed, number, plan.samples))
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(plan.job, threads)
    ) as pool:
        futures: dict[Future[NDArray[np.float64]], int] = {
            pool.submit(_one, half(plan.seed, number, plan.samples)): number for number in numbers
        }
        try:
            while futures:
                done, _ = wait(futures, return_when=FIRST_COMPLETED)
                for future in done:
                    yield futures.pop(future), future.result()
        except BrokenExecutor as error:
            raise WorkerError(
                f"a training process ended before its work: {error}; run the same command again"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_retrainer: Retrainer | None = None


def _begin(job: Retraining, threads: int) -> None:
    """In each worker process: what all its trainings share."""
    global _retrainer
    import torch

    torch.set_num_threads(threads)
    _retrainer = Retrainer(job)


def _one(kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    assert _retrainer is not None
    return _retrainer.val_losses(kept)
