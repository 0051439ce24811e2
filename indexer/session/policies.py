"""Which candidates of a training step are trained on, and with which weight: a function of their scores.

Legend: N candidates of a step, or of one rank's part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.settings.choosing import policy_name
from indexer.projection import draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What a policy knows of a step. Candidates whose score is not finite are not among them."""

    scores: NDArray[np.float64]
    """(N,): as the run has them, float32 in value; with ``contrast`` less ``common``."""
    losses: NDArray[np.float64]
    """(N,): each sample's own, the mean over its targets."""
    tokens: NDArray[np.int64]
    """(N,): of each sample."""
    rows: NDArray[np.int64]
    """(N,): places of the samples in the run's row table, in the training set of a loop."""
    step: int
    """From 0."""
    keep: int
    """How many are wanted, at most N."""
    generator: np.random.Generator
    """Seeded by seed, step and, where ranks choose by themselves, rank: the same numbers whenever the step is made."""

    common: NDArray[np.float64] | None = None
    """(N,), with ``contrast`` alone: ⟨∇ℓ_i, mean of the candidates' ∇ℓ_j⟩."""
    interactions: NDArray[np.float64] | None = None
    """(N, N), for `policy=greats` alone: η⟨∇ℓ_i, ∇ℓ_j⟩, what the score of i loses where j is trained on beside it."""

    def __len__(self) -> int:
        return len(self.scores)


Policy = Callable[[Candidates], Any]
"""From candidates to their weights (N,), at least 0, finite, some above 0; 0 is not trained on."""


def top_k(candidates: Candidates) -> NDArray[np.float64]:
    """1 for the ``keep`` highest scores, 0 for the others. Of equal ones the first."""
    return _ones(np.argsort(-candidates.scores, kind="stable")[: candidates.keep], candidates)


def bottom_k(candidates: Candidates) -> NDArray[np.float64]:
    """1 for the ``keep`` lowest scores, 0 for the others. Of equal ones the first."""
    return _ones(np.argsort(candidates.scores, kind="stable")[: candidates.keep], candidates)


def random_k(candidates: Candidates) -> NDArray[np.float64]:
    """1 for ``keep`` candidates drawn by the step's generator: the control of every other policy."""
    words = candidates.generator.bit_generator.random_raw(len(candidates))
    return _ones(np.argsort(words, kind="stable")[: candidates.keep], candidates)


def threshold(candidates: Candidates, *, least: float) -> NDArray[np.float64]:
    """1 for every score from ``least`` on; where there is none, for the highest."""
    weights = (candidates.scores >= least).astype(np.float64)
    return weights if weights.any() else top_k(replace(candidates, keep=1))


def reweight(candidates: Candidates, *, temperature: float) -> NDArray[np.float64]:
    """N times the softmax of the scores over ``temperature`` × their standard deviation; 1 where all are equal."""
    scores = candidates.scores - candidates.scores.max()
    deviation = float(candidates.scores.std())
    if deviation == 0:
        return np.ones(len(scores))
    powers = np.exp(scores / (temperature * deviation))
    return np.asarray(len(scores) * powers / powers.sum())


def greats(candidates: Candidates) -> NDArray[np.float64]:
    """1 for ``keep`` candidates that are taken one after the other: each time that of the highest score, less what it
    loses to those that were taken before (Wang et al. 2024, "GREATS", with the identity for the Hessian).
    """
    assert candidates.interactions is not None
    scores, taken = candidates.scores.copy(), []
    for _ in range(candidates.keep):
        taken.append(int(np.argmax(scores)))
        scores -= candidates.interactions[:, taken[-1]]
        scores[taken[-1]] = -np.inf
    return _ones(np.array(taken), candidates)


def seeded(key: str) -> np.random.Generator:
    """A generator whose stream follows from ``key`` alone."""
    return np.random.Generator(np.random.Philox(key=draws.bits(key, 2)))


def policy_of(policy: str | Policy, least: float | None = None, temperature: float | None = None) -> Policy:
    """The policy of that name, or the user's own function."""
    if not isinstance(policy, str):
        return policy
    known: Mapping[str, Policy] = {
        "top-k": top_k,
        "bottom-k": bottom_k,
        "random": random_k,
        "greats": greats,
        "threshold": partial(threshold, least=0.0 if least is None else least),
        "reweight": partial(reweight, temperature=1.0 if temperature is None else temperature),
    }
    return known[policy]


def decide(policy: Policy, candidates: Candidates, where: str = "") -> NDArray[np.float32]:
    """(N,): the weight of each candidate, 0 where its score is not finite; the first ``keep`` where no score is.

    UsageError for a policy that fails, or weights of it that cannot be; it says ``where``: on which rank.
    """
    finite = np.flatnonzero(np.isfinite(candidates.scores))
    if not len(finite):
        return first_k(candidates)
    columns = {name: getattr(candidates, name)[finite] for name in ("scores", "losses", "tokens", "rows")}
    if candidates.common is not None:
        columns["common"] = candidates.common[finite]
    within = None if candidates.interactions is None else candidates.interactions[np.ix_(finite, finite)]
    seen = replace(candidates, **columns, keep=min(candidates.keep, len(finite)), interactions=within)
    named = f"`policy={policy_name(policy)}`"
    try:
        given = policy(seen)
    except Exception as error:
        raise UsageError(f"{named} failed{where} in step {candidates.step}: {type(error).__name__}: {error}") from error
    weights = np.zeros(len(candidates), dtype=np.float32)
    weights[finite] = _checked(given, len(finite), f"{named} gave{where}", candidates.step)
    return weights


def first_k(candidates: Candidates) -> NDArray[np.float32]:
    """1 for the first ``keep`` that have a loss, which are random ones: the order of a training is."""
    usable = np.flatnonzero(np.isfinite(candidates.losses))
    if not len(usable):  # all diverged: the step says so
        usable = np.arange(len(candidates))
    return _ones(usable[: candidates.keep], candidates).astype(np.float32)


def _checked(given: Any, count: int, gave: str, step: int) -> NDArray[np.float64]:
    """The weights, as the run keeps them. UsageError, which begins with ``gave``, for what are none."""
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = given if given.is_complex() else given.double().numpy()
    try:
        if isinstance(given, np.ma.MaskedArray) or np.iscomplexobj(given):
            raise TypeError("real numbers are due, without a mask")
        weights = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{gave} {type(given).__name__} for step {step}; expected weights: {error}") from error
    if weights.shape != (count,):
        raise UsageError(f"{gave} weights of shape {weights.shape} for {count} candidates of step {step}")
    with np.errstate(over="ignore"):
        stored = weights.astype(np.float32)  # as the run keeps them
    if not np.isfinite(stored).all() or stored.min() < 0:
        raise UsageError(f"{gave} weights below 0, infinite or NaN for step {step}; 0 is for what is left out")
    if not stored.max() > 0:
        raise UsageError(f"{gave} no candidate of step {step} a weight above 0: a step trains on at least one")
    return np.asarray(stored, dtype=np.float64)


def _ones(places: NDArray[Any], candidates: Candidates) -> NDArray[np.float64]:
    weights = np.zeros(len(candidates))
    weights[places] = 1.0
    return weights
