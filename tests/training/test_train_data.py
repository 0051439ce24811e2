"""Which tokens a training sees, in which order, and what it learns to predict from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import ghoststore
from ghoststore.corpus import Fields, open_corpus
from ghoststore.errors import CorpusError, UsageError
from ghoststore.tokens.shards import TokenShards
from indexer.encode.encoder import pad
from indexer.encode.losses import training_loss
from indexer.encode.tokens import Row, Tokenizer, TokenSettings, rows_of
from indexer.training.data import Order, TrainingRows
from tests.support.trainings import same_bits

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.support.trainings import Gym


@pytest.fixture(scope="module")
def shards(gym: Gym) -> dict[str, TokenShards]:
    """Of the corpora with prompts, and with long and empty rows; several shards each."""
    found = {}
    rows = [*map(json.loads, gym.data["long"].read_text().splitlines())]
    holes = [{"id": "empty", "text": "", "domain": "sky"}, {"id": "one", "text": "a", "domain": "sky"}]
    gym.data["holes"] = gym.lab.write(gym.folder / "holes.jsonl", [*holes, *rows, *({**h, "id": "x"} for h in holes)])
    for name in ("prompts", "holes"):
        out = gym.folder / f"shards-{name}"
        ghoststore.tokenize(data=gym.data[name], tokenizer=gym.models["tiny"], out=out, shard_samples=7)
        found[name] = TokenShards.open(out)
    return found


def rows_as_built(gym: Gym, data: str, max_length: int, overlong: Any) -> list[Row]:
    """The rows that a build makes of a corpus."""
    tokenizer = Tokenizer(AutoTokenizer.from_pretrained(gym.models["tiny"]))
    with open_corpus(str(gym.data[data]), Fields()) as corpus:
        return list(rows_of(corpus.samples(), tokenizer, TokenSettings(max_length=max_length, overlong=overlong)))


@pytest.mark.thin
@pytest.mark.parametrize("data", ["prompts", "holes"])
@pytest.mark.parametrize(("max_length", "overlong"), [(32, "window"), (9, "window"), (2, "window"), (9, "truncate")])
def test_rows_are_those_of_a_build(
    gym: Gym, shards: dict[str, TokenShards], data: str, max_length: int, overlong: Any
) -> None:
    built = rows_as_built(gym, data, max_length, overlong)
    rows = TrainingRows.cut(shards[data], max_length, overlong)
    assert len(rows) == len(built)
    assert rows.usable.tolist() == [place for place, row in enumerate(built) if row.status.usable]
    table = rows.table()
    assert table.sample_id.tolist() == [row.sample.id for row in built]
    assert table.source_row.tolist() == [row.sample.source_row for row in built]
    assert table.window_start.tolist() == [row.window_start for row in built]
    assert table.n_tokens.tolist() == [len(row.tokens) for row in built]
    chosen = rows.usable[::3]
    batch = rows.batch(chosen)
    expected = pad([built[place] for place in chosen])
    for found, wanted in zip((batch.input_ids, batch.labels, batch.attention_mask), expected, strict=True):
        assert torch.equal(found, wanted)
    assert rows.targets_of(chosen) == int((batch.labels[:, 1:] != -100).sum())


def test_windows_cover_every_token_once(gym: Gym, shards: dict[str, TokenShards]) -> None:
    """Every token of a sample but the first (or the prompt) is a target in exactly one window."""
    for data in ("prompts", "holes"):
        rows = TrainingRows.cut(shards[data], 5, "window")
        seen = [np.zeros(length, dtype=int) for length in shards[data].length]
        for place in rows.usable:
            batch = rows.batch(np.array([place]))
            start, sample = int(rows.window_start[place]), int(rows.sample[place])
            targets = (batch.labels[0] != -100).nonzero().flatten().numpy()
            assert targets.min() >= 1
            seen[sample][start + targets] += 1
            tokens = shards[data].tokens_of(sample)
            assert batch.labels[0, targets].tolist() == tokens[start + targets].tolist()
        for sample, counts in enumerate(seen):
            first = int(shards[data].first_target[sample])
            assert counts.tolist() == [0] * min(first, len(counts)) + [1] * (len(counts) - first)


def test_rows_lead_back_to_their_source(gym: Gym) -> None:
    trained = gym.train(corpus="long", max_length=9, model="two", dot_prod_save_interval=1, checkpoint_interval=5)
    columns = {name: trained.rows(name) for name in ("sample_id", "source_row", "source_offset", "domain")}
    lines = gym.data["long"].read_bytes()
    domains = trained.run.manifest["corpus"]["domains"]
    for row in trained.arrays()["sample"][:, 0].ravel().tolist():
        line = json.loads(lines[columns["source_offset"][row] :].split(b"\n", 1)[0])
        assert line["id"] == columns["sample_id"][row] == f"long-{columns['source_row'][row]}"
        assert line["domain"] == domains[columns["domain"][row]]


@given(step_rows=st.integers(1, 40), seed=st.integers(0, 3), epochs=st.integers(1, 3))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_row_once_an_epoch(shards: dict[str, TokenShards], step_rows: int, seed: int, epochs: int) -> None:
    rows = TrainingRows.cut(shards["holes"], 9, "window")
    order, count = Order(rows, seed=seed, step_rows=step_rows), len(rows.usable)
    steps = -(-epochs * count // step_rows)
    seen = np.concatenate([order.rows_of(step) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count].tolist()) == rows.usable.tolist()
    assert order.steps_per_epoch == -(-count // step_rows)
    again = Order(rows, seed=seed, step_rows=step_rows)  # in any order of asking
    for step in reversed(range(steps)):
        assert again.rows_of(step).tolist() == order.rows_of(step).tolist()
    if epochs > 1:
        assert seen[:count].tolist() != seen[count : 2 * count].tolist()
    assert Order(rows, seed=seed + 1, step_rows=step_rows).rows_of(0).tolist() != seen[:step_rows].tolist() or (
        step_rows == 1
    )


@given(step_rows=st.integers(1, 21), seed=st.integers(0, 3), epochs=st.integers(2, 5))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_row_twice_in_a_step(shards: dict[str, TokenShards], step_rows: int, seed: int, epochs: int) -> None:
    """Of candidates: not where a step reaches over the end of an epoch either, and every row is there once an epoch."""
    rows = TrainingRows.cut(shards["holes"], 9, "window")
    count = len(rows.usable)
    step_rows = min(step_rows, count)
    order, plain = (Order(rows, seed=seed, step_rows=step_rows, apart=apart) for apart in (True, False))
    steps = epochs * count // step_rows
    each = [order.rows_of(step) for step in range(steps)]
    assert all(len(set(drawn.tolist())) == step_rows for drawn in each)
    seen = np.concatenate(each)
    for epoch in range(epochs - 1):
        assert sorted(seen[epoch * count : (epoch + 1) * count].tolist()) == rows.usable.tolist()
    for step in range(count // step_rows):
        assert each[step].tolist() == plain.rows_of(step).tolist()
    again = Order(rows, seed=seed, step_rows=step_rows, apart=True)  # in any order of asking
    for step in reversed(range(steps)):
        assert again.rows_of(step).tolist() == each[step].tolist()
        fresh = Order(rows, seed=seed, step_rows=step_rows, apart=True)
        assert fresh.rows_of(step).tolist() == each[step].tolist()


def test_default_is_one_pass(gym: Gym) -> None:
    trained = gym.train(corpus="prompts", max_steps=None, batch_size=4)
    assert trained.report.steps == 8
    seen = trained.arrays()["sample"].ravel().tolist()
    assert sorted(seen[:30]) == list(range(30))


def test_domains_alone(gym: Gym, shards: dict[str, TokenShards]) -> None:
    rows = TrainingRows.cut(shards["prompts"], 32, "window", ("law", "news"))
    assert {shards["prompts"].domains[d] for d in rows.table().domain} == {"law", "news"}
    assert len(rows) == 20
    with pytest.raises(UsageError, match=r"has no domain 'sport'; it has: law, code, news|it has: code, law, news"):
        TrainingRows.cut(shards["prompts"], 32, "window", ("sport",))


def test_overlong_rows(shards: dict[str, TokenShards]) -> None:
    with pytest.raises(CorpusError, match=r"sample 'long-\d+' has \d+ tokens; `max_length` is 9 and `overlong` is err"):
        TrainingRows.cut(shards["holes"], 9, "error")
    short = TrainingRows.cut(shards["holes"], 9, "skip")
    assert short.length.max() <= 9
    assert set(short.sample) == set((shards["holes"].length <= 9).nonzero()[0])
    with pytest.raises(CorpusError, match="has no row to train on"):
        TrainingRows.cut(shards["holes"], 2, "skip")


def test_tokens_of_a_part_of_a_sample(shards: dict[str, TokenShards]) -> None:
    whole = shards["holes"].tokens_of(4)
    assert shards["holes"].tokens_of(4, 1, 3).tolist() == whole[1:3].tolist()
    assert shards["holes"].tokens_of(4, 1, 10_000).tolist() == whole[1:].tolist()
    assert shards["holes"].tokens_of(4, len(whole)).tolist() == []


def test_training_from_shards_is_training_from_the_corpus(gym: Gym, tmp_path: Path) -> None:
    for data, options in (("prompts", {}), ("plain", {"method": "Regular", "val_set": None})):
        out = tmp_path / f"shards-{data}"
        ghoststore.tokenize(data=gym.data[data], tokenizer=gym.models["tiny"], out=out, shard_samples=4)
        of_shards = gym.fresh(tmp_path / data, data, **options, data=out, max_steps=6)
        of_corpus = gym.train(data, **options, max_steps=6)
        assert same_bits(of_shards.weights(), of_corpus.weights()) == []
        assert same_bits(of_shards.arrays(), of_corpus.arrays()) == []
        for column in ("sample_id", "domain", "source_row", "source_offset", "window_start"):
            assert of_shards.rows(column) == of_corpus.rows(column)
        sections = ("model", "tokenizer", "corpus", "val", "training", "scoring", "storage")
        stored, other = of_shards.run.manifest, of_corpus.run.manifest
        assert [name for name in sections if stored[name] != other[name]] == []


@pytest.mark.slow
def test_a_run_of_a_corpus_goes_on_from_its_shards(gym: Gym, tmp_path: Path) -> None:
    trained = gym.fresh(tmp_path, "prompts", max_steps=4, checkpoint_interval=2)
    shutil.rmtree(trained.checkpoint(4))
    tokens = Path(shutil.copytree(trained.output / "tokens", tmp_path / "tokens"))
    again = gym.fresh(tmp_path, "prompts", data=tokens, max_steps=4, checkpoint_interval=2)
    assert again.report.resumed_from == 2
    assert trained.run.complete


def test_it_learns_the_next_token_and_not_the_one_after(lab: Lab, gym: Gym, tmp_path: Path) -> None:
    """A cycle of words: greedy decoding repeats it, in a model that was trained on batches with padding."""
    cycle = ["the", "cat", "sees", "a", "red", "bird", "under", "old", "tree", "river"]
    texts = [" ".join((cycle * 3)[start : start + 8 + start % 3]) for start in range(10)]
    data = lab.write(tmp_path / "cycle.jsonl", [{"text": text} for text in texts])
    trained = gym.fresh(
        tmp_path,
        data=data,
        val_set=data,
        method="Regular",
        max_steps=80,
        batch_size=10,
        learning_rate=2e-2,
        eval_interval=80,
    )
    assert trained.report.val_loss < 0.7
    model = AutoModelForCausalLM.from_pretrained(trained.checkpoint()).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.checkpoint())
    ids = tokenizer(" ".join((cycle * 2)[:3]))["input_ids"]
    text = " ".join(cycle * 2)
    wanted = tokenizer(text)["input_ids"]
    while len(ids) < 17:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids == wanted[:17]


def test_padding_and_later_tokens_change_no_loss(gym: Gym, shards: dict[str, TokenShards]) -> None:
    model = AutoModelForCausalLM.from_pretrained(gym.models["two"], attn_implementation="sdpa").train()
    rows = TrainingRows.cut(shards["holes"], 32, "window")
    batch = rows.batch(rows.usable)
    assert len(set(rows.length[rows.usable].tolist())) > 3
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        for place, row in enumerate(rows.usable):
            alone = rows.batch(np.array([row]))
            other = model(input_ids=alone.input_ids, attention_mask=alone.attention_mask).logits
            length = int(rows.length[row])
            torch.testing.assert_close(logits[place : place + 1, :length], other, atol=2e-6, rtol=1e-5)
        changed = batch.input_ids.clone()
        changed[:, 3:] = (changed[:, 3:] + 1) % 290
        later = model(input_ids=changed, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(later[:, :3], logits[:, :3], atol=2e-6, rtol=1e-5)
    _, together = training_loss(logits.clone(), batch.labels, 1.0)
    for place, row in enumerate(rows.usable):
        alone = rows.batch(np.array([row]))
        with torch.no_grad():
            single = model(input_ids=alone.input_ids, attention_mask=alone.attention_mask).logits
        _, loss = training_loss(single, alone.labels, 1.0)
        assert float(together[place]) == pytest.approx(float(loss), rel=2e-6)
