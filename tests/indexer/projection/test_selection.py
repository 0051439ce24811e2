"""Which layers a pattern or an alias picks, and what share of the model they cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ghoststore.settings.projection import ProjectionConfig
from indexer.projection.plan import ProjectionPlan
from indexer.projection.selection import matches_path, select_blocks
from tests.support.models import bert_causal, bert_masked, gpt2, llama, neox, perceptron


def names(model: nn.Module, *include: str, exclude: tuple[str, ...] = (), **settings: Any) -> list[str]:
    return [block.name for block in select_blocks(model, include, exclude, **settings).blocks]


def each(prefix: str, *leaves: str, layers: int = 2) -> list[str]:
    return [f"{prefix}.{layer}.{leaf}" for layer in range(layers) for leaf in leaves]


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("transformer.h.1", "transformer.h.1.mlp.c_fc", True),
        ("transformer.h.1", "transformer.h.10.mlp.c_fc", False),
        ("transformer.h.1", "transformer.h.11", False),
        ("h.1", "transformer.h.1.attn.c_attn", True),
        ("mlp.c_fc", "transformer.h.0.mlp.c_fc", True),
        ("mlp.c_fc", "transformer.h.0.mlp.c_fc2", False),
        ("mlp.c_fc", "transformer.h.0.xmlp.c_fc", False),
        ("mlp.c_fc", "transformer.mlp.h.c_fc", False),
        ("c_*", "transformer.h.0.mlp.c_fc", True),
        ("h.*.attn", "transformer.h.7.attn.c_proj", True),
        ("h.*.attn", "transformer.h.7.mlp.c_proj", False),
        ("h.[0-3]", "transformer.h.3.mlp.c_fc", True),
        ("h.[0-3]", "transformer.h.4.mlp.c_fc", False),
        ("h.1?", "transformer.h.12.mlp", True),
        ("h.*", "h", False),
        ("a.b.c", "b.c", False),
        ("H.1", "h.1", False),
    ],
)
def test_patterns_match_whole_components(pattern: str, path: str, expected: bool) -> None:
    assert matches_path(pattern, path) is expected


part = st.text("abc1", min_size=1, max_size=3)


@given(st.lists(part, min_size=1, max_size=5), st.data())
def test_a_plain_pattern_matches_where_its_components_stand_in_a_row(parts: list[str], data: st.DataObject) -> None:
    pattern = data.draw(st.lists(part, min_size=1, max_size=3))
    expected = f".{'.'.join(pattern)}." in f".{'.'.join(parts)}."
    assert matches_path(".".join(pattern), ".".join(parts)) is expected


def test_block_1_is_not_block_10() -> None:
    model = gpt2(layers=12)
    inside = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names(model, "transformer.h.1", exclude=("norm",)) == [f"transformer.h.1.{leaf}" for leaf in inside]
    assert names(model, "h.1?.mlp.c_fc") == ["transformer.h.10.mlp.c_fc", "transformer.h.11.mlp.c_fc"]
    kept = names(model, "mlp.c_fc", exclude=("h.1",))
    assert kept == [f"transformer.h.{layer}.mlp.c_fc" for layer in range(12) if layer != 1]


BERT_MLP = each("bert.encoder.layer", "intermediate.dense", "output.dense")
BERT_ATTENTION = each(
    "bert.encoder.layer",
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
)

ALIASES: dict[str, tuple[Callable[[], Any], dict[str, list[str]]]] = {
    "gpt2": (
        gpt2,
        {
            "mlp": each("transformer.h", "mlp.c_fc", "mlp.c_proj"),
            "attn": each("transformer.h", "attn.c_attn", "attn.c_proj"),
            "norm": [*each("transformer.h", "ln_1", "ln_2"), "transformer.ln_f"],
            "embeddings": ["transformer.wte", "transformer.wpe"],
            "head": ["transformer.wte"],
        },
    ),
    "gpt2-untied": (lambda: gpt2(tied=False), {"head": ["lm_head"]}),
    "llama": (
        llama,
        {
            "mlp": each("model.layers", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            "attn": each("model.layers", *(f"self_attn.{leaf}_proj" for leaf in "qkvo")),
            "norm": [*each("model.layers", "input_layernorm", "post_attention_layernorm"), "model.norm"],
            "embeddings": ["model.embed_tokens"],
            "head": ["lm_head"],
        },
    ),
    "neox": (
        neox,
        {
            "mlp": each("gpt_neox.layers", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            "attn": each("gpt_neox.layers", "attention.query_key_value", "attention.dense"),
            "norm": [
                *each("gpt_neox.layers", "input_layernorm", "post_attention_layernorm"),
                "gpt_neox.final_layer_norm",
            ],
            "embeddings": ["gpt_neox.embed_in"],
        },
    ),
    "bert-masked": (bert_masked, {"mlp": BERT_MLP, "attn": BERT_ATTENTION}),
    "bert-causal": (bert_causal, {"mlp": BERT_MLP, "attn": BERT_ATTENTION}),
}


@pytest.mark.parametrize(
    ("architecture", "alias"), [(name, alias) for name, (_, lists) in ALIASES.items() for alias in lists]
)
def test_aliases_pick_exactly_these_layers(architecture: str, alias: str) -> None:
    make, lists = ALIASES[architecture]
    assert sorted(names(make(), alias)) == sorted(lists[alias])


@pytest.mark.parametrize("architecture", ALIASES)
def test_the_default_is_feed_forward_and_attention_in_the_order_of_the_modules(architecture: str) -> None:
    model = ALIASES[architecture][0]()
    order = [name for name, _ in model.named_modules()]
    default = [block.name for block in select_blocks(model).blocks]
    assert default == sorted(names(model, "mlp") + names(model, "attn"), key=order.index)
    with_embeddings = [block.name for block in select_blocks(model, include_embeddings=True).blocks]
    assert sorted(with_embeddings) == sorted({*default, *names(model, "embeddings")})


@pytest.mark.parametrize("architecture", ALIASES)
def test_all_covers_every_parameter_once(architecture: str) -> None:
    model = ALIASES[architecture][0]()
    selection = select_blocks(model, ("all",))
    covered = [name for block in selection.blocks for name in block.parameters]
    assert sorted(covered) == sorted(name for name, _ in model.named_parameters())
    assert selection.covered == selection.total == sum(p.numel() for p in model.parameters())
    assert selection.covered == selection.total
    assert sum(block.numel for block in selection.blocks) == selection.total


def test_coverage_is_the_share_of_the_numbers() -> None:
    model = perceptron()
    total = 16 * 8 + 12 * 16 + 5 * 13
    selection = select_blocks(model, ("0", "4"))
    assert (selection.covered, selection.total) == (16 * 8 + 5 * 13, total)
    plan = ProjectionPlan.for_model(model, ProjectionConfig(layers=("0", "4")))
    assert plan.coverage == (16 * 8 + 5 * 13) / total
    assert [(block.n_out, block.n_in, block.numel) for block in selection.blocks] == [(16, 8, 128), (5, 13, 65)]


def test_what_is_excluded_stays_out() -> None:
    model = gpt2()
    assert names(model, "all", exclude=("norm", "embeddings", "attn", "h.0", "head")) == [
        "transformer.h.1.mlp.c_fc",
        "transformer.h.1.mlp.c_proj",
    ]


@pytest.mark.parametrize("wanted", ["transformer.wte", "lm_head", "head", "all"])
def test_a_tied_head_is_one_block_with_both_uses(wanted: str) -> None:
    blocks = {block.name: block for block in select_blocks(gpt2(), (wanted,)).blocks}
    block = blocks["transformer.wte"]
    assert "lm_head" not in blocks
    assert [(use.module, use.type, use.flipped) for use in block.uses] == [
        ("transformer.wte", "embedding", False),
        ("lm_head", "linear", True),
    ]
    assert (block.n_out, block.n_in) == (24, 101)
    assert block.parameters == ("transformer.wte.weight",)


def test_a_tied_decoder_brings_its_bias_as_a_row() -> None:
    (block,) = select_blocks(bert_masked(), ("head",)).blocks
    assert (block.n_out, block.n_in) == (25, 101)
    assert block.numel == 24 * 101 + 101
    assert [(use.flipped, use.bias_column) for use in block.uses] == [(False, None), (True, 24)]


def test_tied_linears_with_biases_of_their_own_get_a_column_each() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[2].weight = model[0].weight
    (block,) = select_blocks(model, ("all",)).blocks
    assert (block.n_out, block.n_in) == (4, 6)
    assert [use.bias_column for use in block.uses] == [4, 5, None]
    assert block.parameters == ("0.weight", "0.bias", "1.bias")


def test_a_module_that_is_used_twice_is_one_block() -> None:
    shared = nn.Linear(4, 4)
    selection = select_blocks(nn.Sequential(shared, nn.ReLU(), shared), ("all",))
    assert [(block.name, len(block.uses)) for block in selection.blocks] == [("0", 1)]
    assert selection.covered == selection.total == 20
