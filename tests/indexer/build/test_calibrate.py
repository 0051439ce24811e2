"""What is learned from a sample, against second moments by batch-of-one autograd; which samples, which rows, refusals.

Legend: R rows, O, I axes of a gradient matrix, K, J ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from ghoststore.corpus import Sample
from ghoststore.errors import CorpusError, LayerError
from ghoststore.progress import Silent
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.store.part.status import Status
from indexer.build import calibrate as module
from indexer.build.calibrate import axis_lengths, calibrate, learning_bytes
from indexer.build.leading import Leading
from indexer.encode.encoder import RowEncoder
from indexer.encode.tokens import Row
from indexer.projection.adam import SideScales
from indexer.projection.calibration import Calibration
from indexer.projection.kfac import MomentFactor
from indexer.projection.plan import ProjectionPlan
from tests.support.models import POSITIONS, VOCABULARY, settle
from tests.support.oracle import gradient_matrix, gradients_of

LAYERS = ("mlp", "attn", "norm")


def small() -> Any:
    """Every axis of its mlp, attention and norms is at most 64 long."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=12, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return settle(GPT2LMHeadModel(config))


def row(place: int, tokens: Any, status: Status = Status.OK) -> Row:
    sample = Sample(place, f"{place}", None, "text", -1, 0)
    return Row(sample, 0, 0, np.asarray(tokens, dtype=np.int32), 1, status)


def some_rows(count: int = 9) -> list[Row]:
    rng = np.random.default_rng(0)
    return [row(place, rng.integers(1, VOCABULARY, rng.integers(2, 20))) for place in range(count)]


def plan_of(model: Any, **settings: Any) -> ProjectionPlan:
    config = ProjectionConfig(**{"layers": LAYERS, "rank_total": 12} | settings)
    return ProjectionPlan.for_model(model, config)


def learn(model: Any, plan: ProjectionPlan, rows: list[Row], **settings: Any) -> Calibration:
    given: dict[str, Any] = {"reduction": "mean", "batch_tokens": 60, "scales": None, "progress": Silent()} | settings
    return calibrate(model, plan, rows, **given)


def by_hand(plan: ProjectionPlan, rows: list[Row]) -> dict[str, Tensor]:
    """(R, O, I) float64 gradient matrices by block name, each row alone."""
    model = small().double()
    found: dict[str, list[Tensor]] = {layer.block.name: [] for layer in plan.layers}
    for one in rows:
        ids = torch.from_numpy(one.tokens).long().unsqueeze(0)
        gradients = gradients_of(model, model(input_ids=ids, labels=ids).loss)
        for layer in plan.layers:
            found[layer.block.name].append(gradient_matrix(model, layer.block.name, gradients))
    return {name: torch.stack(matrices) for name, matrices in found.items()}


def moments(g_ROI: Tensor) -> tuple[Tensor, Tensor]:
    """(E[Gᵀ G], E[G Gᵀ])."""
    return (g_ROI.mT @ g_ROI).mean(0), (g_ROI @ g_ROI.mT).mean(0)


def dense(factor: MomentFactor) -> Tensor:
    """With the rest spread evenly over the other directions."""
    vectors, values = factor.vectors.double(), factor.values.double()
    n = vectors.shape[1]
    return vectors.t() * (values - factor.rest) @ vectors + factor.rest * torch.eye(n, dtype=torch.float64)


def factors_of(learned: Calibration) -> Mapping[str, tuple[MomentFactor, MomentFactor]]:
    assert learned.preconditioner is not None
    return learned.preconditioner.factors


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm()) <= tolerance * float(expected.norm())


def test_factors_are_second_moments() -> None:
    model, rows = small(), some_rows()
    plan = plan_of(model, precondition="kronecker")
    learned = learn(model, plan, rows)
    assert learned.samples == len(rows)
    assert learned.shares is None
    gradients = by_hand(plan, rows)
    assert {layer.block.type for layer in plan.layers} == {"conv1d", "layernorm"}
    for name, pair in factors_of(learned).items():
        for factor, expected in zip(pair, moments(gradients[name]), strict=True):
            same(dense(factor), expected)


def test_sides_hold_the_inverse_roots() -> None:
    """P (F / mean + damping)^-½ by eigenvectors of the moments; the scale is that of H = F_out ⊗ F_in / E|G|²."""
    model, rows = small(), some_rows()
    plan = plan_of(model, precondition="kronecker", damping=0.3, rank_total="full", compress="none")
    learned = learn(model, plan, rows)
    assert learned.sides is not None
    for name, g_ROI in by_hand(plan, rows).items():
        m_in, m_out = moments(g_ROI)
        energy = float(m_in.trace())
        roots = []
        for moment in (m_in, m_out):
            values, vectors = torch.linalg.eigh(moment / moment.trace() * len(moment))
            roots.append(vectors * (values.clamp_min(0) + 0.3).rsqrt() @ vectors.t())
        scale = (energy / (len(m_in) * len(m_out))) ** -0.5
        for side, expected in zip(learned.sides[name], (roots[0], roots[1] * scale), strict=True):
            same(side, expected, 1e-3)


@pytest.mark.thin(1)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_principal_sides_are_leading_eigenvectors(scaled: bool) -> None:
    model, rows = small(), some_rows(30)
    plan = plan_of(model, kind="pca", precondition="none")
    generator, scales = torch.Generator().manual_seed(5), None
    if scaled:
        scales = {
            layer.block.name: SideScales(
                1e3 * (0.1 + torch.rand(layer.block.n_in, generator=generator)),
                0.1 + torch.rand(layer.block.n_out, generator=generator),
            )
            for layer in plan.layers
        }
    learned = learn(model, plan, rows, scales=scales)
    gradients = by_hand(plan, rows)
    assert learned.preconditioner is None
    assert learned.sides is not None
    for layer in plan.layers:
        g_ROI = gradients[layer.block.name]
        if scales is not None:
            pair = scales[layer.block.name]
            g_ROI = g_ROI * pair.scale_out.double().unsqueeze(1) * pair.scale_in.double()
        for side, moment in zip(learned.sides[layer.block.name], moments(g_ROI), strict=True):
            rows_KN = side.double()
            torch.testing.assert_close(rows_KN @ rows_KN.t(), torch.eye(len(side)).double(), rtol=0, atol=1e-5)
            best = torch.linalg.eigvalsh(moment)[-len(side) :].flip(0)
            captured = torch.einsum("kn,nm,km->k", rows_KN, moment, rows_KN)
            torch.testing.assert_close(captured, best, rtol=1e-4, atol=1e-5 * float(best[0]))
            assert bool((rows_KN.gather(1, rows_KN.abs().argmax(1, keepdim=True)) > 0).all())


@pytest.mark.parametrize(
    "settings", [{}, {"kind": "pca", "precondition": "none"}, {"precondition": "none"}], ids=["default", "pca", "plain"]
)
def test_the_axes_that_an_estimate_counts_are_those_that_are_learned(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = small(), list[tuple[int, int]]()
    plan, whole = plan_of(model, **settings), Leading.__init__

    def begun(self: Leading, n: int, k: int, *rest: Any) -> None:
        made.append((n, k))
        whole(self, n, k, *rest)

    monkeypatch.setattr(Leading, "__init__", begun)
    if plan.calibrated:
        learn(model, plan, some_rows())
    assert sorted(axis_lengths(plan)) == sorted(made)


def test_order_batches_and_unusable_rows_do_not_matter() -> None:
    model, rows = small(), some_rows()
    plan = plan_of(model, precondition="kronecker")
    wanted = factors_of(learn(model, plan, rows))
    mixed = [row(50, [], Status.EMPTY), *reversed(rows), row(51, [4], Status.TOO_SHORT)]
    for others, tokens in ((rows, 1), (rows, 10_000), (mixed, 45)):
        learned = learn(model, plan, others, batch_tokens=tokens)
        assert learned.samples == len(rows)
        for name, pair in factors_of(learned).items():
            for factor, expected in zip(pair, wanted[name], strict=True):
                same(dense(factor), dense(expected), 1e-5)
    again = learn(model, plan, rows)
    assert again.digest() == learn(model, plan, rows).digest()


def test_few_blocks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = small(), some_rows()
    plan = plan_of(model, precondition="kronecker")
    wanted = factors_of(learn(model, plan, rows))
    monkeypatch.setattr(module, "BYTES_AT_ONCE", 1)
    together, hand_over = set[int](), RowEncoder.hand_over

    def seen(encoder: RowEncoder, rows: Sequence[Row], take: Any) -> Tensor:
        together.add(len(rows))
        return hand_over(encoder, rows, take)

    monkeypatch.setattr(RowEncoder, "hand_over", seen)
    for name, pair in factors_of(learn(model, plan, rows)).items():
        for factor, expected in zip(pair, wanted[name], strict=True):
            same(dense(factor), dense(expected), 1e-5)
    assert together == {1}


def test_a_gpu_takes_more_at_once_and_the_estimate_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, gib = plan_of(small(), precondition="kronecker"), 1 << 30
    monkeypatch.setattr(module, "total_memory", lambda device: {"cuda:0": 64 * gib, "cuda:1": gib}[device])
    small_one, large, least = (learning_bytes(plan, device) for device in ("cpu", "cuda:0", "cuda:1"))
    assert small_one == least == large - 7 * (2 * gib - module.BYTES_AT_ONCE)


def test_long_axes_are_learned_through_a_drawn_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over seeds the mean of the factors is the moment: a drawn side adds noise and nothing else."""
    model, rows, seeds = small(), some_rows(), 24
    monkeypatch.setattr(module, "DRAWN_RANK", 11)
    monkeypatch.setattr(module, "WHOLE", 11)
    plan, found = plan_of(model, precondition="kronecker", layers=("mlp",)), []
    for seed in range(seeds):
        monkeypatch.setattr(module, "_key", lambda what, seed=seed: f"{seed}|{what}")
        found.append(factors_of(learn(model, plan, rows)))
    for name, g_ROI in by_hand(plan, rows).items():
        for side, expected in enumerate(moments(g_ROI)):
            drawn = torch.stack([dense(factors[name][side]) for factors in found])
            alone = (drawn - expected).flatten(1).norm(dim=1).mean()
            assert 0.03 < float(alone / expected.norm()) < 0.8
            assert float((drawn.mean(0) - expected).norm()) < 1.8 * float(alone) / seeds**0.5


def test_lots_not_batches_have_drawn_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sides are drawn, too, batches do not matter, nor how many rows of a lot share one."""
    monkeypatch.setattr(module, "DRAWN_RANK", 11)
    monkeypatch.setattr(module, "WHOLE", 11)
    model, rows = small(), some_rows(20)
    plan = plan_of(model, precondition="kronecker")
    wanted = factors_of(learn(model, plan, rows))
    for tokens in (1, 40, 10_000):
        for name, pair in factors_of(learn(model, plan, rows, batch_tokens=tokens)).items():
            for factor, expected in zip(pair, wanted[name], strict=True):
                same(dense(factor), dense(expected), 1e-5)
    monkeypatch.setattr(module, "LOTS", 1)
    alone = factors_of(learn(model, plan, rows))
    assert all(
        float((dense(factor) - dense(expected)).norm()) > 1e-3 * float(dense(expected).norm())
        for name, pair in alone.items()
        for factor, expected in zip(pair, wanted[name], strict=True)
        if factor.vectors.shape[1] > 2 and not name.endswith(("ln_1", "ln_2", "ln_f"))
    )


@pytest.mark.parametrize("longest", [64, 11], ids=["whole", "drawn"])
def test_rows_that_are_not_finite_are_left_out(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the build leaves them out; the others are learned from all the same, with the sides that they had."""
    monkeypatch.setattr(module, "DRAWN_RANK", 11)
    monkeypatch.setattr(module, "WHOLE", longest)
    model, rows = small(), some_rows()
    plan = plan_of(model, precondition="kronecker", compress=20)
    odd = VOCABULARY - 1
    for one in rows:
        one.tokens[one.tokens == odd] = 1
    wanted = learn(model, plan, rows)
    with torch.no_grad():
        model.transformer.wte.weight[odd] = torch.nan
        model.lm_head.weight = torch.nn.Parameter(small().lm_head.weight.detach())
    learned = learn(model, plan, [*rows, row(70, [3, odd, 4]), row(71, [odd, 4, 5, 6])])
    assert learned.samples == len(rows)
    assert learned.shares is not None
    assert wanted.shares is not None
    assert learned.shares.sizes == wanted.shares.sizes
    for name, pair in factors_of(learned).items():
        for factor, expected in zip(pair, factors_of(wanted)[name], strict=True):
            same(dense(factor), dense(expected), 1e-5)
    with pytest.raises(LayerError, match="the gradients are not finite"):
        learn(model, plan, [row(70, [3, odd, 4])])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_row_of_which_one_of_loss_and_gradient_is_not_finite(what: str) -> None:
    model, rows, odd = small(), some_rows(), VOCABULARY - 1
    plan = plan_of(model, precondition="kronecker")
    for one in rows:
        one.tokens[one.tokens == odd] = 1

    def without_word(module: Any, args: Any, logits: Tensor) -> Tensor:
        return logits.index_fill(2, torch.tensor([odd]), -torch.inf)  # as a target: an infinite loss, finite gradients

    def steep(module: Any, args: Any, y: Tensor) -> Tensor:
        """``y`` and, where a row has the word, a gradient of 0 · ∞."""
        flat_B11 = (ids[-1] == odd).any(1).view(-1, 1, 1)
        return y + torch.where(flat_B11, y * 0, torch.ones_like(y)).sqrt() - (~flat_B11).to(y.dtype)

    ids: list[Tensor] = []
    if what == "loss":
        model.lm_head.register_forward_hook(without_word)
    else:
        model.transformer.wte.register_forward_pre_hook(lambda module, args: ids.append(args[0]))
        model.transformer.h[0].mlp.register_forward_hook(steep)
    wanted = learn(model, plan, rows)
    learned = learn(model, plan, [*rows, row(70, [3, 4, odd])])
    assert learned.samples == wanted.samples == len(rows)
    for name, pair in factors_of(learned).items():
        for factor, expected in zip(pair, factors_of(wanted)[name], strict=True):
            same(dense(factor), dense(expected), 1e-5)


def test_no_row_is_padded_where_that_changes_others() -> None:
    model, seen = small(), list[bool]()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(bool(kwargs["attention_mask"].all())), with_kwargs=True
    )
    learn(model, plan_of(model, precondition="kronecker"), some_rows(), padding=False)
    assert seen
    assert all(seen)


def test_nothing_to_learn_from() -> None:
    model = small()
    plan = plan_of(model, precondition="kronecker", layers=("mlp",))
    with pytest.raises(CorpusError, match="none of the 2 samples"):
        learn(model, plan, [row(0, [], Status.EMPTY), row(1, [3], Status.TOO_SHORT)])
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight.zero_()
    dead = "transformer.h.0.mlp.c_fc"
    with pytest.raises(LayerError, match=rf"layer '{dead}'.*`exclude_layers` '{dead}'"):
        learn(model, plan, some_rows())
    others = plan_of(model, precondition="kronecker", layers=("mlp",), exclude_layers=("c_fc",))
    assert learn(model, others, some_rows()).samples == 9


@pytest.mark.parametrize("kind", ["gaussian", "pca"])
def test_sizes_follow_the_energy_of_blocks(kind: str) -> None:
    model, rows = small(), some_rows()
    plan = plan_of(model, kind=kind, precondition="none", compress_by="layer", compress=40)
    learned = learn(model, plan, rows)
    assert learned.shares is not None
    assert sum(learned.shares.sizes) == 40
    assert (sum(map(len, learned.shares.kept)) > 0) == (kind == "pca")
    energies = [float(g_ROI.square().sum((1, 2)).mean()) for g_ROI in by_hand(plan, rows).values()]
    largest = int(np.argmax(energies))
    assert learned.shares.sizes[largest] == max(learned.shares.sizes)
