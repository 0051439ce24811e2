"""What a build finds out about a model before its first row: axes, gradients, batch mates, padding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

import ghoststore
from ghoststore.corpus import Sample
from ghoststore.errors import CaptureError
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.store import Status, Store
from indexer.build.model_check import ModelCheck
from indexer.encode.batching import plan_batches
from indexer.encode.tokens import Row
from indexer.projection.plan import ProjectionPlan
from tests.support.models import pad
from tests.support.notes import Notes
from tests.support.odd_models import odd, save_odd
from tests.support.oracle import gradients_alone
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

PLAIN: dict[str, Any] = {"rank_total": "full", "precondition": "none"}


def build(
    lab: Lab, folder: Path, quirk: str, *, layers: str = "mlp", notes: Notes | None = None, **options: Any
) -> Any:
    config = ghoststore.ProjectionConfig(layers=(layers,), **{**PLAIN, **options.pop("projection", {})})
    checkpoint = save_odd(folder / "model", quirk) if not (folder / "model").exists() else folder / "model"
    return ghoststore.build(
        checkpoint=checkpoint,
        data=lab.corpus,
        store=folder / "store",
        name="part",
        projection=config,
        device="cpu",
        progress=notes,
        **{"proj_dtype": "float32", **options},
    )


def assert_exact(lab: Lab, folder: Path, quirk: str, layers: tuple[str, ...] = ("mlp.c_fc", "mlp.c_proj")) -> None:
    """Every row is the gradient of its sample alone, by autograd."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [torch.tensor(tokenizer(row["text"])["input_ids"]) for row in lab.rows]

    def loss_of(model: Any, i: int) -> torch.Tensor:
        logits = model(rows[i].unsqueeze(0)).logits[0]
        return torch.nn.functional.cross_entropy(logits[:-1], rows[i][1:])

    gradients = gradients_alone(odd(quirk), len(rows), loss_of)
    expected = np.stack(
        [
            np.concatenate(
                [torch.cat([g[f"{n}.weight"], g[f"{n}.bias"].unsqueeze(1)], dim=1).flatten().numpy() for n in layers]
            )
            for g in gradients
        ]
    )
    part = Store.open(folder / "store").part("part")
    found = np.asarray(vectors_of(part))
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 1e-4


def test_a_sound_model_is_built(lab: Lab, tmp_path: Path) -> None:
    notes = Notes()
    report = build(lab, tmp_path, "none", notes=notes)
    assert report.manifest["batching"]["padding"] is True
    assert not any("padding" in note for note in notes.said)
    assert_exact(lab, tmp_path, "none")


def test_samples_and_positions_on_one_axis(lab: Lab, tmp_path: Path) -> None:
    build(lab, tmp_path, "flat")
    assert_exact(lab, tmp_path, "flat")


@pytest.mark.parametrize("quirk", ["sequence first", "another sample's place"])
def test_layers_that_mix_samples_are_all_named_before_anything_is_made(lab: Lab, tmp_path: Path, quirk: str) -> None:
    with pytest.raises(CaptureError, match=r"2 of 3 layers(.|\n)*`exclude_layers`\): mlp\.c_fc,mlp\.c_proj") as error:
        build(lab, tmp_path, quirk, layers="all", projection={"exclude_layers": ("wte", "wpe", "lm_head")})
    assert not (tmp_path / "store").exists()
    advised = str(error.value).rpartition(": ")[2].split(",")
    build(lab, tmp_path, quirk, layers="all", projection={"exclude_layers": ("wte", "wpe", "lm_head", *advised)})
    assert_exact(lab, tmp_path, quirk, ("attn",))


def test_a_weight_that_is_used_behind_the_back(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"not be autograd's gradients: attn .*`exclude_layers` 'attn'"):
        build(lab, tmp_path, "used behind the back", layers="all", projection={"exclude_layers": ("wte", "wpe")})
    assert not (tmp_path / "store").exists()
    build(lab, tmp_path, "used behind the back", layers="mlp")
    assert_exact(lab, tmp_path, "used behind the back")


def test_a_model_that_mixes_the_samples_of_a_batch(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"mixes the samples of a batch"):
        build(lab, tmp_path, "mean of the batch")
    build(lab, tmp_path, "mean of the batch", batch_tokens=1)  # each alone
    assert_exact(lab, tmp_path, "mean of the batch")


@pytest.mark.parametrize("quirk", ["positions from the end", "another thing when long"])
def test_a_model_that_padding_changes_is_built_without(lab: Lab, tmp_path: Path, quirk: str) -> None:
    notes = Notes()
    report = build(lab, tmp_path, quirk, notes=notes)
    assert report.manifest["batching"]["padding"] is False
    assert any("rows of one length share a batch" in note for note in notes.said)
    assert_exact(lab, tmp_path, quirk)
    # What is asked of the part is encoded in the same way: a row is its own nearest.
    asked = lab.write(tmp_path / "val.jsonl", lab.rows[:6])
    result = ghoststore.query(
        store=tmp_path / "store", val_set=asked, each=True, top_k=1, metric="cosine", device="cpu"
    )
    assert [one.hits[0].id for one in result.results] == [row["id"] for row in lab.rows[:6]]
    assert all(one.hits[0].score == pytest.approx(1.0, abs=1e-5) for one in result.results)


def test_batches_without_padding() -> None:
    lengths = [3, 5, 3, 3, 9, 5, 1]
    batches = plan_batches(lengths, 10, padding=False)
    assert [[lengths[place] for place in batch] for batch in batches] == [[9], [5, 5], [3, 3, 3], [1]]
    assert sorted(place for batch in batches for place in batch) == list(range(7))


def test_the_model_is_left_as_it_was() -> None:
    model = odd().requires_grad_(False)
    model.attn.weight.requires_grad_(True)
    model.attn.weight.grad = torch.ones_like(model.attn.weight)
    flags = [p.requires_grad for p in model.parameters()]
    plan = ProjectionPlan.for_model(model, ProjectionConfig(layers=("all",), rank_total=9))
    ids = pad([(torch.arange(1, 9), torch.arange(1, 9))])[0][0].int().numpy()
    row = Row(Sample(0, "a", None, "text", -1, 0), 0, 0, ids, 1, Status.OK)
    assert ModelCheck(model, plan, [row], longest=32, batch_tokens=2048).run()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert bool((model.attn.weight.grad == 1.0).all())
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.skipif(not hasattr(transformers, "DeepseekV32Config"), reason="this transformers has no DeepSeek-V3.2")
def test_a_sparse_attention_that_picks_padding(lab: Lab, tmp_path: Path) -> None:
    """Its indexer keeps the best eight keys of a query, padded ones among them."""
    config = transformers.DeepseekV32Config(
        vocab_size=290,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=2,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_topk=8,
        index_n_heads=2,
        index_head_dim=16,
        n_group=1,
        topk_group=1,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.DeepseekV32ForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(lab.checkpoint).save_pretrained(tmp_path / "model")
    found = []
    for name, batch_tokens in (("together", 2048), ("alone", 1)):
        report = ghoststore.build(
            checkpoint=tmp_path / "model",
            data=lab.corpus,
            store=tmp_path / "store",
            name=name,
            device="cpu",
            projection=ghoststore.ProjectionConfig(layers=("o_proj", "mlp"), rank_total=16, precondition="none"),
            proj_dtype="float32",
            batch_tokens=batch_tokens,
        )
        part = Store.open(tmp_path / "store").part(name)
        found.append(np.asarray(vectors_of(part)))
    assert report.rows == len(lab.rows)
    assert Store.open(tmp_path / "store").part("together").manifest["batching"]["padding"] is False
    error = np.linalg.norm(found[0] - found[1], axis=1) / np.linalg.norm(found[1], axis=1)
    assert error.max() < 1e-4


def test_padding_is_tried_at_the_longest_row_there_may_be(lab: Lab, tmp_path: Path) -> None:
    """Rows of the corpus are short; what is asked of the part may be longer."""
    rows = [{"id": str(i), "text": "the cat sees a dog"} for i in range(5)]
    lab.write(tmp_path / "short.jsonl", rows)
    report = ghoststore.build(
        checkpoint=save_odd(tmp_path / "model", "another thing when long"),
        data=tmp_path / "short.jsonl",
        store=tmp_path / "store",
        device="cpu",
        projection=ghoststore.ProjectionConfig(layers=("mlp",), rank_total=16, precondition="none"),
    )
    assert report.manifest["batching"]["padding"] is False


def rows_of_ids(*ids: list[int]) -> list[Row]:
    return [
        Row(Sample(place, "", None, "", -1, 0), 0, 0, np.array(of_row, dtype=np.int32), 1, Status.OK)
        for place, of_row in enumerate(ids)
    ]


def checked(model: Any, *ids: list[int], **settings: Any) -> ModelCheck:
    plan = ProjectionPlan.for_model(model, ProjectionConfig(layers=("mlp",), rank_total=16, precondition="none"))
    return ModelCheck(model, plan, rows_of_ids(*ids), **{"longest": 32, "batch_tokens": 2048, **settings})


@pytest.mark.parametrize("ids", [[7] * 20, list(range(1, 8)), [7], list(range(14))])
def test_rows_that_are_alike_do_not_hide_mixing(ids: list[int]) -> None:
    """Of a sample that is mixed with its like nothing shows, and padding would be blamed."""
    with pytest.raises(CaptureError, match=r"mixes the samples of a batch.*give `batch_tokens=1`"):
        checked(odd("mean of the batch"), *[ids] * 16).run()
    assert checked(odd("mean of the batch"), *[ids] * 16, batch_tokens=1).run()
    assert checked(odd(), *[ids] * 16).run()
    assert not checked(odd("positions from the end"), *[ids] * 16).run()


def test_gradients_that_are_not_finite_do_not_switch_the_check_off() -> None:
    ids, notes = [5, *range(40, 60)], Notes()
    mixes = odd("mean of the batch")
    with torch.no_grad():
        mixes.wte.weight[5] = float("inf")
    with pytest.raises(CaptureError, match="mixes the samples of a batch"):
        checked(mixes, ids).run()
    with torch.no_grad():
        mixes.wte.weight.fill_(float("inf"))
    checked(mixes, ids, note=notes.note).run()
    assert any("not finite" in note for note in notes.said)


@pytest.mark.parametrize(("batch_tokens", "longest", "tried"), [(2048, 32, 32), (20, 32, 10), (2048, 16384, 1024)])
def test_no_longer_rows_are_padded_than_may_share_a_batch(batch_tokens: int, longest: int, tried: int) -> None:
    model = odd()
    model.wpe = torch.nn.Embedding(longest, model.config.hidden_size)
    lengths: list[int] = []
    model.wte.register_forward_hook(lambda module, args, y: lengths.append(args[0].shape[1]))
    assert checked(model, list(range(20)), batch_tokens=batch_tokens, longest=longest).run()
    assert lengths[-2:] == [tried // 2, tried]
    assert max(lengths) == tried


def test_a_part_that_is_complete_is_not_looked_at_again(lab: Lab, tmp_path: Path) -> None:
    assert build(lab, tmp_path, "positions from the end").manifest["batching"]["padding"] is False
    backward: list[int] = []
    handle = torch.nn.modules.module.register_module_full_backward_hook(lambda *_: backward.append(1))
    try:
        report = build(lab, tmp_path, "positions from the end")
    finally:
        handle.remove()
    assert not backward
    assert report.manifest["batching"]["padding"] is False


def test_what_to_do_is_said_where_it_helps(lab: Lab, tmp_path: Path) -> None:
    """A batch of one does not help a layer whose first axis is none of samples."""
    with pytest.raises(CaptureError, match="2 of 2 layers") as error:
        build(lab, tmp_path, "sequence first")
    assert "saw an input of shape" in str(error.value)
    assert "batch_tokens" not in str(error.value)
    with pytest.raises(CaptureError, match=r"2 of 2 layers(.|\n)*give `batch_tokens=1`"):
        build(lab, tmp_path / "other", "another sample's place")


def test_rows_that_cannot_be_used_come_first(lab: Lab, tmp_path: Path) -> None:
    lab.write(tmp_path / "late.jsonl", [{"id": f"e{i}", "text": ""} for i in range(300)] + lab.rows)
    config = ghoststore.ProjectionConfig(layers=("mlp",), rank_total=16, precondition="none")
    with pytest.raises(CaptureError, match="`exclude_layers`"):
        ghoststore.build(
            checkpoint=save_odd(tmp_path / "model", "sequence first"),
            data=tmp_path / "late.jsonl",
            store=tmp_path / "store",
            device="cpu",
            projection=config,
        )


def test_rows_beyond_max_samples_are_not_read(lab: Lab, tmp_path: Path) -> None:
    broken = lab.write(tmp_path / "broken.jsonl", lab.rows)
    broken.write_text(broken.read_text() + "no json\n")
    config = ghoststore.ProjectionConfig(layers=("mlp",), rank_total=16, precondition="none")
    report = ghoststore.build(
        checkpoint=lab.checkpoint,
        data=broken,
        store=tmp_path / "store",
        device="cpu",
        projection=config,
        max_samples=len(lab.rows),
    )
    assert report.rows == len(lab.rows)


@pytest.mark.parametrize("positions", [2, 5])
def test_a_model_of_few_positions(lab: Lab, tmp_path: Path, positions: int) -> None:
    folder = lab.model(tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.n_positions = positions
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    report = ghoststore.build(
        checkpoint=folder,
        data=lab.corpus,
        store=tmp_path / "store",
        device="cpu",
        projection=ghoststore.ProjectionConfig(layers=("mlp",), rank_total=16, precondition="none"),
    )
    assert report.manifest["tokens"]["max_length"] == positions
