"""The theoretical curves against the projections themselves, on random gradients: drawn many times, they must meet."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ghoststore.errors import UsageError
from indexer.projection import draws
from indexer.projection.sketch import Sketch
from query.exact.products import Products
from query.fidelity.dense import DenseProjection
from query.fidelity.theory import BlockMoments, PairMoments, dense_error, kronecker_error

OUT, IN = 12, 9
DRAWS = 3000


def gradients(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("numbers", [8, 64, 512])
def test_dense_errors_lie_on_the_curve(numbers: int) -> None:
    """Random gradients of 3,000 numbers, projected by the naive projection: mean |error| = √(2/(πk)) |g||h|."""
    vals, rows = gradients(12, 3000, seed=1), gradients(60, 3000, seed=2)
    truth = Products.of(vals.double(), rows.double())
    means = []
    for seed in range(8):
        project = DenseProjection(numbers, 3000, seed)
        found = Products.of(*(project([list(one.split([1000, 2000])) for one in some]) for some in (vals, rows)))
        means.append(float((np.abs(found.dots_QR - truth.dots_QR) / truth.lengths).mean()))
    assert np.mean(means) == pytest.approx(dense_error(numbers), rel=0.06)
    assert dense_error(numbers) == pytest.approx(math.sqrt(2 / (math.pi * numbers)))


def test_two_dense_projections_differ_by_both_their_errors() -> None:
    vals, rows = gradients(12, 2000, seed=1), gradients(60, 2000, seed=2)
    means = []
    for seed in range(6):
        one, other = (
            Products.of(*(DenseProjection(k, 2000, 10 * seed + k)([[g] for g in some]) for some in (vals, rows)))
            for k in (32, 128)
        )
        truth = Products.of(vals.double(), rows.double())
        means.append(float((np.abs(one.dots_QR - other.dots_QR) / truth.lengths).mean()))
    assert np.mean(means) == pytest.approx(dense_error(32, 128), rel=0.08)


def kronecker_products(g: torch.Tensor, h: torch.Tensor, k_out: int, k_in: int) -> np.ndarray:
    """⟨PGPᵀ, PHPᵀ⟩ of as many draws."""
    n_out, n_in = g.shape
    found = []
    for draw in range(DRAWS):
        p_out = torch.from_numpy(draws.gaussian(f"out {draw}", k_out, n_out)) if k_out < n_out else torch.eye(n_out)
        p_in = torch.from_numpy(draws.gaussian(f"in {draw}", k_in, n_in)) if k_in < n_in else torch.eye(n_in)
        found.append(float(((p_out @ g @ p_in.t()) * (p_out @ h @ p_in.t())).sum()))
    return np.array(found)


@pytest.mark.thin(3)
@pytest.mark.parametrize(("k_out", "k_in"), [(2, 2), (4, 3), (8, 2), (OUT, 3), (4, IN), (OUT, IN)])
@pytest.mark.parametrize("kind", ["random", "correlated", "rank-one"])
def test_kronecker_variance_is_that_of_the_draws(kind: str, k_out: int, k_in: int) -> None:
    g, h = gradients(2, OUT, IN, seed=3)
    if kind == "correlated":
        h = g + 0.5 * h
    if kind == "rank-one":
        g, h = torch.outer(g[:, 0], g[0]), torch.outer(g[:, 0] + h[:, 0], h[0])
    moments = BlockMoments.of(g, h)
    found = kronecker_products(g, h, k_out, k_in)
    variance = moments.variance(k_out, k_in)
    if (k_out, k_in) == (OUT, IN):
        assert variance == 0
        assert found.std() == pytest.approx(0, abs=1e-4)
        return
    fourth = float(np.mean((found - found.mean()) ** 4))
    error = math.sqrt(max(fourth - variance**2, 0) / DRAWS)  # standard error of a variance
    assert abs(found.var() - variance) < 5 * error
    assert abs(found.mean() - moments.dot) < 5 * math.sqrt(variance / DRAWS)


def test_self_product_of_a_rank_one_gradient() -> None:
    """Var‖Pg‖² / ‖g‖⁴ = (1 + 2/r)² - 1."""
    g = torch.outer(*gradients(2, OUT, seed=4)).double()
    moments = BlockMoments.of(g, g)
    for r in (1, 2, 5):
        assert moments.variance(r, r) / moments.squares == pytest.approx((1 + 2 / r) ** 2 - 1)


def test_either_axis_may_be_the_longer() -> None:
    g, h = gradients(2, OUT, IN, seed=5)
    there, back = BlockMoments.of(g, h), BlockMoments.of(g.t(), h.t())
    assert there.variance(3, 2) == pytest.approx(back.variance(2, 3))


def test_blocks_and_sketch_add_up() -> None:
    """Two blocks, then a sketch of both: the draws' standard deviation, to what an approximation owes."""
    pairs = [gradients(2, OUT, IN, seed=6), gradients(2, IN, OUT, seed=7)]
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    pair = PairMoments.of(first, second)
    exact = sum(float((g * h).sum()) for g, h in zip(first, second, strict=True))
    ranks, kept = [(6, 6), (6, 6)], 24
    plain, sketched = [], []
    for draw in range(DRAWS // 2):
        blocks: list[list[torch.Tensor]] = [[], []]
        for place, (g, h) in enumerate(zip(first, second, strict=True)):
            p_out, p_in = (torch.from_numpy(draws.gaussian(f"{draw} {place} {n}", 6, n)) for n in g.shape)
            for side, matrix in enumerate((g, h)):
                blocks[side].append((p_out @ matrix @ p_in.t()).flatten())
        u, v = (torch.cat(side).unsqueeze(0) for side in blocks)
        plain.append(float((u * v).sum()) - exact)
        sketch = Sketch(f"{draw}", u.shape[1], kept)
        sketched.append(float((sketch(u) * sketch(v)).sum()) - exact)
    assert kronecker_error([pair], ranks, None) == pytest.approx(np.std(plain) / pair.lengths, rel=0.08)
    assert kronecker_error([pair], ranks, kept) == pytest.approx(np.std(sketched) / pair.lengths, rel=0.15)


def test_dense_projection_does_not_depend_on_its_batch() -> None:
    some = gradients(3, 500)
    project = DenseProjection(16, 500, 0)
    together, alone = project([[g] for g in some]), torch.cat([project([[g]]) for g in some])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, DenseProjection(16, 500, 1)([[g] for g in some]))
    with pytest.raises(UsageError, match="a dense matrix of"):
        DenseProjection(1 << 20, 1 << 30, 0)
    with pytest.raises(UsageError, match="at least one number"):
        DenseProjection(0, 10, 0)
