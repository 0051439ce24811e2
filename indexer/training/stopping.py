"""How a training ends at Ctrl-C or SIGTERM: the step after which every rank stops, and the message."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ghoststore.interrupts import Interrupted, Stopping, word
from ghoststore.settings.train import TrainConfig
from indexer.session.ranks import Ranks
from indexer.training.state import checkpoints


def stop_after(done: int, stopping: Stopping, config: TrainConfig, ranks: Ranks, checkpoint_interval: int) -> int:
    """The signal, to any rank, after which training ends when ``done`` steps are finished, on every rank alike; 0 if it
    goes on.

    It ends where a val gradient is due, at most a refresh interval later: a training that goes on from a checkpoint has
    none, and its scores are to be those of one that was never stopped.
    """
    number = ranks.highest(stopping.number)
    scores = config.scoring.method == "GradDotProd"
    due = not scores or done % config.val_refresh_interval == 0 or done % checkpoint_interval == 0
    return number if due else 0


def saved_at(checkpoint: Path, number: int, done: int, steps: int, ranks: Ranks) -> Interrupted:
    """The end of a training whose last finished step is saved in ``checkpoint``."""
    message = f"{word(number)} after step {done:,} of {steps:,}; the same command resumes from {checkpoint}"
    return Interrupted(number, message if ranks.leads else "")


@contextmanager
def saying_what_is_left(output_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Where a signal ends a training at once, before its first step or as the second one, say what is on the disk."""
    try:
        yield
    except KeyboardInterrupt as error:
        if isinstance(error, Interrupted) and error.message is not None:
            raise
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        raise Interrupted(number, _left(output_dir, number) if ranks.leads else "") from error


def _left(output_dir: Path, number: int) -> str:
    newest = next(reversed(checkpoints(output_dir)), None)
    if newest is not None:
        return f"{word(number)}. The same command resumes from {newest}; committed scores of later steps stay"
    return (
        f"{word(number)} before the first checkpoint: the same command starts at step 0. Committed tokens and scores "
        "stay, and are not written again"
    )
