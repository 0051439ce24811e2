"""The report of ``ghoststore select``: which samples were chosen, and out of which.

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
    """One domain: its samples among the chosen ones and in the part."""

    domain: str
    chosen: int
    available: int
    """Usable samples of the part."""
    tokens: int
    """Tokens of the chosen samples."""
    mean_score: float | None
    """Mean score of the chosen samples; None if there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectReport:
    """What ``ghoststore.select`` returns."""

    store: str
    out: str
    report: str
    """Path of the file with this report."""
    rows_file: str
    """Path of a jsonl file with one entry for each row of ``out``, in the same order."""
    card: str | None
    """Path of the dataset card, if one was asked for."""
    settings: dict[str, Any]
    samples: int
    """Number of samples chosen."""
    tokens: int
    """Tokens of the chosen samples. A truncated sample counts the tokens that were kept."""
    available: int
    """Usable samples of the part."""
    considered: int
    """Number of samples that could be chosen; with ``diversity``, the number of candidates."""
    domains: list[DomainShare]
    lengths: dict[str, dict[str, float]]
    """Quantiles of the tokens of a sample, over the ``chosen`` samples and over ``all`` usable ones."""
    scores: dict[str, dict[str, float]]
    """Quantiles of the scores, over the same samples."""
    leaks: dict[str, Any]
    """Near-duplicates of the val set in the corpus: the ``policy``, how many were ``found`` (None: without a
    val set, not looked for), the first 1,000 ``rows``.
    """
    short: list[dict[str, Any]]
    """Quotas that could not be filled (``all`` without quotas): ``domain``, ``asked`` and ``chosen``, in samples or
    tokens.
    """

    @classmethod
    def of(cls, samples: Samples, chosen: ChosenSamples, **given: Any) -> SelectReport:
        """The report on ``chosen``. ``given`` are the fields that do not follow from it."""
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
        """The document in the report's file, which ``ghoststore select --json`` prints, too."""
        return asdict(self)

    def write(self, path: Path) -> None:
        """Write the report to ``path`` as JSON."""
        path.write_text(json_text(self.to_json(), indent=1) + "\n", encoding="utf-8")


def domain_shares(samples: Samples, chosen: NDArray[np.int64]) -> list[DomainShare]:
    """One entry for each domain of the part, after ``(none)`` if some samples have no domain."""
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
    """Quantiles of ``numbers_M`` over the chosen and over all usable samples. Each is one of the numbers, not a value
    between two.
    """
    return {
        name: {label: float(np.quantile(numbers, share, method="inverted_cdf")) for label, share in QUANTILES.items()}
        for name, numbers in (("chosen", numbers_M[chosen]), ("all", numbers_M[samples.usable]))
    }


def row_list(samples: Samples, chosen: ChosenSamples, written: NDArray[np.int64]) -> Iterator[str]:
    """One line of JSON for each of the samples ``written``, in this order."""
    picked = np.zeros(len(samples), dtype=np.int64)
    picked[chosen.places] = np.arange(1, len(chosen.places) + 1)
    ids = samples.ids(written)
    names = [*samples.source.domains, None]
    for place, name in zip(written.tolist(), ids, strict=True):
        part, source_row = samples.place_of(int(samples.source_row[place]))
        entry = {
            "id": name,
            **({} if part is None else {"part": part}),
            "source_row": source_row,
            "domain": names[samples.domain[place]],
            "tokens": int(samples.tokens[place]),
            "score": float(samples.score[place]),
            "rank": int(chosen.rank[place]),
            "picked": int(picked[place]),
        }
        yield json_text(entry) + "\n"
