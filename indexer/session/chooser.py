"""Choosing in the step: what every rank knows of a step's candidates, and what follows from it.

Legend: R ranks, B candidates of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ghoststore.settings.choosing import ChoosingConfig
from indexer.session.policies import Candidates, Policy, decide, first_k, policy_of, seeded
from indexer.session.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Scored:
    """One rank's candidates; each (B,)."""

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    losses: NDArray[np.float32]
    tokens: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chooser:
    """Decides with a policy: the same on every rank, and whenever the step is made with the same weights of the model.

    ``keep`` counts over all ranks.
    """

    policy: Policy
    keep: int
    over: str
    begins_at: int
    seed: int
    ranks: Ranks

    @classmethod
    def of(cls, config: ChoosingConfig, seed: int, ranks: Ranks) -> Chooser | None:
        """What ``config`` asks for; None without candidates."""
        if config.candidates is None:
            return None
        over, begins_at = config.choose_over, config.choosing_begins_at
        return cls(policy_of(config), config.least, over, begins_at, seed, ranks)

    def weights(self, step: int, own: Scored) -> NDArray[np.float32]:
        """(R, B): the weight of every candidate of ``step`` (from 0), 0 where it is not chosen.

        UsageError for weights of a policy that cannot be, on every rank that saw them.
        """
        columns = np.stack([own.rows, own.scores, own.losses, own.tokens]).astype(np.float64)
        rows, scores, losses, tokens = self.ranks.stacked(torch.from_numpy(columns)).numpy().swapaxes(0, 1)
        if self.over == "all":
            weights = self._decided(step, rows.ravel(), scores.ravel(), losses.ravel(), tokens.ravel(), "")
            return weights.reshape(rows.shape)
        # Each rank decides for all: a policy that gives what cannot be is then an error of all.
        each = zip(rows, scores, losses, tokens, strict=True)
        return np.stack([self._decided(step, *of_rank, f"|rank={rank}") for rank, of_rank in enumerate(each)])

    def _decided(
        self,
        step: int,
        rows: NDArray[np.float64],
        scores: NDArray[np.float64],
        losses: NDArray[np.float64],
        tokens: NDArray[np.float64],
        rank: str,
    ) -> NDArray[np.float32]:
        candidates = Candidates(
            scores=scores,
            losses=losses,
            tokens=tokens.astype(np.int64),
            rows=rows.astype(np.int64),
            step=step,
            keep=self.keep // (self.ranks.count if rank else 1),
            generator=seeded(f"ghoststore/1|choice|seed={self.seed}|step={step}{rank}"),
        )
        return first_k(candidates) if step < self.begins_at else decide(self.policy, candidates)
