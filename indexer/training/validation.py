"""The val set of a training run: which val samples each val gradient takes, and the val loss.

Legend: V val rows, B rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.corpus import Corpus, SampleScan
from ghoststore.errors import UsageError
from ghoststore.progress import Late, Progress, Silent
from ghoststore.settings.train import ValSampling
from ghoststore.store.part.status import counted
from indexer.encode.batching import plan_batches
from indexer.encode.encoder import pad
from indexer.encode.losses import next_token_losses
from indexer.encode.tokens import Row, Tokenizer, TokenSettings, rows_of
from indexer.projection import draws
from indexer.session.ranks import Ranks

EVAL_BATCH_TOKENS = 4096
SHOWN_AFTER = 10.0
"""Seconds that a val loss may take without a bar: it comes often, and a log has a line for each."""
NO_DOMAIN = "none"
"""The domain of val rows without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValLoss:
    """Mean next-token loss, nats a token, over all targets."""

    loss: float
    by_domain: dict[str, float]
    targets: int


class ValSet:
    """The usable rows of a val set, tokenized and held in memory.

    UsageError where a domain is called as rows without one are.
    """

    def __init__(self, rows: Sequence[Row], fingerprint: str, left_out: dict[str, int], *, seed: int) -> None:
        self.rows = list(rows)
        _refuse_none(self.rows)
        self.fingerprint = fingerprint
        self.left_out = left_out
        """Rows that cannot be used, by status."""
        self.order = draws.permutation(f"ghoststore/1|val order|seed={seed}", len(self.rows))

    @classmethod
    def read(
        cls, corpus: Corpus, tokenizer: Tokenizer, max_length: int, *, max_samples: int | None = None, seed: int
    ) -> ValSet:
        """Read ``corpus``; longer samples are cut at ``max_length``. UsageError if no row can be used, or one has a
        token that the model's embedding lacks.
        """
        corpus.cut_stream(max_length)
        _ = corpus.resolved
        settings = TokenSettings(max_length=max_length, overlong="truncate")
        rows: list[Row] = []
        left_out: dict[str, int] = {}
        scanning = SampleScan(corpus.samples(), max_rows=max_samples)
        for row in rows_of(scanning, tokenizer, settings):
            if row.status.usable:
                rows.append(row)
            else:
                left_out[row.status.name.lower()] = left_out.get(row.status.name.lower(), 0) + 1
        if not rows:
            raise UsageError(f"no row of the val set {corpus.source} can be used: {counted(left_out) or 'it is empty'}")
        return cls(rows, scanning.finish().fingerprint, left_out, seed=seed)

    @property
    def domains(self) -> list[str]:
        """Names of the domains, sorted; rows without one are ``none``."""
        return sorted({self.domain_of(place) for place in range(len(self.rows))})

    def domain_of(self, place: int) -> str:
        """The domain of a row."""
        domain = self.rows[place].sample.domain
        return NO_DOMAIN if domain is None else domain

    def chosen(self, refresh: int, size: int, sampling: ValSampling) -> NDArray[np.int64]:
        """Places of the val rows of val gradient number ``refresh``: a function of seed and number alone."""
        size = min(size, len(self.rows))
        first = refresh * size if sampling == "rotate" else 0
        return np.asarray(self.order[np.arange(first, first + size) % len(self.rows)], dtype=np.int64)

    def batches(self, places: Sequence[int], batch_tokens: int = EVAL_BATCH_TOKENS) -> tuple[list[Any], list[int]]:
        """(batches for the engine, the places in their order): longest first, so that little is padding."""
        plan = self._plan(places, batch_tokens)
        return [self._batch(batch) for batch in plan], [place for batch in plan for place in batch]

    def _plan(self, places: Sequence[int], batch_tokens: int) -> list[list[int]]:
        lengths = [len(self.rows[place].tokens) for place in places]
        return [[places[index] for index in batch] for batch in plan_batches(lengths, batch_tokens)]

    def _batch(self, places: Sequence[int]) -> dict[str, torch.Tensor]:
        return dict(zip(("input_ids", "labels", "attention_mask"), pad([self.rows[p] for p in places]), strict=True))

    @torch.no_grad()
    def loss(self, model: Any, ranks: Ranks, progress: Progress | None = None) -> ValLoss:
        """The loss of every row, the work shared among the ranks. ``progress`` shows it if it takes long.

        In eval mode; every module's own mode is put back.
        """
        device = next(model.parameters()).device
        domains = self.domains
        column = {name: place for place, name in enumerate(domains)}
        sums = torch.zeros(len(domains), 2, dtype=torch.float64)
        own = self.order[ranks.rank :: ranks.count].tolist()
        with closing(Late(progress or Silent(), "val loss", len(own), SHOWN_AFTER)) as task:
            for places, sums_B2 in self._sums(model, own):
                sums.index_add_(0, torch.tensor([column[self.domain_of(place)] for place in places]), sums_B2)
                task.advance(len(places))
        sums = ranks.sum(sums.to(device)).cpu()
        total = sums.sum(0)
        return ValLoss(
            loss=float(total[0] / total[1]),
            by_domain={name: float(row[0] / row[1]) for name, row in zip(domains, sums, strict=True) if row[1]},
            targets=int(total[1]),
        )

    @torch.no_grad()
    def losses(self, model: Any, rows: Sequence[int] | None = None) -> NDArray[np.float64]:
        """(rows,): the mean loss over its targets of each of ``rows`` (default: all). In eval mode; every module's own
        mode is put back.
        """
        wanted = range(len(self.rows)) if rows is None else rows
        losses = np.zeros(len(self.rows))
        for places, sums_B2 in self._sums(model, wanted):
            losses[places] = (sums_B2[:, 0] / sums_B2[:, 1]).numpy()
        return losses[list(wanted)]

    def _sums(self, model: Any, rows: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """(places, (B, 2): summed loss and targets of each) of batches of ``rows``, float64 on the CPU."""
        device = next(model.parameters()).device
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            for places in self._plan(rows, EVAL_BATCH_TOKENS):
                batch = {key: value.to(device) for key, value in self._batch(places).items()}
                labels = batch.pop("labels")
                losses_B, targets_B = next_token_losses(model(**batch).logits, labels, reduction="sum")
                yield places, torch.stack([losses_B.double(), targets_B.double()], 1).cpu()
        finally:
            for module in training:
                module.training = True


def _refuse_none(rows: Sequence[Row]) -> None:
    domains = {row.sample.domain for row in rows}
    if None in domains and NO_DOMAIN in domains:
        named = next(row.sample for row in rows if row.sample.domain == NO_DOMAIN)
        raise UsageError(
            f"val sample {named.id!r} (row {named.source_row}) has a domain called {NO_DOMAIN!r}, as val samples "
            "without a domain are called, and there are such: give them, or it, another name"
        )
