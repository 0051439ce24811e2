"""How a loop of the user's own chooses what it trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ghoststore.errors import UsageError
from ghoststore.settings.choosing import (
    POLICIES,
    ChoosingConfig,
    check_policy,
    described,
    refuse_contrast_of,
    settle_numbers,
)
from ghoststore.settings.option import check_at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosing:
    """Which samples of each micro-batch a loop of one's own trains on: of :class:`GhostEngineManager` and
    :class:`GhostStoreCallback`. Every rank chooses among the samples of its micro-batch.
    """

    keep: int | None = None
    """Samples of a micro-batch that are trained on: by top-k, bottom-k and random; by other policies where there is
    nothing to choose by (None: all)."""
    policy: str | Callable[[Any], Any] = ChoosingConfig.policy
    """top-k, bottom-k, threshold, random, or a function of :class:`Candidates` whose weights are 0 or all alike: the
    loss that the model returns weighs its samples alike."""
    threshold: float | None = None
    """Of threshold: the lowest score that is chosen."""
    contrast: bool = False
    """Choose by the score less the sample's product with the mean gradient of its micro-batch."""
    begins_at: int = 0
    """Before this step the first ``keep`` samples of a micro-batch are taken."""
    seed: int = 0
    """Of random, and of the generator that a function is given."""

    def __post_init__(self) -> None:
        if isinstance(self.policy, str) and self.policy not in POLICIES:
            raise UsageError(f"`policy` {self.policy!r} is unknown; known: {', '.join(POLICIES)}, or a function")
        if self.policy == "greats":
            raise UsageError("`policy=greats` takes products of the candidates; `ghoststore train` can form them")
        if self.policy == "reweight":
            raise UsageError(
                "`policy=reweight`: the loss that the model returns weighs its samples alike; `ghoststore train` can "
                "weigh them"
            )
        settle_numbers(self, whole=("keep", "begins_at", "seed"), real=("threshold",))
        if self.contrast:
            refuse_contrast_of(self.policy)
        check_at_least(1, keep=self.keep)
        check_at_least(0, begins_at=self.begins_at)
        check_policy(self.policy, self.keep, self.threshold)

    def to_json(self) -> dict[str, Any]:
        """What a run says of it."""
        return {
            **described(self, contrast=self.contrast),
            "choose_over": "micro-batch",
            "choosing_passes": "two",
        }
