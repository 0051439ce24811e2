"""Leading eigenvectors of a mean that goes by, and the choice of the samples that are learned from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ghoststore.corpus import Sample
from indexer.build.corpus_plan import LearningSample
from indexer.build.leading import Leading, drawn_directions

CPU = torch.device("cpu")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fed(y_NC: Tensor, k: int, terms: int, lots: int = 3, device: torch.device = CPU) -> Leading:
    """A Leading that has seen the columns lot by lot, as ``terms`` terms in all."""
    found = Leading(len(y_NC), k, drawn_directions("key", len(y_NC), k, device), device)
    for place, lot in enumerate(y_NC.to(device).chunk(lots, dim=1)):
        found.add(lot, terms - (lots - 1) if place == 0 else 1)
    return found


def mean_of(y_NC: Tensor, terms: int) -> Tensor:
    return y_NC.double() @ y_NC.double().t() / terms


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (30, 10), (30, 30), (64, 2), (200, 70)])
def test_exact_where_every_direction_is_followed(n: int, k: int) -> None:
    y_NC = numbers(n, 3 * n) * torch.linspace(1, 3, n).unsqueeze(1)
    factor = fed(y_NC, k, 50).factor()
    moment = mean_of(y_NC, 50)
    values, vectors = torch.linalg.eigh(moment)
    assert factor.vectors.dtype == factor.values.dtype == torch.float32
    torch.testing.assert_close(factor.values.double(), values.flip(0)[:k], rtol=1e-4, atol=0)
    torch.testing.assert_close(factor.vectors @ factor.vectors.t(), torch.eye(k), rtol=0, atol=1e-5)
    gap = float((values.diff().min() if n > 1 else values[0]) / values[-1])
    if gap > 1e-4:
        cosines = (factor.vectors.double() * vectors.flip(1)[:, :k].t()).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(k).double(), rtol=0, atol=1e-3)
    rest = float(values.flip(0)[k:].mean()) if k < n else 0.0
    assert factor.rest == pytest.approx(rest, rel=1e-3, abs=1e-6 * float(values[-1]))
    assert factor.mean == pytest.approx(float(moment.trace()) / n, rel=1e-5)
    assert bool((factor.vectors.gather(1, factor.vectors.abs().argmax(1, keepdim=True)) > 0).all())


@pytest.mark.parametrize(("decay", "share"), [(0.5, 0.97), (1.0, 0.99), (2.0, 0.9999)])
def test_nearly_all_energy_where_the_spectrum_falls(decay: float, share: float) -> None:
    n, k = 400, 32
    basis = torch.linalg.qr(numbers(n, n, seed=1)).Q
    y_NC = basis * torch.arange(1, n + 1).float().pow(-decay)
    factor = fed(y_NC, k, 1 + 2).factor()
    moment = mean_of(y_NC, 3)
    captured = float(torch.einsum("kn,nm,km->", factor.vectors.double(), moment, factor.vectors.double()))
    assert captured >= share * float(torch.linalg.eigvalsh(moment)[-k:].sum())
    assert factor.mean == pytest.approx(float(moment.trace()) / n, rel=1e-4)


@pytest.mark.parametrize("n", [20, 100, 300])
def test_fewer_terms_than_eigenvectors(n: int) -> None:
    """The others have the value 0; all are orthonormal all the same. 64 directions are followed: all, most, or few."""
    y_NC = numbers(n, 3)
    factor = fed(y_NC, 12, 3).factor()
    assert int((factor.values > 1e-5 * factor.values[0]).sum()) == 3
    assert float(factor.values.min()) >= 0
    values = torch.linalg.eigvalsh(mean_of(y_NC, 3)).flip(0)[:3]
    torch.testing.assert_close(factor.values[:3].double(), values, rtol=1e-4, atol=0)
    torch.testing.assert_close(factor.vectors @ factor.vectors.t(), torch.eye(12), rtol=0, atol=1e-5)
    assert 0 <= factor.rest <= 1e-6 * float(factor.values[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n", [50, 400])
def test_on_a_gpu_as_on_a_cpu(n: int) -> None:
    y_NC = numbers(n, n) * torch.linspace(1, 3, n).square().unsqueeze(1)
    there, here = (fed(y_NC, 12, 50, device=torch.device(device)).factor() for device in ("cuda", "cpu"))
    assert there.vectors.device == there.values.device == CPU
    torch.testing.assert_close(there.values, here.values, rtol=1e-4, atol=0)
    torch.testing.assert_close(there.vectors, here.vectors, rtol=0, atol=1e-3)
    assert there.rest == pytest.approx(here.rest, rel=1e-4)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, 1e30])
def test_nothing_or_rubbish_is_refused(bad: float) -> None:
    found = Leading(5, 2, drawn_directions("key", 5, 2, CPU), CPU)
    found.add(torch.full((5, 3), bad), 3)
    with pytest.raises(ValueError, match="zero or not finite"):
        found.factor()


def samples(count: int) -> list[Sample]:
    return [Sample(place, f"id-{place}", None, "text", -1, place) for place in range(count)]


def chosen(count: int, rows: list[Sample]) -> list[int]:
    learning = LearningSample(count)
    for sample in rows:
        learning.see(sample)
    return [sample.source_row for sample in learning.samples]


def test_a_draw_depends_on_rows_alone() -> None:
    rows = samples(200)
    first = chosen(20, rows)
    assert len(first) == 20 == len(set(first))
    assert first == sorted(first)
    order = np.random.default_rng(0).permutation(200)
    assert first == chosen(20, [rows[place] for place in order])
    assert set(chosen(19, rows)) < set(first)
    assert [row for row in first if row < 90] == [row for row in chosen(20, rows[:90]) if row in first]


def test_a_small_corpus_is_seen_whole() -> None:
    assert chosen(256, samples(7)) == list(range(7))
    assert chosen(7, samples(7)) == list(range(7))
    assert chosen(5, []) == []


def test_every_row_is_as_likely() -> None:
    counts = np.bincount(np.array(chosen(3000, samples(15000))) // 600, minlength=25)
    assert counts.sum() == 3000
    deviation = (counts - 120) / math.sqrt(600 * 0.2 * 0.8)
    assert np.abs(deviation).max() < 4
    assert 0.5 < deviation.std() < 1.5
