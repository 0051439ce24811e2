"""Draws are functions of their key: the same for ever, on every machine, and scaled without bias."""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ghoststore.settings.projection import DRAWN_KINDS, ProjectionConfig
from indexer.projection import draws
from indexer.projection.matrices import draw_side

KINDS = sorted(draws.KINDS)

KNOWN_ANSWERS = {
    ("gaussian", 1, 1): "7afdad7ca08c739d5afe92707a0b21eafc2023ed541a17e108467e1bdba64014",
    ("gaussian", 3, 7): "e4eb77f4e610245b710c6299f93cea926ed6c29db54e7f2ff0c0427eb2be3da5",
    ("gaussian", 16, 24): "8617b0df2bd0727418f8846169f4cc06ff214619739cacf0c2aafa83931c04ed",
    ("rademacher", 1, 1): "e00e5eb9444182f352323374ef4e08ebcb784725fdd4fd612d7730540b3e0c8c",
    ("rademacher", 3, 7): "882f1f6ad4103814d8c1d7eff98aade17d893b2c21cd90a626c6edbf38408919",
    ("rademacher", 16, 24): "96e873f51c3635bd5de4af88dc20bf7facb2293e424fd2cb6a80370b9d0f7cc4",
    ("orthonormal", 1, 1): "e00e5eb9444182f352323374ef4e08ebcb784725fdd4fd612d7730540b3e0c8c",
    ("orthonormal", 3, 7): "49a0cba66d90054fb785c315d68eeafcf6a65cb466cf1c3a7e7d594527f25983",
    ("orthonormal", 16, 24): "995fa41988b55dc86fffcf0459485ca759269f59d391cdcd0f1103edc7673dd2",
}
"""SHA-256 of the float32 bytes of each kind drawn from "known answer". Stored vectors depend on them."""


def sha256(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize(("kind", "k", "n"), KNOWN_ANSWERS)
def test_a_draw_is_the_same_for_ever(kind: str, k: int, n: int) -> None:
    drawn = draws.KINDS[kind]("known answer", k, n)
    assert drawn.dtype == np.float32
    assert drawn.shape == (k, n)
    assert sha256(drawn) == KNOWN_ANSWERS[kind, k, n]


def test_what_draws_are_made_of_is_the_same_for_ever() -> None:
    assert draws.bits("known answer", 2).tolist() == [10100838307575024083, 9676549459567068436]
    assert sha256(draws.gaussian_table()) == "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"
    assert (
        sha256(draws.permutation("known answer", 1000))
        == "56824ebb34b15258cda58ddabd2bafa279089c0654f60e3ae9d4ef699dd9b63d"
    )
    assert (
        sha256(draws.signs("known answer", 1000)) == "f90ad7849de89c71d61b5ca42cbcf705781e92684fc0b312de13aa58dc69223c"
    )


def test_every_part_of_the_key_of_a_side_matters() -> None:
    base = {"seed": 0, "layer": "h.0", "side": "in", "kind": "gaussian"}
    others = [{"seed": 1}, {"seed": 1001}, {"layer": "h.1"}, {"layer": "h.00"}, {"side": "out"}]
    others += [{"kind": kind} for kind in KINDS if kind != "gaussian"]

    def draw(seed: int, layer: str, side: str, kind: str) -> torch.Tensor:
        return draw_side(ProjectionConfig(seed=seed, kind=kind), layer, side, 4, 9)  # type: ignore[arg-type]

    drawn = [draw(**base)] + [draw(**{**base, **other}) for other in others]
    assert torch.equal(drawn[0], draw(**base))
    for one in range(len(drawn)):
        for other in range(one):
            assert not torch.equal(drawn[one], drawn[other])


def test_no_two_seeds_layers_or_sides_share_a_matrix() -> None:
    # Seeds seed+i and seed+i+1000 must not collide, whatever the number of the layer.
    seen = {
        sha256(draw_side(ProjectionConfig(seed=seed), f"h.{layer}", side, 2, 8).numpy())  # type: ignore[arg-type]
        for seed in (0, 1, 2, 999, 1000, 1001, 1002)
        for layer in range(12)
        for side in ("in", "out")
    }
    assert len(seen) == 7 * 12 * 2


@pytest.mark.parametrize("kind", KINDS)
def test_global_seeds_and_threads_do_not_matter(kind: str) -> None:
    expected = draws.KINDS[kind]("key", 6, 20)
    table = draws.gaussian_table().copy()
    threads = torch.get_num_threads()
    try:
        for seed in (1, 2):
            np.random.seed(seed)
            torch.manual_seed(seed)
            torch.set_num_threads(seed)
            draws.gaussian_table.cache_clear()
            np.testing.assert_array_equal(draws.KINDS[kind]("key", 6, 20), expected)
            np.testing.assert_array_equal(draws.gaussian_table(), table)
    finally:
        torch.set_num_threads(threads)


def test_drawing_leaves_the_global_generators_alone() -> None:
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    for kind in KINDS:
        draws.KINDS[kind]("key", 3, 5)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_the_table_holds_the_quantiles_of_the_normal_distribution() -> None:
    table = draws.gaussian_table().astype(np.float64)
    assert table.shape == (draws.LEVELS,)
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / draws.LEVELS) for i in range(draws.LEVELS)])
    scale = quantiles @ table / (quantiles @ quantiles)
    assert scale == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(table, scale * quantiles, rtol=2e-7)
    np.testing.assert_array_equal(table, -table[::-1])
    assert np.mean(table**2) == pytest.approx(1.0, abs=1e-7)
    assert np.mean(table**4) == pytest.approx(3.0, abs=2e-3)
    assert not draws.gaussian_table().flags.writeable


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_log_exactly_is_the_logarithm(x: float) -> None:
    found = float(draws.log_exactly(np.array([x]))[0])
    assert found == pytest.approx(math.log(x), rel=4e-15, abs=4e-16)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=70))
def test_tree_sum_is_the_sum(numbers: list[float]) -> None:
    exact = math.fsum(numbers)
    bound = 1e-14 * math.fsum(abs(x) for x in numbers)
    assert float(draws.tree_sum(np.array(numbers))) == pytest.approx(exact, rel=0, abs=bound)


@settings(deadline=None)
@given(n=st.integers(1, 70), share=st.floats(0, 1), key=st.text(max_size=8))
def test_orthonormal_rows(n: int, share: float, key: str) -> None:
    k = max(1, round(share * n))
    p = draws.orthonormal(key, k, n).astype(np.float64)
    np.testing.assert_allclose(p @ p.T, np.eye(k) * n / k, atol=3e-7 * n / k * math.sqrt(n))


@given(st.integers(0, 300), st.text(max_size=8))
def test_signs_and_permutations_are_that(count: int, key: str) -> None:
    assert set(np.unique(draws.signs(key, count))) <= {-1.0, 1.0}
    assert len(draws.signs(key, count)) == count
    assert sorted(draws.permutation(key, count)) == list(range(count))


@pytest.mark.thin
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "n"), [(1, 4), (3, 8), (7, 9)])
def test_inner_products_are_unbiased(kind: str, k: int, n: int) -> None:
    # The keys are fixed, so this is no game of chance: 5 standard errors are never crossed by luck.
    keys = 800
    p = np.stack([draws.KINDS[kind](f"{key}", k, n) for key in range(keys)]).astype(np.float64)
    products = np.einsum("skn,skm->snm", p, p)
    error = products.std(0, ddof=1) / math.sqrt(keys)
    difference = np.abs(products.mean(0) - np.eye(n))
    assert np.all(difference <= 5.0 * error + 1e-6)


@pytest.mark.parametrize(("kind", "variance"), [("gaussian", 2.0), ("rademacher", 0.0)])
def test_the_spread_of_a_norm_is_that_of_its_kind(kind: str, variance: float) -> None:
    # Var (PᵀP)_jj = variance / k.
    k, keys = 5, 800
    columns = np.stack([draws.KINDS[kind](f"{key}", k, 3) for key in range(keys)]).astype(np.float64)
    squares = (columns**2).sum(1)
    assert squares.var() == pytest.approx(variance / k, abs=0.06)


def test_every_kind_that_can_be_asked_for_can_be_drawn() -> None:
    assert tuple(draws.KINDS) == DRAWN_KINDS
