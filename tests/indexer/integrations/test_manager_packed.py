"""GhostEngineManager with packed rows: each sample has its place and its score in the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from ghoststore import Choosing, GhostConfig, GhostEngineManager, packed_samples
from ghoststore.errors import UsageError
from tests.support.loops import ROWS, VAL_BATCH, close_to, exact_scores, identical, plan, run_of, steps_of, weights_of
from tests.support.models import gpt2

STEPS = 4


def still() -> Any:
    return gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False).train()


def flat(places: list[int]) -> Any:
    rows = [{"input_ids": ROWS[place][0].tolist(), "labels": ROWS[place][1].tolist()} for place in places]
    return DataCollatorWithFlattening(return_tensors="pt")(rows)


def trained(folder: Path | None) -> tuple[Any, list[Any]]:
    """(weights, exact scores of each step); a plain loop without a folder."""
    model = still()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    given = {"method": "Regular"} if folder is None else {"store": folder, "samples": len(ROWS)}
    config = GhostConfig(**given, max_steps=STEPS, batch_size=4, gradient_accumulation_steps=2)
    due = []
    with GhostEngineManager(config, model, optimizer, None if folder is None else VAL_BATCH) as manager:
        for step, parts in enumerate(plan(STEPS, accumulation=2)):
            due.append(torch.cat([exact_scores(model, places, still) for places in parts]))
            for places in parts:
                batch = flat(places)
                ids, labels = batch["input_ids"], batch["labels"]
                segments = packed_samples(batch, len(places))
                manager.attach_train_batch(ids, labels, step, torch.tensor(places), segments=segments)
                manager.prepare_forward_input(ids, labels)
                (model(**batch).loss / 2).backward()
                manager.prepare_gradients()
            optimizer.step()
            manager.aggregate_and_log()
            optimizer.zero_grad()
    return weights_of(model), due


def test_weights_stay_and_scores_are_exact(tmp_path: Path) -> None:
    weights, due = trained(tmp_path / "store")
    assert identical(weights, trained(None)[0])
    for step, places, scores in steps_of(run_of(tmp_path / "store")):
        assert places.tolist() == [place for part in plan(STEPS, accumulation=2)[step] for place in part]
        close_to(scores, due[step], 2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": torch.zeros(2, 9, dtype=torch.long)}, "of 2 packed rows; the batch has 1"),
        ({"batch_idx": torch.tensor([0, 1])}, "place of each of the 3 samples"),
        ({"choosing": Choosing(keep=1)}, "packed rows hold several samples: pad them"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, batch = still(), flat([0, 1, 2])
    config = GhostConfig(
        store=tmp_path / "store", samples=3, max_steps=1, batch_size=4, choosing=change.pop("choosing", None)
    )
    given = {"batch_idx": torch.arange(3), "segments": packed_samples(batch, 3), **change}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with (
        GhostEngineManager(config, model, optimizer, VAL_BATCH) as manager,
        pytest.raises(UsageError, match=message),
    ):
        manager.attach_train_batch(batch["input_ids"], batch["labels"], 0, **given)
