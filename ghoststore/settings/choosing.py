"""Options of choosing in the training step: which of a step's candidates it trains on."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from ghoststore.errors import UsageError
from ghoststore.settings.option import check_at_least, check_choices, option

POLICIES = ("top-k", "bottom-k", "threshold", "random", "reweight")
EXACTLY = ("top-k", "bottom-k", "random")
"""Policies that choose `keep` candidates."""
Over = Literal["all", "rank"]
Passes = Literal["two", "one"]


@dataclass(frozen=True, kw_only=True)
class ChoosingConfig:
    """Which of a step's candidates it trains on. Without ``candidates`` a step trains on all it draws."""

    candidates: int | None = option(
        None, "Samples that a step draws and scores, over all ranks; `policy` chooses those it trains on.", "Choosing"
    )
    keep: int | None = option(
        None,
        "Samples of a step that are trained on: so many by top-k, bottom-k and random; by other policies where there "
        "is nothing to choose by (default: all candidates).",
        "Choosing",
    )
    policy: str | Callable[[Any], Any] = option(
        "top-k",
        "Highest scores, lowest, all from `threshold` on, any, or all weighted by a softmax of their scores.",
        "Choosing",
        choices=POLICIES,
    )
    threshold: float | None = option(None, "Of `policy=threshold`: the lowest score that is chosen.", "Choosing")
    temperature: float | None = option(
        None, "Of `policy=reweight`, in standard deviations of the step's scores (default: 1).", "Choosing"
    )
    choose_over: Over = option(
        "all", "Choose among the candidates of all ranks, or an equal share on each rank among its own.", "Choosing"
    )
    choosing_passes: Passes = option(
        "two",
        "two: the chosen are run again, and the weights are those of a plain step on them, bit for bit; one: their "
        "gradients are formed from the scoring pass, which is cheaper and equal up to rounding.",
        "Choosing",
    )
    choosing_begins_at: int = option(
        0,
        "Before this step the first `keep` candidates are taken, which are random ones.",
        "Choosing",
        metavar="STEP",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(1, candidates=self.candidates, keep=self.keep)
        check_at_least(0, choosing_begins_at=self.choosing_begins_at)
        if self.candidates is None:
            self._refuse_without_candidates()
            return
        if self.keep is None and self.policy in EXACTLY:
            raise UsageError(f"`policy={self.policy}` chooses so many of {self.candidates} candidates: give `keep`")
        if self.keep is not None and self.keep > self.candidates:
            raise UsageError(f"`keep={self.keep}` is more than `candidates={self.candidates}`: give `keep` fewer")
        if (self.policy == "threshold") != (self.threshold is not None):
            raise UsageError("`policy=threshold` and `threshold` belong together: give both, or neither")
        if self.threshold is not None and not isfinite(self.threshold):
            raise UsageError(f"`threshold` must be a finite number, not {self.threshold}")
        if self.temperature is not None:
            if self.policy != "reweight":
                raise UsageError("`temperature` belongs to `policy=reweight`")
            if not 0 < self.temperature < float("inf"):
                raise UsageError(f"`temperature` must be above 0, not {self.temperature}")

    def _refuse_without_candidates(self) -> None:
        """UsageError for an option that would be ignored."""
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if value != default:
                raise UsageError(f"`{name}={value}` is about choosing among candidates: give `candidates`, too")

    @property
    def least(self) -> int:
        """How many candidates a step takes that has nothing to choose by."""
        assert self.candidates is not None
        return self.candidates if self.keep is None else self.keep

    @property
    def policy_name(self) -> str:
        """Of the policy, as a run says it: of a function its module and name."""
        if isinstance(self.policy, str):
            return self.policy
        name = getattr(self.policy, "__qualname__", type(self.policy).__qualname__)
        return f"{self.policy.__module__}.{name}"


_DEFAULTS = {name: spec.default for name, spec in ChoosingConfig.__dataclass_fields__.items() if name != "candidates"}
