"""Trainings on subsets of a corpus, several at once. Each result is kept at once, so an interrupted call
can continue.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.cluster import on_actors
from ghoststore.errors import GhostStoreError, MismatchError, WorkerError
from ghoststore.processes import end_with_parent
from ghoststore.progress import Progress
from ghoststore.store.base.disk import publish, storage_errors, sweep
from ghoststore.store.base.records import json_digest, reading, seal, unseal
from indexer.training.retrain import Retrainer, Retraining

CHECKSUM = "sha256"
"""The key, in the file of a result, of its checksum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A set of trainings."""

    job: Retraining
    identity: dict[str, Any]
    """The fingerprints and settings that all results depend on."""
    kept: Mapping[str, NDArray[np.bool_]]
    """(N,) for each name: true for the samples of that training."""

    def digest(self, name: str) -> str:
        """The digest of everything that the result of the training ``name`` depends on."""
        samples = hashlib.sha256(np.packbits(self.kept[name]).tobytes()).hexdigest()
        return json_digest(
            {
                **self.identity,
                "recipe": asdict(self.job.recipe),
                "max_length": self.job.max_length,
                "of": len(self.kept[name]),
                "samples": samples,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class By:
    """Who trains: ``workers`` processes of this machine, or actors of a Ray cluster."""

    workers: int | None
    """None, with Ray: as many as the cluster holds."""
    ray: bool = False
    ray_address: str | None = None


class TrainingActor:
    """What a Ray actor of the trainings is."""

    def __init__(self, job: Retraining) -> None:
        self._job = job
        self._retrainer: Retrainer | None = None

    def do(self, item: tuple[str, NDArray[np.bool_]]) -> NDArray[np.float64] | GhostStoreError:
        """The val losses after the training on the samples that are True."""
        try:
            self._retrainer = self._retrainer or Retrainer(self._job)
            return self._retrainer.val_losses(item[1])
        except GhostStoreError as error:
            return error


def losses_of(plan: Plan, folder: Path, by: By, progress: Progress) -> dict[str, NDArray[np.float64]]:
    """(V,) for each name: the losses of the val samples after that training, read from ``folder`` or computed now.

    MismatchError if a result in ``folder`` is of another plan, CorruptError if one is damaged, WorkerError if a worker
    process dies.
    """
    with storage_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)  # what an evaluation that was killed had begun
    stored = {name: _read(_path(folder, name), plan.digest(name)) for name in plan.kept}
    results = {name: losses for name, losses in stored.items() if losses is not None}
    missing = [name for name in plan.kept if name not in results]
    with closing(progress.task("training", len(plan.kept), len(results), "trainings")) as task:
        for name, losses in _train(plan, missing, by):
            value = {"plan": plan.digest(name), "val_loss": losses.tolist()}
            with storage_errors(str(folder)):
                publish(_path(folder, name), seal(value, CHECKSUM, indent=None))
            results[name] = losses
            task.advance(1)
    return {name: results[name] for name in plan.kept}


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _read(path: Path, digest: str) -> NDArray[np.float64] | None:
    """The losses in the file ``path``, or None if it does not exist."""
    try:
        with reading(path, advice="remove it, and it is made anew"):
            value = unseal(path.read_bytes(), CHECKSUM)
            if value["plan"] != digest:
                raise MismatchError(
                    f"{path} is of another evaluation (other data, model or settings); give `out` another folder"
                )
            return np.asarray(value["val_loss"], dtype=np.float64)
    except FileNotFoundError:
        return None


def _train(plan: Plan, names: Sequence[str], by: By) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """(name, losses) of each training as it ends."""
    if by.ray and names:
        gpus = 1.0 if plan.job.device.startswith("cuda") else 0.0
        items = [(name, plan.kept[name]) for name in names]
        with closing(on_actors(by.ray_address, TrainingActor, [plan.job], items, by.workers, gpus=gpus)) as results:
            for (name, _), losses in results:
                yield name, losses
        return
    workers = by.workers or 1
    if workers == 1 or len(names) <= 1:
        retrainer = Retrainer(plan.job) if names else None
        for name in names:
            assert retrainer is not None
            yield name, retrainer.val_losses(plan.kept[name])
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(plan.job, threads)
    ) as pool:
        with _without_script():
            futures: dict[Future[NDArray[np.float64]], str] = {
                pool.submit(_train_in_worker, plan.kept[name]): name for name in names
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


@contextmanager
def _without_script() -> Iterator[None]:
    """Processes that start meanwhile do not run the user's script first. They need nothing from it, and one that is
    not guarded by ``if __name__ == "__main__"`` would evaluate, and start processes, in each of them.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


_retrainer: Retrainer | None = None


def _start_worker(job: Retraining, threads: int) -> None:
    """Set up a worker process: load what all its trainings share."""
    global _retrainer
    import torch

    end_with_parent()
    torch.set_num_threads(threads)
    _retrainer = Retrainer(job)


def _train_in_worker(kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    assert _retrainer is not None
    return _retrainer.val_losses(kept)
