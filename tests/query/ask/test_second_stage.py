"""`--rerank`: scores of whole gradients in the part's metric, against autograd of one row at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.corpus import Fields, open_corpus
from ghoststore.errors import UsageError
from ghoststore.store import Store
from query.ask.encoder import PartEncoder
from query.ask.unit import metric_words
from query.exact.products import exact_products
from query.fidelity.fidelity import exact_gradients, pieces_of
from tests.support.notes import Notes
from tests.support.oracle import gradient_matrix, gradients_alone
from tests.support.train_oracle import loss_of

if TYPE_CHECKING:
    from tests.conftest import Lab

ROWS, EMPTY = 24, 5
OF_PART, OF_STAGE = 0.1, 0.01
"""The damping of a part, and of whole gradients, by default."""
GROUPS = ("b", "a", "b", "a")
PARTS: dict[str, dict[str, Any]] = {
    "kfac": {},
    "plain": {"projection": ProjectionConfig(precondition="none"), "proj_dtype": "int8"},
    "windows": {"max_length": 8, "overlong": "window"},
}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("kfac", "cosine", {"each": True}),
    ("plain", "dot", {}),
    ("kfac", "cosine", {"group_field": "domain"}),
    ("kfac", "dot", {"group_field": "domain"}),
    ("windows", "cosine", {"each": True, "minus": "far.jsonl"}),
    ("kfac", "dot", {"each": True, "layers": ["mlp"]}),
    ("windows", "dot", {}),
    ("plain", "cosine", {"each": True}),
]


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts of one corpus with an empty row, and two val sets with one each."""
    folder: Path = tmp_path_factory.mktemp("second-stage")
    rows = lab.sample_rows(ROWS, 1)
    rows[EMPTY]["text"] = ""
    lab.write(folder / "train.jsonl", rows)
    empty = {"id": "unusable", "text": "", "domain": "a"}
    val = [row | {"domain": group} for row, group in zip(lab.sample_rows(len(GROUPS), 3), GROUPS, strict=True)]
    lab.write(folder / "val.jsonl", [val[0], empty, *val[1:]])
    lab.write(folder / "far.jsonl", [empty, *lab.sample_rows(3, 8)])
    for name, settings in PARTS.items():
        ghoststore.build(
            checkpoint=lab.checkpoint,
            data=folder / "train.jsonl",
            store=folder / "store",
            name=name,
            span_rows=16,
            device="cpu",
            **settings,
        )
    return folder


def ask(folder: Path, part: str = "kfac", progress: Any = None, **settings: Any) -> Any:
    if "minus" in settings:
        settings["minus"] = folder / settings["minus"]
    settings = {"rerank": 70, "top_k": 70, "bottom_k": 70, "metric": "dot", **settings}
    return ghoststore.query(
        store=folder / "store", part=part, val_set=folder / "val.jsonl", device="cpu", progress=progress, **settings
    )


def by_row(hits: Any) -> dict[tuple[int, int], float]:
    return {(hit.source_row, hit.window_start): hit.score for hit in hits}


def expected(folder: Path, name: str, metric: str, settings: dict[str, Any]) -> NDArray[np.float64]:
    """(Q, rows) for the usable rows, from products of gradients that autograd gave for one row at a time."""
    part = Store.open(folder / "store").part(name)
    encoder = PartEncoder(part, device="cpu")
    groups = None
    if settings.get("layers"):
        groups = [place for place, (layer, _, _) in enumerate(part.groups) if "mlp" in layer]
    pieces = pieces_of(encoder, groups)
    vals: list[Any] = []
    for file in ("val.jsonl", "far.jsonl"):
        with open_corpus(str(folder / file), Fields()) as corpus:
            vals.append([row for row in encoder.rows(corpus.samples()) if row.status.usable])
    rows = encoder.source_rows(part.row_numbers[part.usable()])
    count, far = len(vals[0]), len(vals[1])
    everything = [*vals[0], *vals[1], *rows]
    exact = exact_gradients(encoder, pieces)
    gram = exact_products(exact, pieces, everything, everything, Notes().task("gradients", None))["layers"].dots_QR
    weights = np.eye(count)
    if not settings.get("each"):
        weights = np.full((1, count), 1 / count)
    if "group_field" in settings:
        weights = np.array([[row.sample.domain == group for row in vals[0]] for group in ("a", "b")], dtype=float)
        weights /= weights.sum(1, keepdims=True)
    minus = np.full((len(weights), far), -1 / far if "minus" in settings else 0.0)
    weights = np.concatenate([weights, minus], axis=1)
    scores = weights @ gram[: count + far, count + far :]
    if metric == "cosine":
        lengths = np.einsum("qv,vw,qw->q", weights, gram[: count + far, : count + far], weights) ** 0.5
        scores = scores / lengths[:, None] / np.diagonal(gram)[count + far :] ** 0.5
    return np.concatenate([scores.mean(0, keepdims=True), scores]) if "group_field" in settings else scores


@pytest.mark.thin(2)
@pytest.mark.parametrize(("part", "metric", "settings"), CASES, ids=str)
def test_scores_of_all_rows(
    folder: Path, part: str, metric: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One val sample's gradient in memory at a time, all rows as candidates: best and worst."""
    monkeypatch.setattr("query.ask.second_stage.MEMORY", 1)
    monkeypatch.setattr("query.ask.second_stage.ROWS_AT_ONCE", 7)
    notes = Notes()
    damped = {} if part == "plain" else {"rerank_damping": OF_PART}
    result = ask(folder, part, notes, metric=metric, **settings, **damped)
    assert result.settings["rerank_with"] == "exact"
    assert result.settings.get("rerank_damping") == damped.get("rerank_damping")
    wanted = expected(folder, part, metric, settings)
    assert len(result.results) == len(wanted)
    (cost,) = (note for note in notes.said if note.startswith("second stage: "))
    assert "val rows and " in cost
    assert (" times, for 1 of " in cost) == (len(result.results) > 1)
    for ranking, scores in zip(result.results, wanted, strict=True):
        found = by_row(ranking.hits)
        assert len(found) == len(scores)
        order = sorted(found)
        np.testing.assert_allclose([found[row] for row in order], scores, rtol=1e-4, atol=1e-4 * np.abs(scores).max())
        assert [hit.score for hit in ranking.hits] == sorted(scores_of(ranking.hits), reverse=True)
        assert by_row(ranking.bottom) == found
        assert [hit.score for hit in ranking.bottom] == sorted(scores_of(ranking.bottom))


def scores_of(hits: Any) -> list[float]:
    return [hit.score for hit in hits]


@pytest.fixture(scope="module")
def adam(lab: Lab, folder: Path) -> dict[str, torch.Tensor]:
    """A part ``adam``, scaled by the state of an optimizer; its second moment by the name of a parameter."""
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = torch.rand(parameter.shape[-1], generator=generator) * torch.rand(1, generator=generator)
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    ghoststore.build(
        checkpoint=lab.checkpoint,
        data=folder / "train.jsonl",
        store=folder / "store",
        name="adam",
        optimizer_state=folder,
        device="cpu",
    )
    return {name: optimizer.state[p]["exp_avg_sq"].double() for name, p in model.named_parameters()}


def alone(folder: Path, name: str) -> tuple[PartEncoder, Any, Any, int]:
    """(encoder of the part, its model in float64, gradients of the val rows and then of all rows, each row alone by
    autograd, the number of val rows).
    """
    part = Store.open(folder / "store").part(name)
    encoder = PartEncoder(part, device="cpu")
    with open_corpus(str(folder / "val.jsonl"), Fields()) as corpus:
        vals = [row for row in encoder.rows(corpus.samples()) if row.status.usable]
    rows = encoder.source_rows(part.row_numbers[part.usable()])
    everything = [(row.tokens.tolist(), row.first_target) for row in [*vals, *rows]]
    model = encoder.model.double()
    gradients = gradients_alone(model, len(everything), lambda model, place: loss_of(model, *everything[place]))
    return encoder, model, gradients, len(vals)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_with_less_damping_than_the_part(folder: Path, metric: str) -> None:
    """By default: each row alone by autograd, times the inverse of the factors with that damping, all dense, float64.
    In nats the metric has more directions.
    """
    encoder, model, gradients, vals = alone(folder, "kfac")
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    assert encoder.plan.calibration is not None
    learned = encoder.plan.calibration.preconditioner
    assert learned is not None
    directions = dict.fromkeys((OF_PART, OF_STAGE), 0.0)
    for name, factors in learned.factors.items():
        whole = [(f.vectors.double().t() * (f.values.double() - f.rest)) @ f.vectors.double() for f in factors]
        whole = [f_NN + f.rest * torch.eye(len(f_NN)) for f_NN, f in zip(whole, factors, strict=True)]
        means = [float(f_NN.diagonal().mean()) for f_NN in whole]
        relative = [f_NN / mean for f_NN, mean in zip(whole, means, strict=True)]
        in_II, out_OO = (torch.linalg.inv(f_NN + OF_STAGE * torch.eye(len(f_NN))) for f_NN in relative)
        matrices = torch.stack([gradient_matrix(model, name, gradient) for gradient in gradients])
        in_metric = out_OO @ matrices @ in_II * (len(in_II) / means[1])
        gram += in_metric.flatten(1) @ matrices.flatten(1).t()
        for damping in directions:
            inverses = [torch.linalg.inv(f_NN + damping * torch.eye(len(f_NN))) for f_NN in relative]
            traces = [float((f_NN @ inv_NN).trace()) for f_NN, inv_NN in zip(relative, inverses, strict=True)]
            directions[damping] += traces[0] * traces[1]
    scores = gram[:vals, vals:]
    if metric == "cosine":
        lengths = gram.diagonal().sqrt()
        scores = scores / lengths[:vals, None] / lengths[None, vals:]
    answer = ask(folder, metric=metric, each=True)
    assert answer.settings["rerank_damping"] == OF_STAGE
    for ranking, wanted in zip(answer.results, scores.numpy(), strict=True):
        found = by_row(ranking.hits)
        order = sorted(found)
        np.testing.assert_allclose([found[row] for row in order], wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert metric_words(answer.settings).endswith("learned at build, with damping 0.01")
    if metric == "dot":
        of_part = ask(folder, metric=metric, each=True, rerank_damping=OF_PART).settings["unit"]["directions"]
        ratio = answer.settings["unit"]["directions"] / of_part
        assert ratio == pytest.approx(directions[OF_STAGE] / directions[OF_PART], rel=1e-5)
        assert ratio > 1.5
        hit = answer.results[0].hits[0]
        assert hit.nats == pytest.approx(hit.score * answer.settings["unit"]["factor"])


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_scores_in_the_metric_of_adam(folder: Path, adam: dict[str, torch.Tensor], metric: str) -> None:
    """Each row alone by autograd in float64, times 1/√V; of V's rows and columns, as the head of adam.py has it."""
    encoder, model, gradients, vals = alone(folder, "adam")
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for layer in encoder.plan.layers:
        v_OI = gradient_matrix(model, layer.block.name, adam)
        rank_one_OI = torch.outer(v_OI.mean(1), v_OI.mean(0)) / v_OI.mean()
        matrices = torch.stack([gradient_matrix(model, layer.block.name, gradient) for gradient in gradients])
        gram += (matrices / rank_one_OI.sqrt()).flatten(1) @ matrices.flatten(1).t()
    scores = gram[:vals, vals:]
    if metric == "cosine":
        lengths = gram.diagonal().sqrt()
        scores = scores / lengths[:vals, None] / lengths[None, vals:]
    for ranking, wanted in zip(ask(folder, "adam", metric=metric, each=True).results, scores.numpy(), strict=True):
        found = by_row(ranking.hits)
        assert len(found) == len(wanted)
        order = sorted(found)
        np.testing.assert_allclose([found[row] for row in order], wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_a_few_candidates(folder: Path) -> None:
    """Those of the first stage, in the order of the exact scores."""
    first = ask(folder, rerank=None, top_k=8, bottom_k=4, each=True)
    everything, few = ask(folder, each=True), ask(folder, rerank=8, top_k=3, bottom_k=2, each=True)
    for all_rows, ranking, coarse in zip(everything.results, few.results, first.results, strict=True):
        scores = by_row(all_rows.hits)
        candidates = sorted(by_row(coarse.hits), key=lambda row: -scores[row])
        assert list(by_row(ranking.hits)) == candidates[:3]
        assert len(ranking.bottom) == 2


def test_conjugate_gradients_begin_in_the_metric(folder: Path) -> None:
    """The first step goes in the direction of the part's metric; later ones elsewhere."""
    exact = ask(folder, each=True, rerank_damping=OF_PART)
    notes = Notes()
    first, third = (
        ask(folder, each=True, progress=notes, rerank_with="cg", cg_steps=steps, rerank_samples=6) for steps in (1, 3)
    )
    assert third.settings["cg_steps"] == 3
    assert third.settings["unit"] is None
    assert third.settings["rerank_damping"] > 0
    assert any("3 steps of conjugate gradients for 4 queries on 6 rows" in note for note in notes.said)
    assert any("before it 1 step of conjugate" in note for note in notes.said)
    words = "preconditioned by the Gauss-Newton matrix of 6 rows (3 steps of conjugate gradients)"
    assert metric_words(third.settings) == f"dot, {words}"
    for ranking, same, other in zip(exact.results, first.results, third.results, strict=True):
        scores, begun, moved = (by_row(result.hits) for result in (ranking, same, other))
        a, b, c = (np.array([of[row] for row in scores]) for of in (scores, begun, moved))
        np.testing.assert_allclose(b / np.linalg.norm(b), a / np.linalg.norm(a), atol=1e-4)
        assert np.abs(c / np.linalg.norm(c) - a / np.linalg.norm(a)).max() > 1e-3


def test_no_more_rows_than_there_are(folder: Path) -> None:
    notes = Notes()
    ways = {"top_k": 1, "bottom_k": 1, "rerank": 2, "rerank_with": "cg", "cg_steps": 1, "rerank_samples": 10_000}
    answer = ask(folder, progress=notes, **ways)
    assert answer.settings["rerank_samples"] == ROWS - 1
    assert any(f"for 1 query on {ROWS - 1} rows, about" in note for note in notes.said)


@pytest.mark.slow
def test_measured_eigenvalues(folder: Path) -> None:
    """Another order than K-FAC's, near it; cosines of rows with themselves are below or at 1."""
    exact, measured = (ask(folder, each=True, metric="cosine", rerank_with=way) for way in ("exact", "ekfac"))
    assert measured.settings["rerank_damping"] == OF_STAGE
    for ranking, other in zip(exact.results, measured.results, strict=True):
        scores, moved = by_row(ranking.hits), by_row(other.hits)
        a, b = (np.array([of[row] for row in scores]) for of in (scores, moved))
        assert 0.3 < np.corrcoef(a, b)[0, 1] < 0.9999
        assert np.abs(b).max() <= 1 + 1e-5


@pytest.mark.thin(3)
@pytest.mark.usefixtures("adam")
@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("plain", {"rerank_with": "ekfac"}, "part 'plain' has none: give `rerank_with=exact`"),
        ("adam", {"rerank_with": "ekfac"}, "part 'adam' has none: give `rerank_with=exact`"),
        ("kfac", {"rerank_with": "cg", "metric": "cosine"}, "Give `metric=dot`"),
        ("plain", {"rerank_with": "cg", "metric": None}, "Give `metric=dot`"),
        ("kfac", {"rerank_with": "cg", "rerank": None}, "belongs to `rerank`"),
        ("kfac", {"cg_steps": 4}, "`cg_steps` belongs to `rerank` with `rerank_with=cg`"),
        ("kfac", {"rerank_with": "ekfac", "cg_steps": 4}, "`cg_steps` belongs to `rerank` with `rerank_with=cg`"),
        ("kfac", {"rerank_samples": 4}, "`rerank_samples` belongs to `rerank` with `rerank_with=ekfac`"),
        ("kfac", {"rerank_with": "cg", "rerank_damping": 0.0}, "`rerank_damping` must be more than 0"),
        ("plain", {"rerank_damping": 0.1}, "is of K-FAC's factors, and part 'plain' has none: leave it out"),
        ("kfac", {"rerank_with": "vectors", "rerank_damping": 0.1}, "belongs to `rerank` with whole gradients"),
        ("kfac", {"rerank_with": "cg", "cg_steps": 0}, "`cg_steps` must be at least 1"),
        ("plain", {"precondition": "second-moment"}, "built with `precondition=kronecker`"),
    ],
)
def test_refused(folder: Path, part: str, settings: dict[str, Any], message: str) -> None:
    """Before a model is looked for."""
    with pytest.raises(UsageError, match=message):
        ask(folder, part, checkpoint="nowhere", **settings)
