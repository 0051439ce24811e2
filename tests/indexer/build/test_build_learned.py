"""Builds whose projection is learned: stored vectors from the arrays of the part, groups, and scores by layer.

Legend: R rows, O, I axes of a gradient matrix.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.checkpoint.load import find_checkpoint, load_model, load_tokenizer
from ghoststore.errors import UsageError
from ghoststore.store import Part
from indexer.projection.calibration import FACTORS, KEPT, SIDES
from indexer.projection.selection import select_blocks
from query.ask.encoder import projection_of
from tests.support.oracle import dense, gradient_matrix, gradients_of
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

ALL = ("all",)
DEFAULT = ProjectionConfig(layers=ALL)
PARTS = {
    "default": DEFAULT,
    "plain-blocks": ProjectionConfig(layers=ALL, rank_total=49, damping=0.02),
    "together": ProjectionConfig(layers=ALL, compress_by="all", compress=100),
    "pca": ProjectionConfig(layers=ALL, kind="pca", precondition="none", rank_total=81, compress=150),
    "pca-preconditioned": ProjectionConfig(
        layers=ALL, kind="pca", rank_total=81, compress=150, precondition="kronecker"
    ),
    "sizes": ProjectionConfig(layers=ALL, compress_by="layer", precondition="none", compress=90, kind="orthonormal"),
}


def build(lab: Lab, store: Path, projection: ProjectionConfig | None = None, **settings: Any) -> Any:
    settings = {
        "checkpoint": lab.checkpoint,
        "data": lab.corpus,
        "name": "part",
        "span_rows": 6,
        "device": "cpu",
        "proj_dtype": "float32",
    } | settings
    return ghoststore.build(store=store, projection=projection or DEFAULT, **settings)


@pytest.fixture(scope="module")
def stores(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of each of PARTS; not to be changed."""
    store = tmp_path_factory.mktemp("learned") / "store"
    for name, projection in PARTS.items():
        build(lab, store, projection, name=name)
    return store


@pytest.fixture(scope="module")
def exact(lab: Lab) -> list[dict[str, Tensor]]:
    """Gradient matrices of every row of the corpus, each alone, float64, by block name."""
    model = load_model(find_checkpoint(lab.checkpoint)).double()
    tokenizer = load_tokenizer(lab.checkpoint)
    blocks = select_blocks(model, ALL, ()).blocks
    found = []
    for row in lab.rows:
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        of_row = gradients_of(model, model(input_ids=ids, labels=ids).loss)
        found.append({block.name: gradient_matrix(model, block.name, of_row) for block in blocks})
    return found


def array(part: Part, name: str) -> np.ndarray:
    """By the files alone."""
    return np.asarray(zarr.open_array(part.path / name, mode="r")[...])


def by_hand(part: Part, exact: list[dict[str, Tensor]]) -> Tensor:
    """(rows, numbers) of the Kronecker blocks, from the sides that the part keeps: no code of ours reads them."""
    p_in, p_out = (torch.from_numpy(array(part, name)).double() for name in SIDES)
    blocks = []
    for layer in part.manifest["layers"]:
        (k, j), (n_out, n_in) = layer["ranks"], layer["shape"]
        mine_in, p_in = p_in[: j * n_in].view(j, n_in), p_in[j * n_in :]
        mine_out, p_out = p_out[: k * n_out].view(k, n_out), p_out[k * n_out :]
        blocks.append(torch.stack([(mine_out @ of_row[layer["name"]] @ mine_in.t()).flatten() for of_row in exact]))
    assert len(p_in) == len(p_out) == 0
    return torch.cat(blocks, dim=1)


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", [name for name in PARTS if name != "sizes"])
def test_vectors_are_autograds_by_the_sides_of_the_part(
    lab: Lab, stores: Path, exact: list[dict[str, Tensor]], name: str
) -> None:
    part = ghoststore.Store.open(stores).part(name)
    expected = by_hand(part, exact)
    sketch = projection_of(part, load_model(find_checkpoint(lab.checkpoint))).sketch
    assert (sketch is None) == (name == "plain-blocks")
    if sketch is not None:
        expected = expected @ dense(sketch).double().t()
    found = torch.from_numpy(vectors_of(part, 0, len(lab.rows))).double()
    assert found.shape == expected.shape
    assert float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-4


def test_factors_are_those_of_the_corpus(stores: Path, exact: list[dict[str, Tensor]], lab: Lab) -> None:
    """Where both axes are short, the factors that the part keeps are E[Gᵀ G] and E[G Gᵀ] by brute force."""
    part = ghoststore.Store.open(stores).part("plain-blocks")
    projection = projection_of(part, load_model(find_checkpoint(lab.checkpoint)))
    learned = projection.plan.calibration
    assert learned is not None
    assert learned.preconditioner is not None
    assert learned.samples == len(lab.rows)
    short = 0
    for layer in projection.plan.layers:
        if max(layer.block.n_out, layer.block.n_in) > 64:
            continue
        short += 1
        g_ROI = torch.stack([of_row[layer.block.name] for of_row in exact])
        for factor, second in zip(
            learned.preconditioner.factors[layer.block.name],
            (torch.einsum("roi,roj->ij", g_ROI, g_ROI), torch.einsum("roi,rpi->op", g_ROI, g_ROI)),
            strict=True,
        ):
            second /= len(g_ROI)
            found = factor.vectors.t().double() * factor.values.double() @ factor.vectors.double()
            assert float((found - second).norm() / second.norm()) < 1e-4
    assert short >= 2


def test_groups_are_the_sizes_of_the_manifest(lab: Lab, stores: Path) -> None:
    for name in ("default", "pca", "pca-preconditioned", "sizes"):
        part = ghoststore.Store.open(stores).part(name)
        groups, layers = part.groups, part.manifest["layers"]
        assert [group for group, _, _ in groups] == [layer["name"] for layer in layers]
        assert [groups[0][1], *(stop for _, _, stop in groups[:-1])] == [start for _, start, _ in groups]
        assert groups[-1][2] == part.layout.dimension == part.manifest["projection"]["compress"]
        assert all(
            1 <= stop - start <= np.prod(one["ranks"]) for (_, start, stop), one in zip(groups, layers, strict=True)
        )
        kept = part.manifest["projection"]["calibration"]["kept"]
        assert (kept > 0) == (name == "pca") == (part.path / KEPT).exists()
        assert (part.path / FACTORS[0]).exists() == (name not in ("pca", "sizes"))
    assert [group for group, _, _ in ghoststore.Store.open(stores).part("together").groups] == ["all"]


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["default", "pca", "plain-blocks"])
def test_scores_of_layers_sum_to_the_whole(lab: Lab, stores: Path, name: str) -> None:
    """Also: the query encodes as the build does."""
    asked: dict[str, Any] = {
        "store": stores,
        "part": name,
        "val_set": lab.corpus,
        "each": True,
        "metric": "dot",
        "top_k": 27,
        "device": "cpu",
    }
    part = ghoststore.Store.open(stores).part(name)
    vectors = vectors_of(part, 0, 27).astype(np.float64)
    ((start, stop),) = [(start, stop) for group, start, stop in part.groups if group.endswith("attn.c_attn")]
    for layers, columns in (((), slice(None)), (("attn.c_attn",), slice(start, stop))):
        found = ghoststore.query(**asked, layers=layers)
        dots = vectors[:, columns] @ vectors[:, columns].T
        for result, scores in zip(found.results, dots, strict=True):
            for hit in result.hits:
                assert hit.score == pytest.approx(scores[hit.source_row], rel=1e-3, abs=1e-4 * np.abs(dots).max())
    with pytest.raises(UsageError, match="one sketch of all layers"):
        ghoststore.query(**asked | {"part": "together"}, layers=["attn.c_attn"])
