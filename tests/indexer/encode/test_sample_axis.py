"""Which axis carries the samples: layers of well-known models that see another one first, in every engine and loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import ghoststore
from ghoststore.errors import CaptureError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine
from indexer.encode.engine import GradProjLoraEngine
from tests.support.axis_modules import backwards, module
from tests.support.models import settle
from tests.support.odd_models import odd, save_odd
from tests.support.oracle import naive, relative_error
from tests.support.scoring import agree, check, exact_of, exact_plain, plain_step, sum_of_squares

if TYPE_CHECKING:
    from tests.conftest import Lab

FULL = ProjectionConfig(layers=("all",), rank_total="full")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def refuse_to_project(model: nn.Module, x: Tensor, message: str, losses: Any = sum_of_squares) -> None:
    with GradProjLoraEngine(model, FULL) as engine:
        engine.prepare(len(x))
        with pytest.raises(CaptureError, match=message):
            engine.collect(losses(model, x))


class SequenceFirst(nn.Module):
    """Works (positions, samples, width) inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.transpose(0, 1)))).transpose(0, 1)


@pytest.mark.parametrize("positions", [4, 5])
def test_a_model_that_works_sequence_first(positions: int) -> None:
    model, x, val = settle(SequenceFirst()), random(4, positions, 6), random(4, positions, 6, seed=1)
    for samples in (4, 1):
        with (
            GradDotProdEngine(model, val[:samples], val_losses=sum_of_squares) as engine,
            pytest.raises(CaptureError, match=r"2 of 2 layers(.|\n)*`exclude_layers`\): a,b"),
        ):
            engine.prepare(4)
    refuse_to_project(model, x, "first axis")


def test_transformers_own_example_of_torch() -> None:
    """``nn.TransformerEncoderLayer`` takes (positions, samples, width) unless told otherwise."""

    def layer(batch_first: bool) -> Any:
        return settle(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first))

    def losses(model: Any, x: Tensor) -> Tensor:
        if not model.self_attn.batch_first:
            return sum_of_squares(lambda x: model(x.transpose(0, 1)).transpose(0, 1), x)  # type: ignore[arg-type]
        return sum_of_squares(model, x)

    x, val = random(4, 4, 6), random(4, 4, 6, seed=1)
    names = ["linear1", "linear2", "norm1", "norm2"]
    mixed = r"4 of 4 layers(.|\n)*`exclude_layers`\): linear1,linear2,norm1,norm2"
    with (
        GradDotProdEngine(layer(False), val, val_losses=losses, exclude_layers=["self_attn"]) as engine,
        pytest.raises(CaptureError, match=mixed),
    ):
        engine.prepare(4)
    model = layer(True)
    with GradDotProdEngine(model, val, val_losses=losses, exclude_layers=["self_attn"]) as engine:
        check(plain_step(engine, model, x), exact_plain(model, x, val).only(lambda name: "self_attn" not in name))
    config = ProjectionConfig(layers=tuple(names), rank_total="full")
    with GradProjLoraEngine(layer(False), config) as projecting:
        projecting.prepare(4)
        with pytest.raises(CaptureError, match="4 of 4 layers"):
            projecting.collect(losses(projecting.model, x))
    with GradProjLoraEngine(model, config) as projecting:
        projecting.prepare(4)
        found = projecting.collect(losses(model, x))
    expected = naive(model, projecting.projection, 4, lambda model, i: losses(model, x[i : i + 1]).sum())
    assert relative_error(found, expected.vectors) < 1e-5


def token_losses(model: Any, ids: Tensor) -> Tensor:
    """One loss a sample of any model with logits."""
    logits = model(input_ids=ids).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(1)


def token_step(engine: GradDotProdEngine, model: Any, ids: Tensor, losses: Any = token_losses) -> Any:
    engine.prepare(len(ids))
    loss = losses(model, ids).mean()
    engine.watch(loss)
    loss.backward()
    return engine.collect()


def test_xlnet_works_sequence_first() -> None:
    config = transformers.XLNetConfig(vocab_size=40, d_model=8, n_layer=1, n_head=2, d_inner=16, dropout=0.0)
    model = settle(transformers.XLNetLMHeadModel(config))
    ids = torch.randint(0, 40, (8, 8), generator=torch.Generator().manual_seed(0))  # as many tokens as samples
    others = ["word_embedding", "lm_loss", "mask_emb", "rel_attn"]
    with (
        GradDotProdEngine(model, ids[:3], val_losses=token_losses, exclude_layers=others) as engine,
        pytest.raises(CaptureError, match=r"transformer\.layer\.0\.ff\.layer_1: saw an input of shape \(8, 3, 8\)"),
    ):
        engine.prepare(8)
    with GradProjLoraEngine(model, ProjectionConfig(layers=("ff",), rank_total=4)) as projecting:
        projecting.prepare(8)
        with pytest.raises(CaptureError, match=r"ff\.layer_1: the loss of one sample reaches the rows of others"):
            projecting.collect(token_losses(model, ids))


def test_t5_has_a_table_of_relative_positions() -> None:
    config = transformers.T5Config(
        vocab_size=40,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        decoder_start_token_id=0,
        relative_attention_num_buckets=8,
    )
    model = settle(transformers.T5ForConditionalGeneration(config))

    def losses(model: Any, ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, labels=ids).logits
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(1)

    ids = torch.randint(1, 40, (6, 6), generator=torch.Generator().manual_seed(0))
    with GradDotProdEngine(model, ids[:2], val_losses=losses) as engine:
        scores = token_step(engine, model, ids, losses)
    exact = exact_of(
        model,
        6,
        lambda model, i: losses(model, ids[i : i + 1]).sum(),
        2,
        lambda model, i: losses(model, ids[i : i + 1]).sum(),
    )
    agree(scores.total, exact.total().mean(1))
    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total=4, compress="none")) as projecting:
        projecting.prepare(6)
        vectors = projecting.collect(losses(model, ids))
    assert projecting.projection.plan.replayed == {"T5Attention": 2}
    expected = naive(model, projecting.projection, 6, lambda model, i: losses(model, ids[i : i + 1]).sum())
    assert relative_error(vectors, expected.vectors, expected.whole_norm()) < 1e-5


class Experts(nn.Module):
    """Two experts that take as many tokens each as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 2)
        self.branches = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        tokens, scores = x.flatten(0, 1), self.router(x).flatten(0, 1)
        for place, expert in enumerate(self.branches):
            chosen = scores[:, place].topk(len(x)).indices
            tokens = tokens.index_add(0, chosen, scores[chosen, place : place + 1] * expert(tokens[chosen]))
        return tokens.view_as(x)


def test_experts_that_take_as_many_tokens_as_there_are_samples() -> None:
    model, x, val = settle(Experts()), random(4, 3, 6), random(5, 3, 6, seed=1)
    with (
        GradDotProdEngine(model, val, val_losses=sum_of_squares) as engine,
        pytest.raises(CaptureError, match=r"changes with its batch mates|branches\.0(.|\n)*branches\.1"),
    ):
        engine.prepare(4)
    refuse_to_project(model, x, r"branches\.0(.|\n)*branches\.1")


def test_vectors_alone_have_no_val_losses_to_reweight() -> None:
    model, x = settle(SequenceFirst()), random(4, 4, 6)
    with (
        GradDotProdEngine(model, None, projection=FULL) as engine,
        pytest.raises(CaptureError, match=r"`exclude_layers`\): a,b"),
    ):
        plain_step(engine, model, x)
    turned = settle(module([backwards], 4, 6, norm=False))
    with (
        GradDotProdEngine(turned, None, projection=FULL) as engine,
        pytest.raises(CaptureError, match="does not follow the samples"),
    ):
        plain_step(engine, turned, x)


def test_a_layer_that_no_val_sample_reaches_is_looked_at_in_training() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor, head: str = "other", turned: bool = False) -> Tensor:
            x = torch.tanh(self.body(x))
            if head == "one":
                return self.one(x)
            return self.other(x.transpose(0, 1)).transpose(0, 1) if turned else self.other(x)

    def losses(model: Any, x: Tensor) -> Tensor:
        return sum_of_squares(lambda x: model(x, head="one"), x)  # type: ignore[arg-type]

    x, val = random(4, 4, 6), random(3, 4, 6, seed=1)
    for turned in (False, True):
        model = settle(TwoHeads())
        with GradDotProdEngine(model, val, val_losses=losses) as engine:
            engine.prepare(4)
            y = model(x, turned=turned)
            loss = y.square().mean()
            engine.watch(loss)
            loss.backward()
            if not turned:
                assert bool((engine.collect().parameters["other.weight"] == 0).all())
                continue
            with pytest.raises(CaptureError, match=r"1 of 3 layers(.|\n)*other: "):
                engine.collect()


def test_parts_of_a_model_called_without_it_cannot_be_looked_at() -> None:
    model, x = settle(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))), random(3, 6)
    with GradDotProdEngine(model, None, projection=FULL) as engine:
        engine.prepare(3)
        loss = model[2](model[1](model[0](x))).square().mean()
        engine.watch(loss)
        loss.backward()
        with pytest.raises(CaptureError, match="the model itself is not called"):
            engine.collect()


def test_the_verdict_is_kept() -> None:
    model, x, val = (
        settle(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))),
        random(3, 6),
        random(4, 6, seed=1),
    )
    calls: list[int] = []
    model.register_forward_hook(lambda module, args, y: calls.append(len(y)))
    with GradDotProdEngine(model, val, val_losses=sum_of_squares, val_refresh_interval=9) as engine:
        plain_step(engine, model, x)
        before = len(calls)
        for _ in range(3):
            plain_step(engine, model, x)
        assert calls[before:] == [3, 3, 3]
    with engine:  # attached again
        plain_step(engine, model, x)
    assert calls[before:] == [3, 3, 3, 3]
    del calls[:]
    with GradProjLoraEngine(model, FULL) as projecting:
        for _ in range(5):
            projecting.prepare(3)
            projecting.collect(sum_of_squares(model, x))
    assert calls[-3:] == [3, 3, 3]


def test_what_is_trusted_is_not_looked_at() -> None:
    model, x, val = settle(nn.Sequential(nn.Linear(6, 6))), random(3, 6), random(4, 6, seed=1)
    calls: list[int] = []
    model.register_forward_hook(lambda module, args, y: calls.append(len(y)))
    with GradDotProdEngine(model, val, val_losses=sum_of_squares, check=False) as engine:
        plain_step(engine, model, x)
    with GradProjLoraEngine(model, FULL, check=False) as projecting:
        projecting.prepare(3)
        projecting.collect(sum_of_squares(model, x))
    assert calls == [4, 3, 3]


# Loops and commands.


def odd_batch(count: int, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, 290, (count, 4), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


@pytest.mark.thin
@pytest.mark.parametrize("method", ["GradDotProd", "GradProjLora"])
@pytest.mark.parametrize("with_val", [True, False])
def test_the_manager(method: Any, with_val: bool) -> None:
    if method == "GradDotProd" and not with_val:
        return
    model = odd("sequence first")
    settings = {"proj_layers": ("mlp",), "proj_rank_total": 16} if method == "GradProjLora" else {}
    config = ghoststore.GhostConfig(method=method, **settings)
    batch = odd_batch(4)
    val = odd_batch(4, 1) if with_val else None

    def step(manager: ghoststore.GhostEngineManager) -> None:
        manager.attach_train_batch(batch["input_ids"], batch["labels"], 0)
        manager.prepare_forward_input(batch["input_ids"], batch["labels"])
        model(**batch).loss.backward()
        manager.prepare_gradients()

    with (
        ghoststore.GhostEngineManager(config, model, torch.optim.SGD(model.parameters(), 0.1), val) as manager,
        pytest.raises(CaptureError, match=r"2 of \d+ layers(.|\n)*`exclude_layers`\): mlp\.c_fc,mlp\.c_proj"),
    ):
        step(manager)


def test_the_trainers_callback(tmp_path: Path) -> None:
    rows = [{**{key: value[i].tolist() for key, value in odd_batch(8).items()}, "sample": i} for i in range(8)]
    callback = ghoststore.GhostStoreCallback(store=tmp_path / "store", val_data=odd_batch(4, 1), samples=8)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(
        model=odd("sequence first"),
        args=arguments,
        train_dataset=rows,
        callbacks=[callback],
        data_collator=transformers.default_data_collator,
    )
    with pytest.raises(CaptureError, match=r"`exclude_layers`\): mlp\.c_fc,mlp\.c_proj"):
        trainer.train()
    callback.close()


def test_the_training_command(lab: Lab, tmp_path: Path) -> None:
    checkpoint = save_odd(tmp_path / "model", "sequence first")
    given: dict[str, Any] = {
        "checkpoint": checkpoint,
        "data": lab.corpus,
        "val_set": lab.corpus,
        "store": tmp_path / "store",
        "batch_size": 4,
        "max_steps": 2,
        "val_batch_size": 4,
        "device": "cpu",
        "eval_interval": 2,
    }
    with pytest.raises(CaptureError, match=r"`exclude_layers`\): mlp\.c_fc,mlp\.c_proj"):
        ghoststore.train(**given, output_dir=tmp_path / "out")
    assert not (tmp_path / "store").exists()
    ghoststore.train(**given, output_dir=tmp_path / "out", exclude_layers=("mlp.c_fc", "mlp.c_proj"))
