"""Builds of encoder-decoder models: prompts in the encoder, completions in the decoder, exact against plain autograd.

The oracle calls transformers' model with ``labels`` for one row alone, unpadded: the gradient of its own loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import ghoststore
from ghoststore.corpus import Corpus
from ghoststore.errors import CheckpointError, CorpusError, UsageError
from ghoststore.settings.projection import ProjectionConfig
from indexer.encode.pairs import tokenizer_for
from indexer.encode.tokens import TokenSettings
from indexer.projection.selection import select_blocks
from query.exact.gauss_newton import GaussNewton
from tests.support.models import settle

if TYPE_CHECKING:
    from tests.conftest import Lab

WHOLE = ProjectionConfig(layers=("all",), rank_total="full", compress="none", precondition="none")
"""The vectors are the gradients themselves, tied parameters together."""
ROWS = [
    {"prompt": "the river runs", "completion": "to the sea"},
    {"prompt": "a", "completion": "b"},
    {"prompt": "seven small words stand in a row here", "completion": "x"},
    {"prompt": "one", "completion": "and a completion that is a good deal longer than its prompt"},
]


def _t5(kind: Any, config: Any, vocabulary: int, **settings: Any) -> Any:
    shape = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3, "dropout_rate": 0.1}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return kind(config(vocab_size=vocabulary, **shape, **ends, **settings))


def _bart(kind: Any, config: Any, vocabulary: int) -> Any:
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SHAPE.items()}
    ends = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return kind(config(vocab_size=vocabulary, d_model=24, max_position_embeddings=64, **sides, **ends))


LONG = TokenSettings(max_length=64)
SHAPE = {"layers": 2, "attention_heads": 3, "ffn_dim": 32}
MODELS = {
    "t5": lambda v: _t5(T5ForConditionalGeneration, T5Config, v),
    "t5 gated": lambda v: _t5(T5ForConditionalGeneration, T5Config, v, feed_forward_proj="gated-gelu"),
    "umt5": lambda v: _t5(UMT5ForConditionalGeneration, UMT5Config, v),
    "bart": lambda v: _bart(BartForConditionalGeneration, BartConfig, v),
    "mbart": lambda v: _bart(MBartForConditionalGeneration, MBartConfig, v),
}


def make(name: str, tokenizer: Any) -> Any:
    return settle(MODELS[name](len(tokenizer)))


@pytest.fixture(scope="module")
def tokenizer(lab: Lab) -> Any:
    return AutoTokenizer.from_pretrained(lab.checkpoint)


def gradients(
    model: Any, tokenizer: Any, rows: list[dict[str, str]], reduction: str = "mean"
) -> tuple[Any, list[float]]:
    """((B, P) float64, B losses): by transformers' own loss of each row alone."""
    vectors, losses = [], []
    for row in rows:
        labels = torch.tensor([tokenizer(text_target=row["completion"])["input_ids"]])
        loss = model(input_ids=torch.tensor([tokenizer(row["prompt"])["input_ids"]]), labels=labels).loss
        loss = loss * labels.numel() if reduction == "sum" else loss
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        pairs = zip(found, model.parameters(), strict=True)
        vectors.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]).double())
        losses.append(float(loss.detach()))
    return torch.stack(vectors), losses


def far(found: Any, expected: Any) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.thin(5)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_vectors(name: str, batch_tokens: int, tokenizer: Any, tmp_path: Path) -> None:
    """Each sample's own gradient, alone and in one batch padded in both the encoder and the decoder."""
    model = make(name, tokenizer)
    ghoststore.build(
        checkpoint=model,
        tokenizer=tokenizer,
        data=ROWS,
        store=tmp_path / "store",
        projection=WHOLE,
        proj_dtype="float32",
        batch_tokens=batch_tokens,
    )
    part = ghoststore.Store.open(tmp_path / "store").part()
    assert part.manifest["batching"]["padding"]
    rows = range(part.rows)
    expected, losses = gradients(model, tokenizer, ROWS)
    vectors = torch.from_numpy(np.asarray(part.read_rows("vectors", rows))).double()
    assert far(vectors @ vectors.T, expected @ expected.T) < 2e-5
    assert np.allclose(part.read_rows("loss", rows), losses, rtol=1e-5)
    counts = [len(tokenizer(text_target=row["completion"])["input_ids"]) for row in ROWS]
    assert list(part.read_rows("n_tokens", rows)) == counts


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_second_stage_and_queries(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """Scores are those of plain autograd, from stored vectors, again by whole gradients, and from a saved folder."""
    model = make(name, tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    store = tmp_path / "store"
    val = [{"prompt": "the sea", "completion": "runs"}, {"prompt": "b", "completion": "a a a"}]
    projection = ProjectionConfig(layers=("all",), rank_total=16, compress="none", precondition="none")
    options: dict[str, Any] = {"projection": projection, "proj_dtype": "float32", "loss_reduction": "sum"}
    ghoststore.build(checkpoint=tmp_path / "model", data=ROWS, store=store, **options)
    rows, _ = gradients(model, tokenizer, ROWS, "sum")
    vals, _ = gradients(model, tokenizer, val, "sum")
    asked: dict[str, Any] = {"store": store, "val_set": val, "metric": "dot", "data": ROWS, "top_k": 4}
    plain = ghoststore.query(**asked, checkpoint=model, tokenizer=tokenizer)
    assert [hit.text for hit in plain.results[0].hits if hit.text]
    exact = ghoststore.query(**asked, rerank=4)
    scores = {hit.source_row: hit.score for hit in exact.results[0].hits}
    expected = rows @ vals.mean(0)
    assert far(torch.tensor([scores[row] for row in range(4)]).double(), expected) < 2e-5
    stored = torch.tensor([hit.score for hit in plain.results[0].hits]).double()
    assert far(stored, expected.sort(descending=True).values) > 1e-3  # the second stage did something
    with pytest.raises(UsageError, match="is of a model with an encoder: leave `tokens` out"):
        ghoststore.query(**asked, tokens=True)


def test_full_gradients(tokenizer: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = make("bart", tokenizer)
    ghoststore.full_gradients(checkpoint=model, tokenizer=tokenizer, data=ROWS, out=tmp_path / "out")
    expected, _ = gradients(model, tokenizer, ROWS)
    (path,) = (tmp_path / "out").glob("*.safetensors")
    found = torch.cat([tensor.reshape(len(ROWS), -1) for tensor in load_file(path).values()], 1).double()
    assert far(found @ found.T, expected @ expected.T) < 1e-5


def test_lengths(tokenizer: Any, tmp_path: Path) -> None:
    """Either side is cut at ``max_length``, the decoder's with its start token; statuses are those of other rows."""
    model = make("t5", tokenizer)
    rows = [
        *ROWS,
        {"prompt": "a", "completion": ""},
        {"prompt": None, "completion": "a"},
        {"prompt": "", "completion": "a"},
    ]
    options: dict[str, Any] = {"checkpoint": model, "tokenizer": tokenizer, "data": rows, "max_length": 8}
    report = ghoststore.build(**options, store=tmp_path / "store", projection=WHOLE, proj_dtype="float32")
    part = ghoststore.Store.open(tmp_path / "store").part()
    assert max(part.read_rows("n_tokens", range(part.rows))) == 7
    assert report.statuses["truncated"] == 2
    assert report.statuses["no_targets"] == 1
    vectors = torch.from_numpy(np.asarray(part.read_rows("vectors", range(4)))).double()
    ids = [tokenizer(text_target=ROWS[3]["completion"])["input_ids"][:7]]
    loss = model(input_ids=torch.tensor([tokenizer("one")["input_ids"]]), labels=torch.tensor(ids)).loss
    parameters = list(model.parameters())
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double().norm()
    assert float(vectors[3].norm()) == pytest.approx(float(norm), rel=1e-5)
    with pytest.raises(CorpusError, match=r"tokens in its prompt and .* in its completion; `max_length` is 8"):
        ghoststore.build(**options, store=tmp_path / "other", overlong="error")
    with pytest.raises(UsageError, match="cannot be cut into windows"):
        ghoststore.build(**options, store=tmp_path / "other", overlong="window")


@pytest.mark.parametrize("name", MODELS)
def test_the_start_of_a_cut_row(name: str, tokenizer: Any) -> None:
    """The decoder starts a completion that is cut as it starts the whole: mBart with the token that ends it."""
    rows = tokenizer_for(make(name, tokenizer), tokenizer)
    samples = list(Corpus.open([{**ROWS[2], "completion": ROWS[3]["completion"]}]).samples())
    ((whole,),) = rows.rows(samples, LONG)
    ((cut,),) = rows.rows(samples, TokenSettings(max_length=6))
    assert cut.source is not None
    assert whole.source is not None
    assert min(len(whole.tokens), len(whole.source)) > 6
    assert cut.tokens.tolist() == whole.tokens[:6].tolist()
    assert cut.source.tolist() == whole.source[:6].tolist()


def test_refused(tokenizer: Any, tmp_path: Path) -> None:
    """Before a part is begun. Commands for causal models name those that take it."""
    model = make("t5", tokenizer)
    chat = [{"messages": [{"role": "user", "content": "a"}]}]
    for data in (["a text"], chat):
        with pytest.raises(UsageError, match=r"give rows with two texts, `fields\.prompt` and `fields\.completion`"):
            ghoststore.build(checkpoint=model, tokenizer=tokenizer, data=data, store=tmp_path / "store")
    assert not (tmp_path / "store" / "parts").exists()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="has an encoder and a decoder, and a causal language model is expected"):
        ghoststore.train(checkpoint=tmp_path / "model", data=ROWS, output_dir=tmp_path / "out", method="Regular")
    with pytest.raises(CheckpointError, match="`ghoststore build`, `query` of its parts"):
        ghoststore.doctor(checkpoint=tmp_path / "model")


def test_a_decoder_alone_is_causal(tokenizer: Any, tmp_path: Path) -> None:
    """A folder of BartForCausalLM is no encoder-decoder model."""
    model = _bart(BartForCausalLM, BartConfig, len(tokenizer))
    settle(model).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    projection = ProjectionConfig(exclude_layers=("encoder_attn",))
    data = [row["prompt"] for row in ROWS]
    ghoststore.build(checkpoint=tmp_path / "model", data=data, store=tmp_path / "store", projection=projection)
    part = ghoststore.Store.open(tmp_path / "store").part()
    assert part.manifest["loss"]["definition"].startswith("next-token")


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_default_part(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """Learned and preconditioned, it is asked with every second stage; a build that continues has the same rows."""
    model = make(name, tokenizer)
    options: dict[str, Any] = {"checkpoint": model, "tokenizer": tokenizer, "data": ROWS, "store": tmp_path / "store"}
    ghoststore.build(**options, span_rows=2)
    part = ghoststore.Store.open(tmp_path / "store").part()
    assert part.manifest["loss"]["definition"].startswith("cross-entropy of the tokens of each sample's completion")
    before = np.asarray(part.read_rows("vectors", range(part.rows)))
    next(path for path in sorted(part.path.glob("vectors/c/1/**/*")) if path.is_file()).unlink()
    ghoststore.repair(store=tmp_path / "store", checkpoint=model, tokenizer=tokenizer, data=ROWS)
    part = ghoststore.Store.open(tmp_path / "store").part()
    assert np.array_equal(before, part.read_rows("vectors", range(part.rows)))
    for kind in ("exact", "ekfac", "cg"):
        result = ghoststore.query(**options, val_set=ROWS[:1], rerank=4, rerank_with=kind, top_k=4, metric="dot")
        assert result.results[0].hits[0].source_row == 0
    with pytest.raises(UsageError, match="is no such pair"):
        ghoststore.query(**options, val_set=["a text"])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_products_of_conjugate_gradients(name: str, tokenizer: Any) -> None:
    """Jᵀ(diag p - p pᵀ)J v of the mean loss, by transformers' own logits for the labels of each row alone."""
    model = make(name, tokenizer).double()
    rows = [row for (row,) in tokenizer_for(model, tokenizer).rows(list(Corpus.open(ROWS).samples()), LONG)]
    blocks = select_blocks(model, ("mlp",)).blocks
    vectors = [torch.randn(1, b.n_out, b.n_in, generator=torch.Generator().manual_seed(0)).double() for b in blocks]
    found = GaussNewton(model, blocks, rows, batch_tokens=4096).times(vectors)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents: dict[str, Any] = {}
    for block, vector in zip(blocks, vectors, strict=True):
        tangents |= block.take_apart(vector[0], parameters)
    total = {name: torch.zeros_like(parameters[name]) for name in tangents}
    for row in ROWS:
        labels = torch.tensor([tokenizer(text_target=row["completion"])["input_ids"]])
        settings = {"input_ids": torch.tensor([tokenizer(row["prompt"])["input_ids"]]), "labels": labels}

        def logits(changed: dict[str, Any], settings: dict[str, Any] = settings) -> Any:
            return torch.func.functional_call(model, {**parameters, **changed}, (), settings).logits

        with sdpa_kernel(SDPBackend.MATH):
            own = {name: parameters[name] for name in tangents}
            z, moved = torch.func.jvp(logits, (own,), (tangents,))
            p = z.softmax(-1)
            upstream = (p * moved - p * (p * moved).sum(-1, keepdim=True)) / labels.numel()
            (back,) = torch.func.vjp(logits, own)[1](upstream)
        for name, gradient in back.items():
            total[name] += gradient / len(ROWS)
    for block, product in zip(blocks, found, strict=True):
        assert far(product[0], block.lay_out(total)) < 1e-6
