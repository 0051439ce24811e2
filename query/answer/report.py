"""A query's answer as one page that needs no network: ``ghoststore query --report out.html``.

Ranked samples with their texts, histograms of the scores, domains, what each layer adds, and the settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.corpus import Corpus
from ghoststore.progress import Progress
from ghoststore.shown import visible
from ghoststore.store import Part, Status
from ghoststore.store.base.new_files import new_file
from query.answer.contributions import Contributions, contributions
from query.answer.results import Hit, MixedHit, QueryResult, title_of
from query.answer.tokens import Token, pieces
from query.ask.scorer import Scorer
from query.ask.unit import metric_words, unit_of, unit_words
from query.search.counts import BINS, bins_of, equal
from query.search.top_k import Ranking

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MOST_RANKINGS = 30
MOST_ASKED = 3
"""Val samples whose texts stand beside a ranking."""
MOST_CHARACTERS = 4000
"""Characters shown of a sample's text."""
STRONGEST = 3
"""Layers named beside a sample: those that add most to its score."""
WIDTH, HEIGHT, TOP = 480, 150, 10
"""Size of a histogram and the margin above it, in units of the SVG picture."""


def write_report(
    path: Path,
    scorer: Scorer,
    val_set: Corpus | None,
    result: QueryResult,
    rankings: Sequence[Ranking],
    progress: Progress,
) -> None:
    """Write ``result`` as a page to the new file ``path``; with texts of ``val_set``, if that is given.

    Computes the score of every row, for the histograms. For a sketched part ``scorer`` must keep its model.
    """
    import jinja2

    shown = result.results[:MOST_RANKINGS]
    unit = result.settings["unit"]
    stored, recomputed = (
        None if unit is None else unit_of(scorer.question, scorer.parts, rounded=rounded) for rounded in (True, False)
    )
    in_unit = stored is not None and not scorer.mixed
    scores = scorer.scores(progress, len(shown)) * (stored.factor if stored is not None and in_unit else 1.0)
    rows, far = ([[int(row) for row in ranking if row >= 0] for ranking in of.rows[: len(shown)]] for of in rankings)
    cuts = _cuts(scorer.part, sorted({row for ranking in (*rows, *far) for row in ranking}))
    samples_of = _samples_of(scorer)
    asked = _asked(val_set, samples_of[: len(shown)])
    layers = contributions(scorer, rows, progress)
    if isinstance(layers, Contributions) and stored is not None and recomputed is not None:
        layers = layers.times((recomputed if scorer.part.sketched_together else stored).factor)
    domains = np.bincount(scorer.part.column("domain").astype(np.int64) + 1, minlength=len(scorer.part.domains) + 1)
    fused, reranked = scorer.question.combine == "rank-fusion", result.settings["rerank"] is not None
    page = {
        "title": f"{_count(result)} {Path(str(result.settings['val_set'])).name}",
        "subtitle": _subtitle(scorer, result),
        "unit": "" if unit is None else unit["name"],
        "score_unit": unit["name"] if unit is not None and in_unit else "",
        "of_tokens": 1.0 if recomputed is None else recomputed.factor,
        "unit_words": "" if unit is None else unit_words(result.settings),
        "rankings": [
            {
                "name": ranking.query,
                "title": title_of(ranking, result.settings),
                "similarity": "rank fusion" if fused and not place else result.settings["metric"],
                "asked": asked[place],
                "asked_more": max(0, len(set(samples_of[place])) - len(asked[place])),
                "hits": _hits(ranking.hits, hit_rows, layers, place, cuts),
                "bottom": _hits(ranking.bottom, far_rows, layers, place, cuts, named=False),
                "histogram": histogram(scores[place], () if reranked else ranking.hits),
                "domains": _domains(scorer.part, hit_rows, domains),
                "layers": _mean_layers(layers, place),
            }
            for place, (ranking, hit_rows, far_rows) in enumerate(zip(shown, rows, far, strict=True))
        ],
        "layers_note": layers.note if isinstance(layers, Contributions) and not reranked else "",
        "reranked": reranked,
        "left_out": _left_out(result, layers),
        "settings": [(name, _shown(value)) for name, value in {"store": result.store, **result.settings}.items()],
    }
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: visible(value, lines=True) if type(value) is str else value,
    )
    environment.globals["number"] = number
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page)
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def number(value: float) -> str:
    """``value`` with four significant digits."""
    return f"{value:.4g}"


def histogram(scores_N: NDArray[np.float64], hits: Sequence[Hit]) -> dict[str, Any] | None:
    """A histogram's bins as rectangles (x, y, width, height), and x of zero and of the lowest score of ``hits``.

    None without a finite score.
    """
    finite = scores_N[np.isfinite(scores_N)]
    if not len(finite):
        return None
    low, high = float(finite.min()), float(finite.max())
    counts = bins_of(finite, low, high)
    spread = 0.0 if equal(low, high) else high - low
    tall = HEIGHT * np.log1p(counts) / np.log1p(counts.max())
    wide = WIDTH / BINS

    def place(score: float) -> float | None:
        return round(WIDTH * (score - low) / spread, 1) if spread > 0 and low <= score <= high else None

    lowest = min((_shown_score(hit) for hit in hits), default=None)
    return {
        "rows": len(finite),
        "low": low,
        "high": high,
        "bins": [
            (round(bin * wide, 1), round(TOP + HEIGHT - float(h), 1), round(wide - 1, 1), round(float(h), 1))
            for bin, h in enumerate(tall)
            if h > 0
        ],
        "zero": place(0.0) if low < 0 < high else None,
        "mark": None if lowest is None else place(lowest),
        "lowest": lowest,
    }


def _shown_score(hit: Hit) -> float:
    """What it is ranked by, in nats where it has them."""
    return hit.score if hit.nats is None or isinstance(hit, MixedHit) else hit.nats


def _domains(part: Part, rows: Sequence[int], all_rows: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Each domain's share of ``rows`` and of all rows, the largest first; empty without domains.

    ``all_rows`` counts the rows of each domain; the first count is of rows without one.
    """
    names = part.domains
    if not names or not rows:
        return []
    chosen = np.bincount(np.asarray(part.read_rows("domain", rows)) + 1, minlength=len(all_rows))
    shares = [
        {
            "name": name,
            "chosen": int(count),
            "chosen_percent": round(100 * float(count) / len(rows), 1),
            "all_percent": round(100 * float(of_all) / float(all_rows.sum()), 1),
        }
        for name, count, of_all in zip(["no domain", *names], chosen, all_rows, strict=True)
        if of_all
    ]
    return sorted(shares, key=lambda domain: (-domain["chosen"], domain["name"]))


def _samples_of(scorer: Scorer) -> list[list[int]]:
    """For each ranking the places in the val set of the samples behind it."""
    of_groups = [list(dict.fromkeys(places)) for places in scorer.val.samples_of]
    if len(of_groups) == len(scorer.names):
        return of_groups
    return [sorted({place for places in of_groups for place in places}), *of_groups]  # all groups come first


def _asked(val_set: Corpus | None, samples_of: Sequence[Sequence[int]]) -> list[list[dict[str, Any]]]:
    """For each ranking the id and the text of its first val samples; none without a ``val_set``."""
    first = [list(places[:MOST_ASKED]) for places in samples_of]
    wanted = {place for places in first for place in places}
    if val_set is None or not wanted:
        return [[] for _ in first]
    texts = {
        sample.source_row: {"id": sample.id, **text_of(sample.preview())}
        for sample in islice(val_set.samples(), max(wanted) + 1)
        if sample.source_row in wanted
    }
    return [[texts[place] for place in places if place in texts] for places in first]


def text_of(text: str | None) -> dict[str, Any]:
    """What the page shows of a text: at most :data:`MOST_CHARACTERS`, how many ``more`` there are, and whether it is
    ``code``.
    """
    if text is None:
        return {"text": None, "more": "", "code": False}
    more = len(text) - MOST_CHARACTERS
    return {"text": text[:MOST_CHARACTERS], "more": f"{more:,}" if more > 0 else "", "code": is_code(text)}


def is_code(text: str) -> bool:
    """Whether lines of ``text`` mean something by where they begin: a quarter of them, and two at least, are indented
    or end as those of programs do. It chooses a font, and nothing else.
    """
    lines = [line for line in text[:MOST_CHARACTERS].splitlines() if line.strip()]
    marked = sum(line.startswith(("  ", "\t")) or line.rstrip().endswith(("{", "}", ";", "):")) for line in lines)
    return marked >= 2 and marked >= len(lines) / 4


def _cuts(part: Part, rows: Sequence[int]) -> dict[int, int]:
    """The number of tokens of those of ``rows`` that the build cut: their gradients are of their beginnings."""
    if not rows:
        return {}
    status, tokens = part.read_rows("status", rows), part.read_rows("n_tokens", rows)
    return {row: int(count) for row, of, count in zip(rows, status, tokens, strict=True) if int(of) == Status.TRUNCATED}


def _hits(
    hits: Sequence[Hit],
    rows: Sequence[int],
    layers: Contributions | str,
    ranking: int,
    cuts: Mapping[int, int],
    *,
    named: bool = True,
) -> list[dict[str, Any]]:
    """What the page shows of ``hits``, which are ``rows``; with the layers that add most, if these are ``named``."""
    shown = []
    for hit, row in zip(hits, rows, strict=True):
        strongest: list[tuple[str, float]] = []
        if named and isinstance(layers, Contributions) and row in layers.of[ranking]:
            values = layers.of[ranking][row]
            order = np.argsort(-np.abs(values), kind="stable")[:STRONGEST]
            short = _short(layers.layers)
            strongest = [(short[at], float(values[at])) for at in order]
        parts: dict[str, Any] = {"pieces": colored(hit.text, hit.tokens)} if hit.tokens is not None else {}
        if hit.val_sample is not None:
            parts["asking"] = colored(hit.val_sample.text, hit.val_sample.tokens)
            parts["asking_code"] = is_code(hit.val_sample.text)
        score = _shown_score(hit)
        beside = {"score": score, "layers": strongest, "cut": cuts.get(row)}
        shown.append({**asdict(hit), **text_of(hit.text), **beside, **parts})
    return shown


def colored(text: str | None, tokens: Sequence[Token]) -> list[tuple[str, str, float | None]]:
    """``text`` as (characters, class of their color, what their tokens add): ``p1`` to ``p5`` for those that add, the
    last most, ``n1`` to ``n5`` for those that take off; no class for what adds next to nothing, None between tokens.
    It begins at the first token, and is at most :data:`MOST_CHARACTERS` long.
    """
    first = next((token.start for token in tokens if token.start is not None), 0)
    found = pieces((text or "")[: first + MOST_CHARACTERS], tokens)
    most = max((abs(score) for _, score in found if score is not None), default=0.0) or 1.0
    shown: list[tuple[str, str, float | None]] = [("… ", "", None)] if first and text else []
    for characters, score in found:
        if score is None and not shown[1:] and first:
            continue  # the windows before this one
        level = 0 if score is None else round(5 * abs(score) / most)
        shown.append((characters, f"{'n' if (score or 0.0) < 0 else 'p'}{level}" if level else "", score))
    left = len(text or "") - first - MOST_CHARACTERS
    return [*shown, (f" … {left:,} more characters", "", None)] if left > 0 else shown


def _mean_layers(layers: Contributions | str, ranking: int) -> list[dict[str, Any]]:
    """One bar for each layer, in the order of the model: the mean contribution over the rows shown."""
    if isinstance(layers, str) or not layers.of[ranking]:
        return []
    mean = np.mean(list(layers.of[ranking].values()), axis=0)
    low, high = min(0.0, float(mean.min())), max(0.0, float(mean.max()))
    spread = (high - low) or 1.0
    return [
        {
            "name": name,
            "value": float(value),
            "left": round(100 * (min(0.0, float(value)) - low) / spread, 2),
            "width": round(100 * abs(float(value)) / spread, 2),
        }
        for name, value in zip(_short(layers.layers), mean, strict=True)
    ]


def _short(names: Sequence[str]) -> list[str]:
    """The names without the components that all of them begin with."""
    paths = [name.split(".") for name in names]
    shared = 0
    while all(len(path) > shared + 1 for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    return [".".join(path[shared:]) for path in paths]


def _count(result: QueryResult) -> str:
    most = max((len(ranking.hits) for ranking in result.results), default=0)
    if not most:
        most = max((len(ranking.bottom) for ranking in result.results), default=0)
        return f"The {most} training samples farthest from" if most != 1 else "The training sample farthest from"
    return f"The {most} training samples nearest to" if most != 1 else "The training sample nearest to"


def _subtitle(scorer: Scorer, result: QueryResult) -> str:
    score = metric_words(result.settings)
    if scorer.mixed:
        score = f"blend of {'BM25' if scorer.hybrid else 'training-time value'} and similarity ({score})"
    return (
        f"{score[0].upper()}{score[1:]}; {result.settings['rows']:,} rows of part {scorer.part.name}, "
        f"{result.settings['val_rows']:,} val samples"
    )


def _left_out(result: QueryResult, layers: Contributions | str) -> str:
    notes = []
    if len(result.results) > MOST_RANKINGS:
        notes.append(
            f"{len(result.results) - MOST_RANKINGS} more rankings are not shown; the result itself has them all."
        )
    if isinstance(layers, str):
        notes.append(f"What each layer adds is not shown: {layers}.")
    if result.settings.get("rerank") is not None:
        notes.append(
            "The scores listed are those of gradients that were computed again; histograms, and what layers add, are "
            "of the stored vectors."
        )
    if result.settings.get("tokens"):
        unit = result.settings["unit"]
        notes.append(
            f"Colors: what a token adds to the {result.settings['metric']} of its row, computed again without rounding"
            f"{'' if unit is None else ', in ' + unit['name']}; red, what it takes off. A token adds through all the "
            "losses behind it, not by the loss of predicting it alone."
        )
    return " ".join(notes)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
