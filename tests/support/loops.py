"""What the tests of the manager and of the Trainer callback share: training rows, the exact scores, the run read back.

Legend: B samples of a step.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore import Store
from ghoststore.store import Run
from tests.support.models import examples, gpt2, pad
from tests.support.scoring import agree, exact_causal, val_batch
from tests.support.trainings import arrays_of

ROWS = examples((24, 3, 11, 17, 5, 9, 20, 2, 13, 7, 16, 12, 22, 6), seed=1)
"""Training rows of very different lengths, with prompts and tokens that are no targets."""

VAL = examples((9, 20, 5), seed=7)
VAL_BATCH = val_batch(VAL)

logger = logging.getLogger(__name__)

Plan = list[list[list[int]]]
"""Of each step, each micro-batch: places in ``ROWS``."""


def plan(steps: int, batch: int = 4, accumulation: int = 1, rows: int = len(ROWS)) -> Plan:
    """Epoch after epoch in one shuffled order; the last micro-batch of an epoch is smaller."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(5)).tolist()
    pieces = [order[i : i + batch] for i in range(0, rows, batch)]
    stream: list[list[int]] = []
    while len(stream) < steps * accumulation:
        stream += pieces
    return [stream[step * accumulation : (step + 1) * accumulation] for step in range(steps)]


def batch_of(places: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(X, Y, batch_idx) of a micro-batch."""
    ids, labels, _ = pad([ROWS[place] for place in places])
    return ids, labels, torch.tensor(places)


def exact_scores(model: Any, places: Sequence[int], fresh: Callable[[], Any] = gpt2) -> Tensor:
    """(B,) float64: by batch-of-one autograd, on the weights that ``model`` has now."""
    twin = fresh()
    twin.load_state_dict(model.state_dict())
    return exact_causal(twin, [ROWS[place] for place in places], VAL).total().mean(1)


def close_to(found: NDArray[Any], expected: Tensor, tolerance: float = 1e-5) -> None:
    """Scores as the store has them."""
    values = torch.from_numpy(found.astype(np.float64))
    logger.info("relative error %.1e", float((values - expected).norm() / expected.norm()))
    agree(values, expected, tolerance)


def roughly(found: NDArray[Any], expected: Tensor, tolerance: float) -> None:
    """Scores of a loop in 16-bit arithmetic."""
    error = float(np.linalg.norm(found - expected.numpy())) / float(expected.norm())
    logger.info("relative error %.1e", error)
    assert error < tolerance


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def identical(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run_of(store: Path, name: str = "run") -> Run:
    return Store.open(store).run(name)


def steps_of(run: Run) -> Iterator[tuple[int, NDArray[Any], NDArray[Any]]]:
    """(step, places, scores) of every committed step, empty places left out, for a run of one rank."""
    sample, score = run.read_committed("sample")[:, 0], run.read_committed("score")[:, 0]
    for row, step in enumerate(run.committed_steps().tolist()):
        there = sample[row] >= 0
        yield step, sample[row][there], score[row][there]


def same_arrays(one: Run, other: Run) -> None:
    """Bit for bit, the clock aside."""
    found, expected = arrays_of(one), arrays_of(other)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def in_ranks(count: int, work: Callable[[int], None], folder: Path) -> None:
    """``work(rank)`` in ``count`` forked processes of one gloo group; fails with what the first of them printed."""
    children = []
    for rank in range(count):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            torch.set_num_threads(1)
            address = f"file://{folder / 'meeting'}"
            torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
            work(rank)
            torch.distributed.destroy_process_group()
            code = 0
        except BaseException:  # noqa: BLE001 - shown by the parent
            (folder / f"error-{rank}").write_text(traceback.format_exc())
        finally:
            sys.stdout.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("error-*")))
    assert codes == [0] * count, errors
