"""What was chosen: the report of ``ghoststore select``.

Legend: M samples of the part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.shown import json_text
from query.select.budget import NO_DOMAIN
from query.select.samples import Samples
from query.select.strategy import ChosenSamples

QUANTILES = {"lowest": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "highest": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainShare:
    """One domain among the chosen and in the part."""

    domain: str
    chosen: int
    available: int
    """Usable samples."""
    tokens: int
    """Of the chosen."""
    mean_score: float | None
    """Of the chosen; None without any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectReport:
    """What ``ghoststore.select`` returns."""

    store: str
    out: str
    report: str
    """File with this report."""
    rows_file: str
    """jsonl with an entry for each row of ``out``, in its order."""
    settings: dict[str, Any]
    samples: int
    """Chosen."""
    tokens: int
    """Of the chosen, as the part counts them: of a truncated sample, those that were read."""
    available: int
    """Usable samples of the part."""
    considered: int
    """Samples among which was chosen: candidates, with ``diversity``."""
    domains: list[DomainShare]
    lengths: dict[str, dict[str, float]]
    """Quantiles of the tokens of a sample: ``chosen`` and ``all`` usable ones."""
    scores: dict[str, dict[str, float]]
    """Quantiles of the scores, of the same."""
    leaks: dict[str, Any]
    """Near-duplicates of the val set in the corpus: the policy, how many were ``found``, the first 1,000 ``rows``."""
    short: list[dict[str, Any]]
    """Quotas (or the whole, as ``all``) that could not be filled: ``domain``, ``asked``, ``chosen``, in samples or
    tokens.
    """

    @classmethod
    def of(cls, samples: Samples, chosen: ChosenSamples, **given: Any) -> SelectReport:
        """With the fields that follow from what was chosen; the others are ``given``."""
        places = chosen.places
        return cls(
            samples=len(places),
            tokens=int(samples.tokens[places].sum()),
            available=int(samples.usable.sum()),
            considered=chosen.considered,
            short=chosen.short,
            domains=domain_shares(samples, places),
            lengths=quantiles(samples, places, samples.tokens),
            scores=quantiles(samples, places, samples.score),
            **given,
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON of the report's file, which ``ghoststore select --json`` prints."""
        return asdict(self)

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json_text(self.to_json(), indent=1) + "\n", encoding="utf-8")


def domain_shares(samples: Samples, chosen: NDArray[np.int64]) -> list[DomainShare]:
    """By domain, those of the part and, where samples have none, ``(none)``; by name."""
    shares = []
    for place, name in enumerate([NO_DOMAIN, *samples.source.domains], -1):
        members = chosen[samples.domain[chosen] == place]
        available = int((samples.usable & (samples.domain == place)).sum())
        if place < 0 and not available:
            continue
        shares.append(
            DomainShare(
                domain=name,
                chosen=len(members),
                available=available,
                tokens=int(samples.tokens[members].sum()),
                mean_score=float(samples.score[members].mean()) if len(members) else None,
            )
        )
    return shares


def quantiles(samples: Samples, chosen: NDArray[np.int64], numbers_M: NDArray[Any]) -> dict[str, dict[str, float]]:
    """Quantiles of the chosen and of all usable samples, without interpolation: each is one of the numbers."""
    return {
        name: {label: float(np.quantile(numbers, share, method="inverted_cdf")) for label, share in QUANTILES.items()}
        for name, numbers in (("chosen", numbers_M[chosen]), ("all", numbers_M[samples.usable]))
    }


def row_list(samples: Samples, chosen: ChosenSamples, written: NDArray[np.int64]) -> Iterator[str]:
    """A line of JSON for each of the samples ``written``, in their order."""
    picked = np.zeros(len(samples), dtype=np.int64)
    picked[chosen.places] = np.arange(1, len(chosen.places) + 1)
    ids = samples.ids(written)
    names = [*samples.source.domains, None]
    for place, name in zip(written.tolist(), ids, strict=True):
        entry = {
            "id": name,
            "source_row": int(samples.source_row[place]),
            "domain": names[samples.domain[place]],
            "tokens": int(samples.tokens[place]),
            "score": float(samples.score[place]),
            "rank": int(chosen.rank[place]),
            "picked": int(picked[place]),
        }
        yield json_text(entry) + "\n"
