"""The results of a query: their fields, how they are made from rankings, and the files they are written to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, overload

import numpy as np

from ghoststore.progress import Progress
from ghoststore.settings.shared import Data
from ghoststore.store import Part
from query.answer.distribution import Distribution
from query.answer.tokens import Explained, Token, ValTokens
from query.ask.blend import Blend
from query.ask.hybrid import Hybrid
from query.ask.question import COMBINED
from query.ask.unit import Unit
from query.common.notebook import cut, html_table, html_tables
from query.common.output import arrow_table, columns_of, write_result
from query.common.texts import texts_of
from query.search.top_k import Ranking

OF_TOKENS = ("tokens", "recomputed", "val_sample")
"""Fields of a hit that only ``tokens`` of a question fills."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Hit:
    """One row of a ranking. ``rank`` counts from 1."""

    rank: int
    score: float
    nats: float | None = None
    """The product that ``score`` is, or is blended from, in the ``unit`` of the settings: a change of the val loss.
    None where it has none."""
    unit: str | None = None
    """The name of that unit, for words and tables in Python. Files have it once, in the settings."""
    id: str
    source_row: int
    domain: str | None
    text: str | None
    """The sample's whole text; None where the source is gone or has changed."""
    window_start: int
    """First token of the row in its sample; 0 unless long samples were split."""
    part: str | None = None
    """Where several parts are ranked as one: that of the row, whose corpus has it at ``source_row``. Else None."""
    tokens: Sequence[Token] | None = None
    """What each token of the row adds to its similarity; None, as the next two, without ``tokens`` of the question."""
    recomputed: float | None = None
    """The similarity by the gradient that was computed again for it, which the tokens sum to."""
    val_sample: ValTokens | None = None
    """The val sample behind the ranking, or of several the one that adds most, with its tokens."""

    def cells(self) -> dict[str, Any]:
        """What a table of a notebook shows of it, by column; a product in its unit, where it has one."""
        shown = _flat(asdict(self))
        text, nats, product = shown.pop("text"), shown.pop("nats"), "score"
        if isinstance(self, MixedHit):
            product = "similarity"
        if not self.window_start:
            del shown["window_start"]
        if self.part is None:
            del shown["part"]
        if self.unit is not None:
            shown = {self.unit if name == product else name: value for name, value in shown.items()}
            shown[self.unit] = nats
        return {**shown, "text": text}

    def __repr__(self) -> str:
        text = "" if self.text is None else f", text={cut(self.text, 60)!r}"
        return f"{type(self).__name__}(rank={self.rank}, {self.ranked_by()}, id={self.id!r}{text})"

    def ranked_by(self) -> str:
        """The number that it is ranked by, named, in nats where it has them."""
        in_nats = None if isinstance(self, MixedHit) else self.nats
        return f"score={self.score:.6g}" if in_nats is None else f"{self.unit or 'nats'}={in_nats:.3g}"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MixedHit(Hit):
    """One row of a ranking by a ``score`` that ``similarity`` is blended into."""

    similarity: float
    """The cosine or dot product; of groups that ``rank-fusion`` combines, what that gives."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BlendedHit(MixedHit):
    """One row of a ranking by ``with_scores``: ``score`` is the blend of ``similarity`` and ``value``."""

    value: float | None
    """Σ weight·score of the sample in the training run; None where the run has no score of it."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class HybridHit(MixedHit):
    """One row of a ranking by ``lexical``: ``score`` is the blend of ``similarity`` and ``bm25``."""

    bm25: float
    """Of the row's text for the texts of the val samples; 0 where they share no word."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RunHit(Hit):
    """A sample of a training run: ``score`` is the sum over the steps that it was in."""

    times: int
    """Of these, those that count."""
    last_step: int
    """The newest of them."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class QueryHits:
    """The best and the worst rows for one query. ``query`` is ``"mean"``, a val sample's id, or a group's name.

    It is the sequence of its best rows: ``len``, iteration and indexing go over ``hits``.
    """

    query: str
    """Of a run's own val gradients ``"own"``."""
    val_row: int | None = None
    """Place of the val sample in the val set, counted from 0, because ids may repeat; None for a mean."""
    hits: Sequence[Hit]
    bottom: Sequence[Hit]
    """The rows with the lowest scores, lowest first; empty without ``bottom_k``."""
    histogram: Distribution | None = None
    """How the scores of all rows lie; None without ``histogram`` of the question, and where no row has a score."""

    def __len__(self) -> int:
        return len(self.hits)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    @overload
    def __getitem__(self, place: int) -> Hit: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Hit]: ...
    def __getitem__(self, place: int | slice) -> Hit | Sequence[Hit]:
        return self.hits[place]

    def __repr__(self) -> str:
        best = ""
        if self.hits:
            best = f", best {self.hits[0].ranked_by().removeprefix('score=')} {self.hits[0].id!r}"
        lowest = f", {len(self.bottom)} lowest" if self.bottom else ""
        return f"<ranking {self.query!r}: {len(self.hits)} hits{best}{lowest}>"

    def _repr_html_(self) -> str:
        return self.html({})

    def html(self, settings: dict[str, Any]) -> str:
        """As tables of a notebook, titled as ``ghoststore query`` titles them. ``settings`` are those of the result."""
        of = cut(title_of(self, settings), 80)
        titles = titles_of(settings.get("metric"))
        tables = [
            html_table(title.format(of), [hit.cells() for hit in hits])
            for title, hits in zip(titles, (self.hits, self.bottom), strict=True)
            if hits
        ]
        return "".join(tables) or f"<div>{escape(titles[0].format(of))}: no hits</div>"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class QueryResult:
    """What ``ghoststore.query`` returns: one :class:`QueryHits` for each query, and the settings they came from.

    It is the sequence of its rankings: ``result[0]`` is the first one, ``result["math"]`` the one of that name, and
    ``result[0][0]`` the best row. ``to_pandas`` and ``to_arrow`` give a flat table of all hits.
    """

    store: str
    settings: dict[str, Any]
    results: list[QueryHits]

    def __len__(self) -> int:
        return len(self.results)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[QueryHits]:
        return iter(self.results)

    @overload
    def __getitem__(self, place: int | str) -> QueryHits: ...
    @overload
    def __getitem__(self, place: slice) -> list[QueryHits]: ...
    def __getitem__(self, place: int | str | slice) -> QueryHits | list[QueryHits]:
        """The ranking at ``place``, or with that name. KeyError for a name that none has, or several."""
        if not isinstance(place, str):
            return self.results[place]
        named = [result for result in self.results if result.query == place]
        if len(named) != 1:
            names = [result.query for result in self.results]
            shown = ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")
            raise KeyError(
                f"{len(named)} of {len(names)} rankings are called {place!r}; their names are {shown}; "
                "a number takes one by its place"
            )
        return named[0]

    def __repr__(self) -> str:
        of = self.settings.get("part") or self.settings.get("run")
        shown = ", ".join(map(repr, self.results[:2]))
        more = f", … {len(self.results) - 2} more" if len(self.results) > 2 else ""
        return f"<answer of {of!r} by {self.settings.get('metric')}: {shown}{more}>"

    def _repr_html_(self) -> str:
        tables = (result.html(self.settings) for result in self.results)
        return html_tables(tables, len(self.results), "rankings")

    def to_arrow(self) -> Any:
        """A `pyarrow.Table` of all hits, with the columns of :meth:`rows`."""
        return arrow_table(self._columns, self.rows())

    def to_pandas(self) -> Any:
        """A pandas DataFrame of all hits, with the columns of :meth:`rows`."""
        return self.to_arrow().to_pandas()

    def to_json(self) -> dict[str, Any]:
        """The document that ``ghoststore query --json`` prints; with ``bottom`` only if ``bottom_k`` is not 0."""
        results = [asdict(result) for result in self.results]
        for result in results:
            for hit in (*result["hits"], *result["bottom"]):
                del hit["unit"]
                if hit["part"] is None:
                    del hit["part"]
                if not self.settings.get("tokens"):
                    _flat(hit)
            if not self.settings.get("histogram"):
                del result["histogram"]
            if not self.settings.get("bottom_k"):
                del result["bottom"]
        return {"store": self.store, "settings": self.settings, "results": results}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One flat row for each hit: query, val_row, list (``top`` or ``bottom``) and the fields of the hit."""
        for result in self.results:
            for name, hits in (("top", result.hits), ("bottom", result.bottom)):
                for hit in hits:
                    row = {"query": result.query, "val_row": result.val_row, "list": name, **asdict(hit)}
                    if hit.part is None:
                        del row["part"]
                    yield _flat(row)

    def write(self, path: str | Path) -> None:
        """Write a new file: the document as ``.json``, or flat rows as ``.jsonl``, ``.csv`` or ``.parquet``.

        UsageError for another suffix, or if the file exists.
        """
        write_result(path, self.to_json, self._columns, self.rows())

    @property
    def _columns(self) -> dict[str, type]:
        """Of flat rows."""
        of_one = () if self.settings.get("united") else ("part",)
        left_out = (*OF_TOKENS, "unit", *of_one)
        return {"query": str, "val_row": int, "list": str, **columns_of(self._hit, leave_out=left_out)}

    @property
    def _hit(self) -> type[Hit]:
        """The class of the hits."""
        return next((type(hit) for result in self.results for hit in (*result.hits, *result.bottom)), Hit)


def titles_of(metric: str | None) -> tuple[str, str]:
    """What the best rows and the worst ones are called, with a place for what the ranking is of. ``metric`` None: it
    is not known.
    """
    if metric is None:
        return "highest scores for {0}", "lowest scores for {0}"
    if metric in ("cosine", "dot"):
        return "nearest to {0}", "farthest from {0}"
    return f"highest {metric}", f"lowest {metric}"


def title_of(ranking: QueryHits, settings: dict[str, Any]) -> str:
    """What a ranking is of, in words: its name, unless that stands for all val samples together."""
    if settings.get("mode") == "own":
        return "each step's own val gradient"
    if ranking.val_row is None and settings.get("group_field") is not None:
        return f"all groups ({settings['combine']})" if ranking.query == COMBINED else ranking.query
    if ranking.val_row is None and ranking.query == "mean":
        return "the val set's mean gradient"
    return ranking.query


def with_nats(hits: Sequence[Sequence[Sequence[Hit]]], unit: Unit | None) -> list[list[list[Hit]]]:
    """``hits`` of :func:`hits_of` with their ``nats``, where products have a ``unit``."""

    def of(hit: Hit) -> Hit:
        product = hit.similarity if isinstance(hit, MixedHit) else hit.score
        return hit if unit is None else replace(hit, nats=product * unit.factor, unit=unit.name)

    return [[[of(hit) for hit in ranking] for ranking in rankings] for rankings in hits]


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` of a hit without what lies behind its score, which no flat table holds, and without its unit."""
    for name in (*OF_TOKENS, "unit"):
        row.pop(name, None)
    return row


def hits_of(
    part: Part,
    rankings: Sequence[Ranking],
    text: bool,
    progress: Progress,
    blend: Blend | Hybrid | None = None,
    data: Data | None = None,
    explained: Explained | None = None,
) -> list[list[list[Hit]]]:
    """The hits as ``[ranking][query][rank]``. The data of each row are read once.

    ``text`` says whether to look up texts, in the corpus that the user gives as ``data`` or in the recorded one. With
    ``blend`` a hit has what was blended, too; with ``explained`` its tokens.
    """
    rows = sorted({int(row) for ranking in rankings for row in ranking.rows.ravel() if row >= 0})
    place = {row: index for index, row in enumerate(rows)}
    ids, sources, domains, windows = (
        part.read_rows(name, rows) for name in ("sample_id", "source_row", "domain", "window_start")
    )
    texts = texts_of(part, rows, progress, data) if text else [None] * len(rows)
    names = part.domains
    homes = {int(at): member for member, ats, _ in part.located(rows) for at in ats}

    def hit(query: int, rank: int, row: int, score: np.float64) -> Hit:
        at = place[row]
        shared: dict[str, Any] = {
            "rank": rank,
            "score": float(score),
            "id": str(ids[at]),
            "source_row": int(sources[at]) - part.first_source_row(homes[at]),
            "domain": names[domains[at]] if domains[at] >= 0 else None,
            "text": texts[at],
            "window_start": int(windows[at]),
            "part": homes[at].name if len(part.members) > 1 else None,
        }
        if explained is not None:
            of_tokens = explained[query, row]
            shared |= {name: getattr(of_tokens, name) for name in OF_TOKENS}
        if blend is None:
            return Hit(**shared)
        if isinstance(blend, Hybrid):
            similarity, bm25 = blend.similarity[query, row], blend.lexical[query, row]
            return HybridHit(**shared, similarity=float(similarity), bm25=float(bm25))
        value = float(blend.values.value[row])
        return BlendedHit(
            **shared, similarity=float(blend.similarity[query, row]), value=value if np.isfinite(value) else None
        )

    return [
        [
            [
                hit(query, rank, int(row), score)
                for rank, (row, score) in enumerate(zip(rows_q, scores_q, strict=True), 1)
                if row >= 0
            ]
            for query, (rows_q, scores_q) in enumerate(zip(ranking.rows, ranking.scores, strict=True))
        ]
        for ranking in rankings
    ]
