"""Products with whole gradients, EK-FAC's metric and conjugate gradients, against plain autograd and dense matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jacrev

from ghoststore.corpus import Sample
from ghoststore.progress import Silent
from ghoststore.store import Status
from indexer.encode.encoder import pad
from indexer.encode.tokens import Row
from indexer.projection.blocks import Block
from indexer.projection.kfac import KroneckerPreconditioner, MomentFactor
from indexer.projection.selection import select_blocks
from query.exact import layer_gradients
from query.exact.eigen_corrected import eigen_corrected
from query.exact.gauss_newton import GaussNewton, conjugate_gradients, mean_eigenvalues
from query.exact.layer_gradients import LayerGradients, Passes
from tests.support.models import CAUSAL, VOCABULARY, gpt2, llama
from tests.support.oracle import gradients_alone

TASK = Silent().task("none", None)
LENGTHS = (5, 9, 3, 9, 6)


def rows_of(lengths: Sequence[int] = LENGTHS) -> list[Row]:
    """Rows of random tokens, one of them with a prompt that is no target."""
    generator = np.random.default_rng(0)
    rows = []
    for place, length in enumerate(lengths):
        tokens = generator.integers(0, VOCABULARY, length).astype(np.int32)
        sample = Sample(source_row=place, id=str(place), domain=None, content="", offset=-1, file=0)
        first = 3 if place == 1 else 1
        rows.append(Row(sample, window=0, window_start=0, tokens=tokens, first_target=first, status=Status.OK))
    return rows


def losses_of(logits: Tensor, labels: Tensor, *, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """Each row's loss in the dtype of the model."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    targets = (labels[:, 1:] != -100).sum(1)
    return losses.sum(1) / (targets if reduction == "mean" else 1), targets


def alone(model: Any, rows: Sequence[Row], reduction: str = "mean") -> list[dict[str, Tensor]]:
    """The gradients of each row, by name."""

    def loss_of(model: Any, place: int) -> Tensor:
        ids, labels, mask = pad([rows[place]])
        return losses_of(model(input_ids=ids, attention_mask=mask).logits, labels, reduction=reduction)[0].sum()

    return gradients_alone(model, len(rows), loss_of)


def product(a: dict[str, Tensor], b: dict[str, Tensor], names: set[str]) -> float:
    return float(sum((a[name] * b[name]).sum() for name in names))


@pytest.mark.thin(2)
@pytest.mark.parametrize("layers", [("mlp", "attn"), ("all",)], ids=["linears", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_products_are_those_of_autograd(
    kind: str, dtype: torch.dtype, layers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one row at a time; tied weights, biases, norms and embeddings among them."""
    monkeypatch.setattr(layer_gradients, "TILE", 1 << 12)
    model, rows = CAUSAL[kind]().to(dtype), rows_of()
    blocks = select_blocks(model, layers).blocks
    names = {name for block in blocks for name in block.parameters}
    exact = alone(model, rows, "sum")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    weights = torch.tensor([[1.0, 0, 0, 0, 0], [0.5, 0, -2, 0, 0]], dtype=torch.float64)
    with LayerGradients(model, blocks, reduction="sum", losses=losses_of) as gradients:
        passes = Passes(gradients, 20)
        queries = passes.combined(rows, weights, TASK)
        dots, squares = passes.products(rows, queries, TASK, lambda block, g_OI: g_OI)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    wanted = torch.tensor([[product(val, row, names) for row in exact] for val in exact], dtype=torch.float64)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    # The layers of norms and embeddings sum in float32 whatever the dtype of the model.
    tolerance = tolerance if layers != ("all",) else max(tolerance, 1e-5)
    largest = float(wanted.max())
    torch.testing.assert_close(dots, weights @ wanted, rtol=tolerance, atol=tolerance * largest)
    assert squares is not None
    torch.testing.assert_close(squares, wanted.diagonal(), rtol=tolerance, atol=0)


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", CAUSAL)
def test_matrices_are_taken_apart(kind: str) -> None:
    parameters = {name: p.detach() for name, p in CAUSAL[kind]().named_parameters()}
    for block in select_blocks(CAUSAL[kind](), ("all",)).blocks:
        tensors = block.take_apart(block.lay_out(parameters), parameters)
        assert list(tensors) == list(block.parameters)
        assert all(torch.equal(tensors[name], parameters[name]) for name in tensors)


def random_factor(n: int, m: int, seed: int) -> MomentFactor:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q.t()
    return MomentFactor(vectors[:m].contiguous(), torch.arange(m, 0, -1.0), 0.5 if m < n else 0.0)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_ekfac_measures_eigenvalues(share: float) -> None:
    """Of pairs of leading directions, and one of all other directions of an axis together; dense, in float64."""
    model, rows = gpt2(layers=1), rows_of()
    blocks = select_blocks(model, ("attn",)).blocks
    factors = {}
    for seed, block in enumerate(blocks):
        sizes = [max(1, int(share * n)) for n in (block.n_in, block.n_out)]
        factors[block.name] = (
            random_factor(block.n_in, sizes[0], 2 * seed),
            random_factor(block.n_out, sizes[1], 2 * seed + 1),
        )
    with LayerGradients(model, blocks) as gradients:
        half = eigen_corrected(Passes(gradients, 20), KroneckerPreconditioner(factors, 0.1), rows, 0.03, TASK)
    exact = alone(model, rows)
    for seed, block in enumerate(blocks):
        u_in, u_out = (
            random_factor(n, n, 2 * seed + k).vectors.double() for k, n in enumerate((block.n_in, block.n_out))
        )
        matrices = torch.stack([block.lay_out(gradient) for gradient in exact])
        second = (u_out @ matrices @ u_in.t()).square().mean(0)
        k, j = (len(factor.vectors) for factor in reversed(factors[block.name]))
        second[k:, :j], second[:k, j:] = second[k:, :j].mean(0, keepdim=True), second[:k, j:].mean(1, keepdim=True)
        second[k:, j:] = second[k:, j:].mean()
        weight = (second + 0.03 * second.mean()).rsqrt()
        wanted = u_out.t() @ (weight * (u_out @ matrices[0] @ u_in.t())) @ u_in
        found = half(block, matrices[0].float()).double()
        assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def dense_gauss_newton(model: Any, blocks: Sequence[Block], rows: Sequence[Row]) -> Tensor:
    """(P, P) float64, over the parameters of ``blocks`` one after the other."""
    names = [name for block in blocks for name in block.parameters]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    matrix = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids, labels, mask = pad([row])

        def logits_of(chosen: dict[str, Tensor], ids: Tensor = ids, mask: Tensor = mask) -> Tensor:
            settings = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            return functional_call(model, {**parameters, **chosen}, (), settings).logits[0, :-1]

        chosen = {name: parameters[name] for name in names}
        jacobian = torch.cat([part.flatten(2) for part in jacrev(logits_of)(chosen).values()], dim=2)
        p = torch.softmax(logits_of(chosen), -1)
        hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        targets = (labels[0, 1:] != -100).double()
        hessian = hessian * (targets / targets.sum()).view(-1, 1, 1)
        matrix = matrix + torch.einsum("tvp,tvw,twq->pq", jacobian, hessian, jacobian) / len(rows)
    return matrix


def flat(model: Any, blocks: Sequence[Block], vectors: Sequence[Tensor], query: int) -> Tensor:
    like = dict(model.named_parameters())
    pieces = [block.take_apart(vector[query], like) for block, vector in zip(blocks, vectors, strict=True)]
    return torch.cat([tensor.flatten() for piece in pieces for tensor in piece.values()])


@pytest.mark.slow
@pytest.mark.parametrize(("make", "layers"), [(gpt2, "attn.c_proj"), (llama, "mlp.down_proj")], ids=["gpt2", "llama"])
def test_conjugate_gradients_solve_the_dense_system(make: Any, layers: str) -> None:
    model, rows = make(layers=1).double(), rows_of((4, 5, 3))
    rounding = 1e-10 if make is gpt2 else 1e-5  # the norms and positions of Llama are float32 in every model
    blocks = select_blocks(model, (layers,)).blocks
    newton = GaussNewton(model, blocks, rows, batch_tokens=10)
    dense = dense_gauss_newton(model, blocks, rows)
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(2, block.n_out, block.n_in, generator=generator).double() for block in blocks]
    products = newton.times(vectors)
    mean = float(dense.diagonal().mean())
    with LayerGradients(model, blocks) as gradients:
        passes = Passes(gradients, 10)
        estimates = [mean_eigenvalues(passes, rows, TASK, seed=seed)[0] for seed in range(60)]
    assert np.mean(estimates) == pytest.approx(mean, abs=4 * np.std(estimates) / 60**0.5)
    assert np.std(estimates) < mean
    scale = torch.linspace(0.5, 2, blocks[0].n_in).double()
    solved = conjugate_gradients(newton.times, vectors, [mean], lambda residual: [residual[0] * scale], 40)
    for query in range(2):
        vector = flat(model, blocks, vectors, query)
        assert error(flat(model, blocks, products, query), dense @ vector) < rounding
        wanted = torch.linalg.solve(dense + mean * torch.eye(len(dense)).double(), vector)
        assert error(flat(model, blocks, solved, query), wanted) < 1e-4
    first = conjugate_gradients(newton.times, vectors, [mean], lambda residual: [residual[0] * scale], 1)
    angle = torch.nn.functional.cosine_similarity(first[0].flatten(1), (vectors[0] * scale).flatten(1))
    torch.testing.assert_close(angle, torch.ones(2).double())


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
