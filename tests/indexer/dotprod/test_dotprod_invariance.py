"""A sample's score is its own: alone, padded, reordered, in other company; and it looks at no later token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from indexer.dotprod import language_model_losses, target_counts
from indexer.encode.losses import IGNORED
from tests.support.models import CAUSAL, VOCABULARY, examples, gpt2, llama, pad
from tests.support.scoring import BATCH, VAL, agree, causal_engine, causal_step, check, exact_causal, val_batch

COMPANY = {
    "alone": [[0], [1], [2], [3]],
    "reversed": [[3, 2, 1, 0]],
    "pairs": [[0, 1], [2, 3]],
    "others": [[3, 1], [0], [2]],
    "twice": [[1, 1, 0], [3, 2, 3]],
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_the_company_of_a_sample_does_not_matter(architecture: str) -> None:
    model = CAUSAL[architecture]()
    with causal_engine(model) as engine:
        together = causal_step(engine, model).total
        for batches in COMPANY.values():
            found = torch.zeros_like(together)
            for places in batches:
                scores = causal_step(engine, model, [BATCH[place] for place in places]).total
                for place, score in zip(places, scores, strict=True):
                    found[place] = score
            agree(found, together)


@pytest.mark.parametrize("longer", [1, 7])
def test_padding_does_not_matter(longer: int) -> None:
    model = llama()
    ids, labels, mask = pad(BATCH)
    padded = [
        torch.nn.functional.pad(x, (0, longer), value=value) for x, value in ((ids, 5), (labels, IGNORED), (mask, 0))
    ]
    with causal_engine(model) as engine:
        engine.prepare(4)
        loss = model(input_ids=padded[0], attention_mask=padded[2], labels=padded[1]).loss
        engine.watch(loss, labels=padded[1])
        loss.backward()
        check(engine.collect(), exact_causal(model, val=VAL[:3]))


def without_targets(*places: int) -> list[Any]:
    return [
        (ids, torch.full_like(labels, IGNORED) if place in places else labels)
        for place, (ids, labels) in enumerate(BATCH)
    ]


@pytest.mark.parametrize("places", [(0,), (1, 3)])
def test_samples_without_targets_have_no_score_and_hurt_nobody(places: tuple[int, ...]) -> None:
    model = gpt2()
    expected = exact_causal(model, val=VAL[:3]).total().mean(1)
    with causal_engine(model, pairs=True) as engine:
        scores = causal_step(engine, model, without_targets(*places))
    others = [place for place in range(4) if place not in places]
    agree(scores.total[others], expected[others])
    assert scores.pairs is not None
    agree(scores.pairs[others][:, others], exact_causal(model, val=BATCH).total()[others][:, others])
    gone = list(places)
    assert bool(scores.total[gone].isnan().all())
    assert bool(scores.groups[gone].isnan().all())
    assert bool(scores.pairs[gone].isnan().all())
    assert bool(scores.pairs[:, gone].isnan().all())
    for value in (*scores.parameters.values(), *scores.blocks.values()):
        assert torch.equal(value.isnan(), scores.total.isnan())


def test_a_batch_without_any_targets_has_no_scores_and_the_next_is_unharmed() -> None:
    model = gpt2()
    with causal_engine(model) as engine:
        with torch.no_grad():
            assert bool(model(**val_batch(without_targets(0, 1, 2, 3))).loss.isnan()), "transformers: 0 / 0"
        none = causal_step(engine, model, without_targets(0, 1, 2, 3))
        assert bool(none.total.isnan().all())
        check(causal_step(engine, model), exact_causal(model, val=VAL[:3]))


# The shift of the labels.


@pytest.mark.parametrize("architecture", CAUSAL)
def test_labels_are_shifted_exactly_once(architecture: str) -> None:
    # transformers' own loss of each sample, which shifts inside, is the judge.
    model = CAUSAL[architecture]()
    with torch.no_grad():
        own = torch.stack([model(input_ids=ids[None], labels=labels[None]).loss for ids, labels in BATCH])
        found = language_model_losses(model, val_batch(BATCH))
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(language_model_losses(model, pad(BATCH)), own, rtol=1e-5, atol=1e-6)
        counts = target_counts(pad(BATCH)[1])
        assert counts.tolist() == [int((labels[1:] != IGNORED).sum()) for _, labels in BATCH]
        whole = model(**val_batch(BATCH)).loss
    torch.testing.assert_close((own * counts).sum() / counts.sum(), whole, rtol=1e-5, atol=1e-6)


def test_a_model_that_copies_the_next_token_has_no_loss() -> None:
    # If labels were shifted twice, the token after the next would be wanted.
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])

    class Knowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, input_ids: Tensor) -> Any:
            logits = torch.zeros(*input_ids.shape, 10).scatter(2, input_ids.roll(-1, 1).unsqueeze(2), 50.0)
            return SimpleNamespace(logits=logits * self.weight)

    with torch.no_grad():
        assert float(language_model_losses(Knowing(), {"input_ids": ids, "labels": ids})[0]) < 1e-6


# Causality.


@pytest.mark.thin(2)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_later_token_does_not_change_what_was_scored_before_it(make: Any, attention: str) -> None:
    model = make(attn_implementation=attention)
    batch = examples((20, 12, 16), masked=False, seed=5)
    for _, labels in batch:
        labels[9:] = IGNORED
    changed = [(torch.cat([ids[:9], (ids[9:] + 1) % VOCABULARY]), labels) for ids, labels in batch]
    short = [(ids[:9], labels[:9]) for ids, labels in batch]
    with causal_engine(model) as engine:
        expected = causal_step(engine, model, short).total
        agree(causal_step(engine, model, batch).total, expected)
        agree(causal_step(engine, model, changed).total, expected)
    agree(expected, exact_causal(model, short, VAL[:3]).total().mean(1))


def test_a_later_token_of_a_val_sample_changes_nothing_either() -> None:
    model = llama()
    found = []
    for shift in (0, 1):
        val = []
        for ids, labels in examples((20, 12), masked=False, seed=5):
            labels[9:] = IGNORED
            val.append((torch.cat([ids[:9], (ids[9:] + shift) % VOCABULARY]), labels))
        with causal_engine(model, val) as engine:
            found.append(causal_step(engine, model).total)
    agree(found[1], found[0])
