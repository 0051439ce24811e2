"""Exact search: every committed row against every query, streamed, with a running top k.

Legend: Q queries, R rows of a chunk, D numbers of a vector, G blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import UsageError
from ghoststore.progress import Task
from ghoststore.store import Part, Status
from ghoststore.store.reader import stream

Metric = Literal["dot", "cosine"]


@dataclass(frozen=True, slots=True)
class Ranking:
    """The best rows of each query, best first. Where fewer rows exist, ``rows`` ends in -1."""

    rows: NDArray[np.int64]
    """(Q, k)."""
    scores: NDArray[np.float64]
    """(Q, k)."""


class RunningTopK:
    """The k largest scores seen so far of each of Q queries; equal scores by lower row.

    The result does not depend on how the rows were cut into chunks.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.scores = np.full((queries, k), -np.inf, dtype=np.float32)
        self.rows = np.full((queries, k), -1, dtype=np.int64)

    def add(self, scores_RQ: Tensor, first_row: int) -> None:
        """Scores of rows ``first_row`` … ; rows must come in ascending order. -inf is never taken."""
        if self.k == 0:
            return
        threshold = torch.from_numpy(self.scores[:, -1]).to(scores_RQ.device)
        place, query = (x.cpu().numpy() for x in (scores_RQ > threshold).nonzero(as_tuple=True))
        if not len(place):
            return
        found = scores_RQ[place, query].cpu().numpy()
        touched, column = np.unique(query, return_inverse=True)
        # Candidates beside what is kept, sorted by query, then falling score, then rising row.
        all_query = np.concatenate([np.repeat(np.arange(len(touched)), self.k), column])
        all_score = np.concatenate([self.scores[touched].ravel(), found])
        all_row = np.concatenate([self.rows[touched].ravel(), place + first_row])
        order = np.lexsort((all_row, -all_score, all_query))
        starts = np.searchsorted(all_query[order], np.arange(len(touched)))
        kept = order[starts[:, None] + np.arange(self.k)]
        self.scores[touched], self.rows[touched] = all_score[kept], all_row[kept]

    def ranking(self) -> Ranking:
        """What was found."""
        return Ranking(self.rows.copy(), self.scores.astype(np.float64))


def as_tensor(data: NDArray[Any], dtype: str) -> Tensor:
    """Stored numbers as a tensor that shares their memory; ``dtype`` is the manifest's."""
    if dtype == "bfloat16":
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)


def search(
    part: Part,
    queries_QD: Tensor,
    *,
    metric: Metric,
    top_k: int,
    bottom_k: int = 0,
    groups: Sequence[int] | None = None,
    device: str = "cpu",
    task: Task | None = None,
) -> tuple[Ranking, Ranking]:
    """The ``top_k`` rows with the highest and the ``bottom_k`` with the lowest scores, for each query.

    ``queries_QD`` is float32. ``groups`` restricts the score to those blocks (default: all). Rows whose status
    is not usable are never returned. Products are float32 for every stored dtype. Reads each committed chunk
    once; memory does not depend on the number of rows.

    Raises UsageError for a query that is zero or not finite, CorruptError for a damaged chunk.
    """
    chosen = [(start, stop) for _, start, stop in part.groups]
    norm_columns = slice(None)
    if groups is not None:
        mask = torch.zeros(queries_QD.shape[1])
        for group in groups:
            mask[slice(*chosen[group])] = 1.0
        queries_QD = queries_QD * mask
        norm_columns = np.asarray(list(groups))  # type: ignore[assignment]
    if not bool(torch.isfinite(queries_QD).all()):
        raise UsageError("a query vector is not finite: the val set's gradient has NaN or infinite numbers")
    lengths = queries_QD.double().norm(dim=1)
    if bool((lengths == 0).any()):
        raise UsageError("a query vector is zero: every row would score the same")
    # Of length 1, so that no product is larger than its row is long: float32 cannot overflow.
    target = torch.device(device)
    queries_DQ = (queries_QD.double() / lengths.unsqueeze(1)).float().to(target).t().contiguous()
    best = RunningTopK(queries_QD.shape[0], top_k)
    worst = RunningTopK(queries_QD.shape[0], bottom_k)
    statuses, norms = stream(part, "status"), stream(part, "norm")
    status = norm = None
    with torch.no_grad():
        for chunk in stream(part, "vectors"):
            if status is None or chunk.start >= status.stop:
                status, norm = next(statuses), next(norms)
            assert norm is not None
            inside = slice(chunk.start - status.start, chunk.stop - status.start)
            unusable = torch.from_numpy(status.data[inside] >= Status.EMPTY).to(target)
            rows_RD = as_tensor(chunk.data, part.layout.dtype).to(target).float()
            scores_RQ = rows_RD @ queries_DQ
            if metric == "cosine":
                squares = np.square(norm.data[inside][:, norm_columns], dtype=np.float64).sum(1)
                lengths_R = torch.from_numpy(np.sqrt(squares).astype(np.float32)).to(target)
                scores_RQ /= torch.where(lengths_R > 0, lengths_R, 1.0).unsqueeze(1)
            scores_RQ.masked_fill_(unusable.unsqueeze(1), -torch.inf)
            best.add(scores_RQ, chunk.start)
            if bottom_k:
                worst.add((-scores_RQ).masked_fill_(unusable.unsqueeze(1), -torch.inf), chunk.start)
            if task:
                task.advance(chunk.stop - chunk.start)
    scale = lengths.numpy()[:, None] if metric == "dot" else 1.0
    highest, lowest = best.ranking(), worst.ranking()
    return Ranking(highest.rows, highest.scores * scale), Ranking(lowest.rows, -lowest.scores * scale)
