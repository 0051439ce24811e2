"""Options of choosing in the training step: which of a step's candidates it trains on."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from math import isfinite
from numbers import Integral, Real
from typing import Any, Literal

from ghoststore.errors import UsageError
from ghoststore.settings.option import check_at_least, check_choices, option

POLICIES = ("top-k", "bottom-k", "threshold", "random", "reweight", "greats")
EXACTLY = ("top-k", "bottom-k", "random", "greats")
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
        "Samples of a step that are trained on: so many by top-k, bottom-k, random and greats; by other policies "
        "where there is nothing to choose by (default: all candidates).",
        "Choosing",
    )
    policy: str | Callable[[Any], Any] = option(
        "top-k",
        "Highest scores, lowest, all from `threshold` on, any, all weighted by a softmax of their scores, or greedily "
        "those that are unlike one another.",
        "Choosing",
        choices=POLICIES,
    )
    threshold: float | None = option(None, "Of `policy=threshold`: the lowest score that is chosen.", "Choosing")
    temperature: float | None = option(
        None, "Of `policy=reweight`, in standard deviations of the step's scores (default: 1).", "Choosing"
    )
    contrast: bool | None = option(
        None,
        "Choose by the score less the sample's product with the mean gradient of the candidates: by what it does for "
        "the val set beyond what any candidate does. The run keeps the score as it is (default: by sketched scores, "
        "with top-k, bottom-k and reweight).",
        "Choosing",
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
    choosing_begins_at: int | None = option(
        None,
        "Before this step the first `keep` candidates are taken, which are random ones (default: a quarter of the "
        "steps).",
        "Choosing",
        metavar="STEP",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        settle_numbers(self, whole=("candidates", "keep", "choosing_begins_at"), real=("threshold", "temperature"))
        check_at_least(1, candidates=self.candidates, keep=self.keep)
        check_at_least(0, choosing_begins_at=self.choosing_begins_at)
        if self.candidates is None:
            self._refuse_without_candidates()
            return
        check_policy(self.policy, self.keep, self.threshold)
        if self.keep is not None and self.keep > self.candidates:
            raise UsageError(f"`keep={self.keep}` is more than `candidates={self.candidates}`: keep fewer")
        if self.contrast:
            refuse_contrast_of(self.policy)
        if self.temperature is not None:
            if self.policy != "reweight":
                raise UsageError("`temperature` belongs to `policy=reweight`: give that, too, or leave it out")
            if not 0 < self.temperature < float("inf"):
                raise UsageError(f"`temperature` must be above 0, not {self.temperature}")

    def _refuse_without_candidates(self) -> None:
        """UsageError for an option that would be ignored."""
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if value != default:
                lacking = "`candidates`, too"
                if self.keep is None and self.policy in EXACTLY:
                    lacking = "`candidates` and `keep`, too"
                raise UsageError(f"`{name}={value}` is about choosing among candidates: give {lacking}")

    def begins_at(self, steps: int) -> int:
        """The step from which candidates are chosen, of ``steps`` in all; UsageError if there is none.

        Scores of early steps say little: ``benchmarks/results/choosing-ways-scores-cuda.md``.
        """
        if self.choosing_begins_at is None:
            return steps // 4
        if self.choosing_begins_at >= steps:
            raise UsageError(
                f"`choosing_begins_at={self.choosing_begins_at}`: the training has {steps} steps, so nothing would be "
                "chosen; give an earlier one"
            )
        return self.choosing_begins_at

    @property
    def least(self) -> int:
        """How many candidates a step takes that has nothing to choose by."""
        assert self.candidates is not None
        return self.candidates if self.keep is None else self.keep

    def to_json(self, *, contrast: bool) -> dict[str, Any]:
        """What a run says of how its steps choose, ``contrast`` as it was resolved."""
        return {**described(self, contrast=contrast), "keep": self.least}


_DEFAULTS = {spec.name: spec.default for spec in fields(ChoosingConfig) if spec.name != "candidates"}


def values_of(config: Any) -> dict[str, Any]:
    """By field. Not a copy: a policy may be an object of the user's own."""
    return {spec.name: getattr(config, spec.name) for spec in fields(config)}


def described(config: Any, *, contrast: bool) -> dict[str, Any]:
    """What a run says of ``config``. Only one with contrast names it, so that runs from before it came go on."""
    values = {**values_of(config), "policy": policy_name(config.policy)}
    del values["contrast"]
    return {**values, "contrast": True} if contrast else values


def settle_numbers(config: Any, *, whole: tuple[str, ...], real: tuple[str, ...]) -> None:
    """Python's own numbers in these fields of a frozen ``config`` (numpy's are taken, too), and True, False or None in
    ``contrast``. UsageError for anything else: it would fail in a step, or mean something else.
    """
    for name in (*whole, *real):
        value: Any = getattr(config, name)
        kind: Any = Integral if name in whole else Real
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, kind):
            raise UsageError(f"`{name}` is a {'whole ' * (name in whole)}number, not {value!r:.60}")
        if not isinstance(value, int | float):
            object.__setattr__(config, name, int(value) if isinstance(value, Integral) else float(value))
    if config.contrast is not None and not isinstance(config.contrast, bool):
        raise UsageError(f"`contrast` is True or False, not {config.contrast!r:.60}")


def check_policy(policy: str | Callable[[Any], Any], keep: int | None, threshold: float | None) -> None:
    """UsageError for what a policy lacks, or would ignore."""
    if not isinstance(policy, str) and not callable(policy):
        raise UsageError(f"`policy` is a name or a function of the candidates, not {type(policy).__name__}")
    if policy == "threshold" and threshold is None:
        raise UsageError("`policy=threshold` chooses all from a score on: give it as `threshold`")
    if policy != "threshold" and threshold is not None:
        raise UsageError(f"`threshold={threshold}` belongs to `policy=threshold`: give that, too, or leave it out")
    if keep is None and policy in EXACTLY:
        raise UsageError(f"`policy={policy}` chooses so many candidates: give `keep`")
    if threshold is not None and not isfinite(threshold):
        raise UsageError(f"`threshold` must be a finite number, not {threshold}")


def refuse_contrast_of(policy: str | Callable[[Any], Any]) -> None:
    """UsageError for a policy that ``contrast`` is nothing to."""
    if policy in ("random", "greats"):
        raise UsageError(
            f"`contrast` changes scores, and `policy={policy}` does not choose by scores alone: leave `contrast` out"
        )


def refuse_contrast_in(score_metric: str) -> None:
    """UsageError for a metric in which ``contrast`` has no products."""
    if score_metric != "sgd":
        raise UsageError(
            f"`contrast` takes plain products, which `score_metric={score_metric}` has none of: leave one of them out"
        )


def policy_name(policy: str | Callable[[Any], Any]) -> str:
    """A policy as a run says it: of a function its module and name."""
    if isinstance(policy, str):
        return policy
    if isinstance(policy, partial):
        policy = policy.func
    return f"{policy.__module__}.{getattr(policy, '__qualname__', type(policy).__qualname__)}"
