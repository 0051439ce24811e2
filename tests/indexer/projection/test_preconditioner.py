"""Factors and their inverse roots against dense matrices; keeping, flattening, digests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from indexer.projection.kfac import MOST_DIRECTIONS, KroneckerPreconditioner, MomentFactor, directions, flat_length

DAMPING = 0.1


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(n: int, m: int | None = None, rest: float = 0.0, seed: int = 0) -> MomentFactor:
    m = n if m is None else m
    vectors = torch.linalg.qr(numbers(n, n, seed=seed)).Q[:, :m].t()
    values = torch.linspace(2.0, 0.5, m).square() * 3e-7
    return MomentFactor(vectors.float().contiguous(), values.float(), rest)


def dense(one: MomentFactor) -> Tensor:
    vectors, values = one.vectors.double(), one.values.double()
    outside = torch.eye(vectors.shape[1], dtype=torch.float64) - vectors.t() @ vectors
    return vectors.t() * values @ vectors + one.rest * outside


def inverse_root(matrix: Tensor, damping: float) -> Tensor:
    """(F / mean + damping)^-½ by eigenvectors."""
    n = len(matrix)
    values, vectors = torch.linalg.eigh(matrix / (matrix.trace() / n) + damping * torch.eye(n, dtype=matrix.dtype))
    return vectors * values.rsqrt() @ vectors.t()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("damping", [1e-3, 0.1, 5.0])
@pytest.mark.parametrize(
    ("n", "m", "rest"), [(1, 1, 0.0), (12, 12, 0.0), (12, 5, 1e-7), (200, 128, 2e-8), (12, 5, 0.0)]
)
def test_root_times_is_the_dense_inverse_root(n: int, m: int, rest: float, damping: float) -> None:
    one = factor(n, m, rest)
    assert one.mean == pytest.approx(float(dense(one).trace()) / n, rel=1e-5)
    rows = numbers(7, n, seed=1)
    close(one.root_times(rows, damping), rows @ inverse_root(dense(one), damping))
    assert one.root_times(rows.float(), damping).dtype == torch.float32
    assert one.root_times(rows.half(), damping).dtype == torch.float16


def test_large_damping_leaves_directions_alone() -> None:
    rows = numbers(3, 12)
    close(factor(12).root_times(rows, 1e8) * 1e4, rows, 1e-4)


def test_a_factor_of_equal_values_scales_alone() -> None:
    one = MomentFactor(torch.eye(6)[:2], torch.full((2,), 4.0), 4.0)
    rows = numbers(3, 6)
    close(one.root_times(rows, DAMPING), rows * 1.1**-0.5)


@pytest.mark.parametrize("n", [1, 40, MOST_DIRECTIONS, MOST_DIRECTIONS + 1, 300])
def test_flat_and_back(n: int) -> None:
    one = factor(n, directions(n), rest=0.25 if n > MOST_DIRECTIONS else 0.0)
    flat = one.flat()
    assert flat.dtype == torch.float32
    assert len(flat) == flat_length(n)
    again = MomentFactor.of_flat(flat, n)
    assert torch.equal(again.vectors, one.vectors)
    assert torch.equal(again.values, one.values)
    assert again.rest == one.rest
    with pytest.raises((ValueError, RuntimeError)):
        MomentFactor.of_flat(flat[:-1], n)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (300, 300), (300, 128), (40, 40)])
def test_leading_keeps_the_trace(n: int, m: int) -> None:
    one = factor(n, m, rest=1e-8 if m < n else 0.0)
    kept = one.leading()
    assert len(kept.vectors) == len(kept.values) == directions(n)
    assert kept.mean == pytest.approx(one.mean, rel=1e-6)
    assert torch.equal(kept.vectors, one.vectors[: directions(n)])
    assert torch.equal(kept.values, one.values[: directions(n)])
    if m == directions(n):
        assert kept is one


def pair(n_in: int = 5, n_out: int = 9, seed: int = 0) -> tuple[MomentFactor, MomentFactor]:
    """Of one layer: traces agree."""
    f_in, f_out = factor(n_in, seed=seed), factor(n_out, seed=seed + 1)
    ratio = f_in.mean * n_in / (f_out.mean * n_out)
    return f_in, replace(f_out, values=f_out.values * ratio, rest=f_out.rest * ratio)


def test_a_matrix_in_the_metric_is_the_inverse_root_of_h() -> None:
    """H = F_out ⊗ F_in / E|G|²: with hardly any damping products of two are gᵀ H⁻¹ g'."""
    found = KroneckerPreconditioner({"layer": pair()}, 1e-6)
    f_in, f_out = (dense(one) for one in pair())
    h = torch.kron(f_out, f_in) / f_in.trace()
    one, other = numbers(9, 5, seed=3), numbers(9, 5, seed=4)
    expected = float(one.flatten() @ torch.linalg.solve(h, other.flatten()))
    products = float((found.matrix("layer", one) * found.matrix("layer", other)).sum())
    assert products == pytest.approx(expected, rel=1e-4)


def test_sides_project_the_matrix_in_the_metric() -> None:
    found = KroneckerPreconditioner({"layer": pair(seed=7)}, DAMPING)
    g_OI, p_in, p_out = numbers(9, 5), numbers(3, 5, seed=1), numbers(4, 9, seed=2)
    side_in, side_out = found.sides("layer", p_in, p_out)
    close(side_out @ g_OI @ side_in.t(), p_out @ found.matrix("layer", g_OI) @ p_in.t(), 1e-9)
    f_in, f_out = (dense(one) for one in found.factors["layer"])
    scale = float(f_in.trace() / 45) ** -0.5
    close(found.matrix("layer", g_OI), inverse_root(f_out, DAMPING) @ g_OI @ inverse_root(f_in, DAMPING) * scale)


def test_gradients_have_about_one_as_numbers() -> None:
    """Whatever their size was."""
    generator = torch.Generator().manual_seed(0)
    for size in (1e-6, 1e4):
        g_ROI = size * torch.randn(400, 9, 5, generator=generator, dtype=torch.float64)
        factors = []
        for second in ((g_ROI.mT @ g_ROI).mean(0), (g_ROI @ g_ROI.mT).mean(0)):
            values, vectors = torch.linalg.eigh(second)
            factors.append(MomentFactor(vectors.t().flip(0).float(), values.flip(0).float(), 0.0))
        found = KroneckerPreconditioner({"layer": (factors[0], factors[1])}, 1e-3)
        mean = torch.stack([found.matrix("layer", g_OI) for g_OI in g_ROI]).square().mean()
        assert float(mean) == pytest.approx(1, rel=0.05)


def test_the_digest_depends_on_everything() -> None:
    (f_in, f_out), other = pair(), pair(seed=5)
    found = [
        KroneckerPreconditioner(factors, damping).digest()
        for factors, damping in (
            ({"layer": (f_in, f_out)}, DAMPING),
            ({"layer": (f_in, f_out)}, 0.2),
            ({"other": (f_in, f_out)}, DAMPING),
            ({"layer": other}, DAMPING),
            ({"layer": (replace(f_in, rest=1.0), f_out)}, DAMPING),
            ({"layer": (f_in, f_out), "other": other}, DAMPING),
        )
    ]
    assert len(set(found)) == len(found)
    assert all(one.startswith("sha256:") for one in found)
    assert found[0] == KroneckerPreconditioner({"layer": pair()}, DAMPING).digest()


@pytest.mark.parametrize("m", [12, 5])
def test_the_mean_square_of_a_block_is_that_of_gradients_with_the_moment_of_the_factors(m: int) -> None:
    f_in, f_out = factor(12, m, rest=0.0 if m == 12 else 1e-7), factor(7, seed=3)
    f_out = MomentFactor(f_out.vectors, f_out.values * float(dense(f_in).trace() / dense(f_out).trace()), 0.0)
    preconditioner = KroneckerPreconditioner({"layer": (f_in, f_out)}, DAMPING)
    side_in, side_out = preconditioner.sides("layer", numbers(4, 12, seed=5).float(), numbers(3, 7, seed=6).float())
    both = torch.kron(side_out.double(), side_in.double())
    moment = torch.kron(dense(f_out), dense(f_in)) / dense(f_in).trace()
    expected = float((both @ moment @ both.t()).trace()) / (3 * 4)
    assert preconditioner.mean_square("layer", side_in, side_out) == pytest.approx(expected, rel=1e-4)
