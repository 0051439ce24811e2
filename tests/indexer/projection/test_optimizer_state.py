"""Adam's second moment on both sides of the projection: the formula, where it is read from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.checkpoint.load import find_checkpoint, load_model
from ghoststore.errors import CheckpointError, CorruptError, MismatchError
from indexer.projection.adam import factored, flat, read_scales, unflat
from indexer.projection.matrices import Projection
from indexer.projection.plan import ProjectionPlan
from indexer.projection.selection import select_blocks
from tests.support.harms import delete
from tests.support.oracle import gradient_matrix

if TYPE_CHECKING:
    from tests.conftest import Lab

FULL = ProjectionConfig(layers=("all",), rank_total="full", compress="none")


def trained(lab: Lab, folder: Path, optimizer_of: Any = None, steps: int = 3) -> Any:
    """(model, optimizer) after some steps of Adam on the corpus; the model is saved in ``folder``."""
    lab.model(folder)
    model = load_model(find_checkpoint(folder))
    model.train()
    optimizer = (optimizer_of or torch.optim.AdamW)(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(0, model.config.vocab_size, (4, 16), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(folder)
    return model, optimizer


def test_a_matrix_of_rank_one_is_inverted_exactly() -> None:
    """V = r cᵀ: scaling by both factors is multiplying with V^-¼ elementwise."""
    generator = torch.Generator().manual_seed(0)
    row, column = torch.rand(7, generator=generator) + 0.1, torch.rand(5, generator=generator) + 0.1
    v = 3.7 * torch.outer(row, column)
    scales = factored(v)
    torch.testing.assert_close(torch.outer(scales.scale_out, scales.scale_in), v.pow(-0.25))


def test_what_was_never_trained_is_not_blown_up() -> None:
    v = torch.ones(4, 3)
    v[2] = 0.0
    scales = factored(v)
    assert bool(torch.isfinite(scales.scale_out).all())
    assert float(scales.scale_out[2] / scales.scale_out[0]) < 40


def test_blocks_are_laid_out_as_gradients_are(lab: Lab, tmp_path: Path) -> None:
    """Biases, transposed weights, norms, and the tied head: against the layout of the oracle."""
    model = load_model(find_checkpoint(lab.model(tmp_path / "model")))
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.rand(p.shape, generator=generator).double() for name, p in model.named_parameters()}
    blocks = select_blocks(model, ("all",), ()).blocks
    assert len({block.type for block in blocks}) >= 3
    for block in blocks:
        torch.testing.assert_close(block.lay_out(tensors), gradient_matrix(model, block.name, tensors))


@pytest.fixture(scope="module")
def checkpoint(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    _, optimizer = trained(lab, folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder


def test_vectors_are_gradients_times_v_to_the_minus_quarter(lab: Lab, checkpoint: Path, tmp_path: Path) -> None:
    """With every axis at its own length: stored numbers against plain ones, scaled. Then the query's side."""
    for name, state in (("plain", None), ("adam", checkpoint)):
        ghoststore.build(
            checkpoint=checkpoint,
            data=lab.corpus,
            store=tmp_path / "store",
            name=name,
            projection=FULL,
            optimizer_state=state,
            proj_dtype="float32",
            device="cpu",
        )
    store = ghoststore.Store.open(tmp_path / "store")
    plain, adam = (np.asarray(store.part(name).read("vectors", 0, len(lab.rows))) for name in ("plain", "adam"))
    model = load_model(find_checkpoint(checkpoint))
    plan = ProjectionPlan.for_model(model, FULL)
    scales = read_scales(checkpoint, model, [layer.block for layer in plan.layers])
    factor = np.concatenate(
        [
            np.outer(scales[layer.block.name].scale_out, scales[layer.block.name].scale_in).ravel()
            for layer in plan.layers
        ]
    )
    np.testing.assert_allclose(adam, plain * factor, rtol=1e-5, atol=1e-6 * np.abs(adam).max())
    found = ghoststore.query(
        store=tmp_path / "store", part="adam", val_set=lab.corpus, each=True, metric="dot", top_k=27, device="cpu"
    )
    wide = adam.astype(np.float64)
    for result, scores in zip(found.results, wide @ wide.T, strict=True):
        for hit in result.hits:
            assert hit.score == pytest.approx(scores[hit.source_row], rel=1e-4, abs=1e-5 * np.abs(scores).max())


def test_sides_are_scaled_before_they_project(checkpoint: Path) -> None:
    model = load_model(find_checkpoint(checkpoint))
    plan = ProjectionPlan.for_model(model, ProjectionConfig(layers=("mlp",), rank_total=16))
    scales = read_scales(checkpoint, model, [layer.block for layer in plan.layers])
    plain, scaled = Projection(plan), Projection(plan, scales)
    for name, (p_in, p_out) in plain.sides.items():
        torch.testing.assert_close(scaled.sides[name][0], p_in * scales[name].scale_in)
        torch.testing.assert_close(scaled.sides[name][1], p_out * scales[name].scale_out)
    assert plain.hash != scaled.hash
    again = unflat(flat(scales), [layer.block for layer in plan.layers])
    assert Projection(plan, again).hash == scaled.hash


@pytest.mark.slow
def test_other_state_is_another_part(lab: Lab, checkpoint: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "checkpoint": checkpoint,
        "data": lab.corpus,
        "store": tmp_path / "store",
        "name": "part",
        "device": "cpu",
    }
    ghoststore.build(**settings, optimizer_state=checkpoint)
    assert ghoststore.build(**settings, optimizer_state=checkpoint).resumed_rows == len(lab.rows)
    with pytest.raises(MismatchError, match="optimizer_state"):
        ghoststore.build(**settings, projection=ProjectionConfig(precondition="none"))
    whole = lab.tree(tmp_path / "store")
    scale = next((tmp_path / "store" / "parts" / "part" / "optimizer_scale_in" / "c").iterdir())
    data = bytearray(scale.read_bytes())
    data[3] ^= 1
    scale.write_bytes(bytes(data))
    with pytest.raises(CorruptError, match="optimizer_scale_in"):
        ghoststore.query(store=tmp_path / "store", val_set=lab.corpus, device="cpu")
    assert lab.run("verify", "--store", tmp_path / "store").code == 4
    delete(tmp_path / "store" / "parts" / "part" / "commits" / "00000000.json")
    assert ghoststore.repair(tmp_path / "store", device="cpu").sound
    delete(tmp_path / "store" / "parts" / "part" / "commits" / "00000000.json")
    assert ghoststore.repair(tmp_path / "store", device="cpu").sound  # with the scales that the part has
    assert lab.tree(tmp_path / "store") == whole


def by_decay(parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    """As transformers' Trainer groups them."""
    parameters = list(parameters)
    groups = [{"params": [p for p in parameters if p.dim() >= 2]}, {"params": [p for p in parameters if p.dim() < 2]}]
    return torch.optim.AdamW(groups, **settings)


@pytest.mark.thin(1)
@pytest.mark.parametrize("optimizer_of", [torch.optim.Adam, by_decay], ids=["as they stand", "decayed first"])
def test_numbered_states_get_their_names_back(lab: Lab, tmp_path: Path, optimizer_of: Any) -> None:
    model, optimizer = trained(lab, tmp_path / "model", optimizer_of)
    torch.save(optimizer.state_dict(), tmp_path / "model" / "optimizer.pt")
    tensors = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    ours = tmp_path / "ours" / "training_state"
    ours.mkdir(parents=True)
    save_file({f"{name}/exp_avg_sq": v.contiguous() for name, v in tensors.items()}, ours / "optimizer.safetensors")
    blocks = select_blocks(model, ("all",), ()).blocks
    found = [read_scales(folder, model, blocks) for folder in (tmp_path / "model", tmp_path / "ours")]
    for block in blocks:
        expected = factored(block.lay_out(tensors))
        for scales in found:
            assert torch.equal(scales[block.name].scale_in, expected.scale_in)
            assert torch.equal(scales[block.name].scale_out, expected.scale_out)


def test_of_a_training_of_ours(lab: Lab, tmp_path: Path) -> None:
    """What ``ghoststore train`` leaves can be built from, and knows its learning rate."""
    from indexer.projection.adam import learning_rate_of

    report = ghoststore.train(
        data=lab.corpus,
        output_dir=tmp_path / "out",
        method="Regular",
        architecture="GPT2-Tiny",
        tokenizer=lab.checkpoint,
        max_length=16,
        batch_size=4,
        max_steps=3,
        device="cpu",
    )
    folder = Path(report.checkpoint)
    rate = learning_rate_of(folder)
    assert rate is not None
    assert rate > 0
    built = ghoststore.build(
        checkpoint=folder, data=lab.corpus, store=tmp_path / "store", optimizer_state=folder, device="cpu"
    )
    assert built.manifest["source"]["learning_rate"] == rate
    assert built.manifest["projection"]["optimizer_state"].startswith("sha256:")
    assert ghoststore.query(store=tmp_path / "store", val_set=lab.corpus, top_k=1, device="cpu").results[0].hits


def test_refused(lab: Lab, checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(find_checkpoint(checkpoint))
    blocks = select_blocks(model, ("mlp",), ()).blocks

    def refused(match: str, save: Any) -> None:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        save(folder)
        with pytest.raises(CheckpointError, match=match):
            read_scales(folder, model, blocks)

    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    refused("found neither", lambda folder: None)
    refused("cannot be read", lambda folder: (folder / "optimizer.pt").write_bytes(b"rubbish"))
    refused(
        "holds no exp_avg_sq",
        lambda folder: torch.save({"param_groups": state["param_groups"], "state": {}}, folder / "optimizer.pt"),
    )
    fewer = {"param_groups": [{"params": state["param_groups"][0]["params"][:-1]}], "state": state["state"]}
    refused("fits no order", lambda folder: torch.save(fewer, folder / "optimizer.pt"))

    class Code:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "owned",))

    refused("cannot be read", lambda folder: torch.save({"x": Code()}, folder / "optimizer.pt"))
    assert not (tmp_path / "owned").exists()

    def ours(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        (folder / "training_state").mkdir()
        save_file(tensors, folder / "training_state" / "optimizer.safetensors")

    names = [name for block in blocks for name in block.parameters]
    shapes = dict(model.named_parameters())
    refused("is missing|are missing", lambda folder: ours(folder, {"other": torch.ones(1)}))
    refused("has shape", lambda folder: ours(folder, {f"{n}/exp_avg_sq": torch.ones(3) for n in names}))
    refused(
        "was not trained", lambda folder: ours(folder, {f"{n}/exp_avg_sq": torch.zeros(shapes[n].shape) for n in names})
    )


def test_groups_from_the_last_layer_to_the_first(lab: Lab, tmp_path: Path) -> None:
    """Layers have the same shapes: numbers without names are refused, and names are believed."""
    model = load_model(find_checkpoint(lab.model(tmp_path / "model", layers=2)))
    blocks = select_blocks(model, ("all",), ()).blocks
    ranks = ("wte", "wpe", "h.1", "h.0", "ln_f")
    v = {name: torch.rand(p.shape) + 0.1 for name, p in model.named_parameters()}
    for named in (True, False):
        grouped = [[(name, p) for name, p in model.named_parameters() if f"{rank}." in name] for rank in ranks]
        groups = [{"params": pairs if named else [p for _, p in pairs]} for pairs in grouped]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        for name, p in model.named_parameters():
            optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": v[name]}
        torch.save(optimizer.state_dict(), tmp_path / "model" / "optimizer.pt")
        if not named:
            with pytest.raises(CheckpointError, match=r"in 5 group\(s\), and fits no order"):
                read_scales(tmp_path / "model", model, blocks)
            continue
        found = read_scales(tmp_path / "model", model, blocks)
        for block in blocks:
            assert torch.equal(found[block.name].scale_in, factored(block.lay_out(v)).scale_in)


@pytest.mark.parametrize(("step", "rate"), [(7, 2e-4), (8, None)])
def test_a_learning_rate_that_was_logged_at_another_step(tmp_path: Path, step: int, rate: float | None) -> None:
    """The Trainer logs every so many steps, and saves when it wants."""
    from indexer.projection.adam import learning_rate_of

    logged = [{"learning_rate": 1e-3, "step": 1}, {"learning_rate": 2e-4, "step": 7}, {"train_loss": 3.0, "step": step}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": logged}))
    assert learning_rate_of(tmp_path) == rate
