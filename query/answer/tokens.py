"""Which tokens carry a score: ``ghoststore query --tokens``.

The similarity of a row is ⟨q, g⟩ ÷ length, and g = Σ_t of what each position of the row adds
(:mod:`indexer.encode.positions`). So it is a sum over the tokens of the row; and, because q is a mean of gradients of
val samples, also a sum over the tokens of these. Both are computed by the model for the rows that are shown, and never
stored. They sum to the similarity of the row's own gradient, of which the stored one is a rounding.

Legend: Q val vectors, H rows shown of one ranking, D numbers of a vector, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import CaptureError, UsageError
from ghoststore.progress import Progress
from ghoststore.store import Part
from indexer.encode.pairs import PAIR_LOSS
from indexer.encode.tokens import Row
from query.ask.encoder import PartEncoder
from query.ask.question import Question
from query.ask.scorer import Scorer
from query.ask.second_stage import Reranking
from query.search.top_k import Ranking

ROWS_AT_ONCE = 64
MOST_VAL_ROWS = 256
"""Most val rows of a mean whose tokens are looked at: each is multiplied with each row shown."""
TOLERANCE, NARROW_TOLERANCE = 1e-5, 0.05
"""Largest error of a sum over tokens relative to the lengths of both vectors, for a model in float32 and in 16 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What one token adds to a score."""

    token: str
    start: int | None
    """Its first character in the sample's text, and one past its last; None where the text does not tell."""
    end: int | None
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ValTokens:
    """The val sample behind a ranking, or of several the one that adds most to the row's score."""

    id: str
    val_row: int
    """Its place in the val set, counted from 0."""
    score: float
    """What it adds: the sum of its tokens."""
    tokens: Sequence[Token]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HitTokens:
    """The tokens of one row shown."""

    recomputed: float
    """Its similarity by the gradient that was computed again: the sum of its tokens, up to rounding."""
    tokens: Sequence[Token]
    val_sample: ValTokens | None
    """None where the ranking is of more than :data:`MOST_VAL_ROWS` val rows."""


Explained = dict[tuple[int, int], HitTokens]
"""By (ranking, row)."""


def refuse_tokens(question: Question, how: Reranking, parts: Sequence[Part]) -> None:
    """UsageError for scores that are no product of one row's vector, as the part has them, with one query."""
    if how.rerank is not None and how.rerank_with != "vectors":
        raise UsageError(
            f"`tokens` shows what sums to the product of two vectors of the part, and `rerank_with={how.rerank_with}` "
            "scores by whole gradients: give `rerank_with=vectors`"
        )
    if len(parts) > 1:
        raise UsageError("`tokens` shows the tokens of one gradient a row, and several parts have several: give one")
    if question.combine != "mean":
        raise UsageError(
            f"`tokens` shows what sums to a score, which `combine={question.combine}` is not: give `combine=mean`, or "
            "leave `group_field` out"
        )


def refuse_pairs(part: Part) -> None:
    """UsageError for a part of an encoder-decoder model: its positions are those of two sequences."""
    if part.manifest["loss"]["definition"] == PAIR_LOSS:
        raise UsageError(
            f"`tokens` shows what each token of a causal model's row adds, and part {part.name!r} is of a model with "
            "an encoder: leave `tokens` out"
        )


def explain(scorer: Scorer, rankings: Sequence[Ranking], progress: Progress) -> Explained:
    """The tokens of every row in ``rankings``, the best and the worst of each. ``scorer`` must keep its model.

    About two passes of the model for each row shown, and one for the val rows of each ranking. Raises what
    `PartEncoder.source_rows` raises; CaptureError where a sum over tokens is not the score.
    """
    (term,), encoder = scorer.terms, scorer.encoder
    assert encoder is not None
    places = _ValPlaces(scorer, progress)
    explained: Explained = {}
    shown = [
        np.unique(np.concatenate([ranking.rows[place][ranking.rows[place] >= 0] for ranking in rankings]))
        for place in range(len(scorer.names))
    ]
    with closing(progress.task("tokens", sum(map(len, shown)))) as task:
        for place, rows in enumerate(shown):
            query_D = term.queries_QD[place] * term.weight
            for start in range(0, len(rows), ROWS_AT_ONCE):
                batch = rows[start : start + ROWS_AT_ONCE]
                source_rows = encoder.source_rows(batch)
                exact_HD = encoder.vectors(source_rows, task).double() * term.mask
                length_H = _lengths(scorer, exact_HD)
                similarity_H = exact_HD @ query_D / length_H
                of_rows = encoder.token_scores(source_rows, query_D[None])
                scale_H = exact_HD.norm(dim=1) * query_D.norm() / length_H
                scores = [scores_QT[0] / length for scores_QT, length in zip(of_rows, length_H, strict=True)]
                sums_H = torch.stack([scores_T.sum() for scores_T in scores])
                _check(scorer, sums_H, similarity_H, scale_H, "their tokens")
                of_val = places.asking(place, exact_HD, length_H, similarity_H, scale_H)
                for at, row in enumerate(batch.tolist()):
                    explained[place, row] = HitTokens(
                        recomputed=float(similarity_H[at]),
                        tokens=_tokens(encoder, source_rows[at], scores[at]),
                        val_sample=of_val[at],
                    )
    return explained


def _lengths(scorer: Scorer, exact_HD: Tensor) -> Tensor:
    """(H,): what a product is divided by: the row's length in the metric for the cosine, else 1."""
    (term,) = scorer.terms
    if term.metric == "dot":
        return torch.ones(len(exact_HD), dtype=torch.float64)
    applied_HD = exact_HD if term.preconditioner is None else term.preconditioner.apply(exact_HD)
    return (exact_HD * applied_HD).sum(1).clamp_min(np.finfo(np.float64).tiny).sqrt()


class _ValPlaces:
    """The val rows behind each ranking, and with which weight each of them is in its query."""

    def __init__(self, scorer: Scorer, progress: Progress) -> None:
        (term,), val = scorer.terms, scorer.val
        assert scorer.encoder is not None
        assert scorer.val_set is not None
        self.scorer = scorer
        used = {place for places in val.samples_of for place in places}
        val_rows = scorer.encoder.val_rows(scorer.val_set, scorer.question.max_samples, scorer.question.phrase)
        rows = [row for row in val_rows if row.status.usable and row.sample.source_row in used]
        vectors_QD = val.vectors.double() * term.mask
        self.minus_D = None if scorer.minus is None else scorer.minus.vectors[0].double() * term.mask
        own_QD = term.queries_QD[-len(vectors_QD) :]
        scaled_QD = self.applied(vectors_QD if self.minus_D is None else vectors_QD - self.minus_D)
        # For the cosine a query was divided by its length, which is the ratio of what it was before and after.
        length_Q = (
            (scaled_QD.norm(dim=1) / own_QD.norm(dim=1)).tolist() if term.metric == "cosine" else [1.0] * len(own_QD)
        )
        if scorer.question.each:
            members = [[row] for row in rows]
        else:
            members = [[row for row in rows if row.sample.source_row in set(places)] for places in val.samples_of]
        assert len(members) == len(vectors_QD)
        weighted = [
            [(row, 1.0 / (len(of_query) * length)) for row in of_query]
            for of_query, length in zip(members, length_Q, strict=True)
        ]
        self.minus_weight = [1.0 / length for length in length_Q]
        if len(term.queries_QD) > len(weighted):  # the mean over groups comes first
            share = 1.0 / len(weighted)
            weighted.insert(0, [(row, share * weight) for of_query in weighted for row, weight in of_query])
            self.minus_weight.insert(0, share * sum(self.minus_weight))
        self.weighted = weighted
        if any(len(of_ranking) > MOST_VAL_ROWS for of_ranking in weighted):
            progress.note(
                f"the tokens of val samples are not shown for rankings of more than {MOST_VAL_ROWS} val rows: give "
                "`each`, or fewer (`max_samples`)"
            )

    def applied(self, vectors_QD: Tensor) -> Tensor:
        """The vectors as a query has them: preconditioned, if the question says so."""
        (term,) = self.scorer.terms
        return vectors_QD if term.preconditioner is None else term.preconditioner.apply(vectors_QD)

    def asking(
        self, place: int, exact_HD: Tensor, length_H: Tensor, similarity_H: Tensor, scale_H: Tensor
    ) -> list[ValTokens | None]:
        """For each row shown of ranking ``place`` the tokens of the val sample that adds most to its score (of a score
        below 0, takes most off it).
        """
        weighted, encoder = self.weighted[place], self.scorer.encoder
        assert encoder is not None
        if len(weighted) > MOST_VAL_ROWS:
            return [None] * len(exact_HD)
        (term,) = self.scorer.terms
        asked_HD = self.applied(exact_HD) * term.weight / length_H[:, None]
        rows, weights = zip(*weighted, strict=True)
        of_rows = encoder.token_scores(list(rows), asked_HD)
        scores = [scores_HT * weight for scores_HT, weight in zip(of_rows, weights, strict=True)]
        sums_VH = torch.stack([scores_HT.sum(1) for scores_HT in scores])
        expected_H = similarity_H
        if self.minus_D is not None:  # its tokens are not shown: what it takes off stays out of the sum
            expected_H = similarity_H + asked_HD @ self.minus_D * self.minus_weight[place]
        _check(self.scorer, sums_VH.sum(0), expected_H, scale_H, "the tokens of the val samples")
        strongest_H = (sums_VH * torch.where(expected_H < 0, -1.0, 1.0)).argmax(0).tolist()
        return [
            ValTokens(
                id=rows[at].sample.id,
                val_row=rows[at].sample.source_row,
                score=float(sums_VH[at, hit]),
                tokens=_tokens(encoder, rows[at], scores[at][hit]),
                text=rows[at].sample.preview(),
            )
            for hit, at in enumerate(strongest_H)
        ]


def _check(scorer: Scorer, sums_H: Tensor, expected_H: Tensor, scale_H: Tensor, what: str) -> None:
    """CaptureError if a sum over tokens is not the score that it explains."""
    assert scorer.encoder is not None
    narrow = next(scorer.encoder.model.parameters()).dtype in (torch.float16, torch.bfloat16)
    allowed_H = (NARROW_TOLERANCE if narrow else TOLERANCE) * scale_H.clamp_min(np.finfo(np.float64).tiny)
    wrong_H = ~((sums_H - expected_H).abs() <= allowed_H)
    if bool(wrong_H.any()):
        at = int(wrong_H.nonzero()[0])
        raise CaptureError(
            f"{what} sum to {float(sums_H[at]):.6g} and not to the score {float(expected_H[at]):.6g}: a layer adds to "
            "it in another way than by its input and the gradient at its output. Leave `tokens` out, or look with "
            "`ghoststore doctor`"
        )


def _tokens(encoder: PartEncoder, row: Row, scores_T: Tensor) -> list[Token]:
    texts = encoder.token_texts(row)
    return [
        Token(token=text, start=start, end=end, score=score)
        for (text, start, end), score in zip(texts, scores_T.tolist(), strict=True)
    ]


def pieces(text: str, tokens: Sequence[Token]) -> list[tuple[str, float | None]]:
    """``text`` in order as (characters, what their tokens add, or None for those between tokens). The tokens of one
    character are one piece. Without a text, or places of the tokens in it, each token is a piece.
    """
    if not text or all(token.start is None for token in tokens):
        return [(token.token, token.score) for token in tokens]
    found: list[tuple[str, float | None]] = []
    read, last = 0, None
    for token in tokens:
        if token.start is None or token.end is None:
            continue  # a special token
        if token.start >= len(text):
            break  # the text is cut
        if token.end <= read:  # a further part of the same character
            if last is not None:
                characters, score = found[last]
                found[last] = characters, (score or 0.0) + token.score
            continue
        start = max(token.start, read)
        if start > read:
            found.append((text[read:start], None))
        found.append((text[start : token.end], token.score))
        read, last = token.end, len(found) - 1
    return [*found, (text[read:], None)] if read < len(text) else found


def strongest(scores: Sequence[float], score: float, most: int) -> set[int]:
    """Places of the ``most`` of ``scores`` that add most to a ``score`` (below 0: that take most off): none that adds
    less than a tenth of the first.
    """
    values: NDArray[np.float64] = np.array(scores) * (-1.0 if score < 0 else 1.0)
    order = np.argsort(-values, kind="stable")[:most]
    return {int(place) for place in order if values[place] > 0 and values[place] >= values[order[0]] / 10}
