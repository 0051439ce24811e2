"""Choosing in the step: what every rank knows of a step's candidates, and what follows from it.

Legend: R ranks, B candidates of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.settings.choosing import policy_name
from ghoststore.settings.train import TrainConfig
from indexer.dotprod.scores import Scores
from indexer.session.choosing import Choosing
from indexer.session.contrast import common_of
from indexer.session.policies import Candidates, Policy, decide, first_k, policy_of, seeded
from indexer.session.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Scored:
    """Candidates that were scored; each (B,)."""

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    losses: NDArray[np.float32]
    tokens: NDArray[np.int64]
    common: NDArray[np.float32] | None = None
    """With contrast: what is taken off the scores."""

    @property
    def _columns(self) -> list[NDArray[Any]]:
        columns: list[NDArray[Any]] = [self.rows, self.scores, self.losses, self.tokens]
        return columns if self.common is None else [*columns, self.common]

    def together(self, ranks: Ranks) -> list[Scored]:
        """Those of every rank, on every rank."""
        columns = np.stack(self._columns).astype(np.float64)
        return [Scored(*of_rank) for of_rank in ranks.stacked(torch.from_numpy(columns)).numpy()]

    @classmethod
    def of(cls, several: list[Scored]) -> Scored:
        """All of ``several``, in their order."""
        columns = zip(*(scored._columns for scored in several), strict=True)
        return cls(*(np.concatenate(column) for column in columns))


@dataclass(frozen=True, slots=True)
class Chooser:
    """Decides with a policy: the same whenever the step is made with the same weights of the model."""

    policy: Policy
    keep: int | None
    """Over all ranks, or of what is decided at once; None: all."""
    begins_at: int
    seed: int
    ranks: Ranks
    over: str = "rank"
    contrast: bool = False

    @classmethod
    def of(cls, training: TrainConfig, ranks: Ranks, steps: int) -> Chooser | None:
        """Of ``ghoststore train`` over so many ``steps``; None without candidates."""
        config = training.choosing
        if config.candidates is None:
            return None
        policy, begins_at = policy_of(config.policy, config.threshold, config.temperature), config.begins_at(steps)
        return cls(policy, config.keep, begins_at, training.seed, ranks, config.choose_over, training.contrast)

    @classmethod
    def of_loop(cls, choosing: Choosing, ranks: Ranks) -> Chooser:
        """Of a loop of the user's own, where each rank decides for each of its micro-batches."""
        policy = policy_of(choosing.policy, choosing.threshold)
        return cls(policy, choosing.keep, choosing.begins_at, choosing.seed, ranks, contrast=choosing.contrast)

    def common(self, scored: Sequence[Scores]) -> NDArray[np.float32] | None:
        """(B,): what this rank's candidates have in common with those that are decided about with them; None without
        ``contrast``.
        """
        if not self.contrast:
            return None
        return common_of(scored, self.ranks if self.over == "all" else Ranks())

    def weights(self, step: int, own: Scored, interactions: NDArray[np.float64] | None = None) -> NDArray[np.float32]:
        """(R, B): the weight of every candidate of ``step`` (from 0), 0 where it is not chosen, on every rank.
        ``interactions`` are those of :class:`Candidates`, of one rank that is alone.

        An error on every rank where the policy fails, or gives weights that cannot be, on one, and where ranks do not
        agree.
        """
        each = own.together(self.ranks)
        weights_RB = self.ranks.each(lambda: self._of_all(step, each, interactions))
        for rank, others in enumerate(self.ranks.stacked(torch.from_numpy(weights_RB)).numpy()):
            if (others != weights_RB).any():
                raise UsageError(
                    f"`policy={policy_name(self.policy)}` gave other weights on rank {rank} than on rank "
                    f"{self.ranks.rank} in step {step}: they must follow from the candidates alone, whose generator "
                    "has the same numbers on every rank"
                )
        return weights_RB

    def _of_all(self, step: int, each: list[Scored], interactions: NDArray[np.float64] | None) -> NDArray[np.float32]:
        """See :meth:`weights`; every rank decides for all."""
        if self.over == "all":
            return self._decide(step, Scored.of(each), self.keep, "", interactions).reshape(len(each), -1)
        keep = None if self.keep is None else self.keep // len(each)
        return np.stack([self._decide(step, some, keep, f"|rank={i}", interactions) for i, some in enumerate(each)])

    def of_micro_batch(self, step: int, place: int, own: Scored) -> NDArray[np.float32]:
        """(B,): the weights of the candidates of this rank's micro-batch number ``place`` of ``step``."""
        return self._decide(step, own, self.keep, f"|rank={self.ranks.rank}|micro={place}")

    def _decide(
        self,
        step: int,
        scored: Scored,
        keep: int | None,
        where: str,
        interactions: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float32]:
        count = len(scored.rows)
        common = None if scored.common is None else scored.common.astype(np.float64)
        with np.errstate(invalid="ignore"):  # of a gradient that is out of range: such a candidate is not chosen
            scores = scored.scores.astype(np.float64) - (0.0 if common is None else common)
        candidates = Candidates(
            scores=scores,
            losses=scored.losses.astype(np.float64),
            tokens=scored.tokens.astype(np.int64),
            rows=scored.rows.astype(np.int64),
            step=step,
            keep=count if keep is None else min(keep, count),
            generator=seeded(f"ghoststore/1|choice|seed={self.seed}|step={step}{where}"),
            common=common,
            interactions=interactions,
        )
        if step < self.begins_at:
            return first_k(candidates)
        return decide(self.policy, candidates, f" on rank {self.ranks.rank}" if self.ranks.count > 1 else "")
