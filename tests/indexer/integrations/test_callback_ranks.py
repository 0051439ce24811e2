"""The callback in two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.loops import (
    batch_of,
    close_to,
    exact_scores,
    identical,
    in_ranks,
    run_of,
    weights_of,
)
from tests.support.models import gpt2
from tests.support.trainers import (
    Watcher,
    callback_of,
    dataset,
    trainer_of,
)


@pytest.mark.slow
def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():  # as torchrun sets them
        monkeypatch.setenv(name, value)

    def work(rank: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found = []
        for scored in (True, False):
            watcher = Watcher()
            callbacks = [watcher, callback_of(tmp_path / "store")] if scored else [watcher]
            settings = {"max_steps": 6, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
            if scored:
                settings |= {"save_strategy": "steps", "save_steps": 3}
            model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            rows = dataset(sample=scored)
            trainer_of(tmp_path, callbacks, model=model, rows=rows, ddp_backend="gloo", **settings).train()
            found.append(weights_of(model))
            if scored and rank == 0:
                torch.save(watcher.weights, tmp_path / "weights")
        assert identical(*found)

    in_ranks(2, work, tmp_path)
    run, twin = run_of(tmp_path / "store", "trainer"), gpt2()
    assert run.complete
    assert run.layout.ranks == 2
    weights = torch.load(tmp_path / "weights")
    sample, score, losses = (run.read_committed(name) for name in ("sample", "score", "train_loss"))
    for step in range(run.steps):
        twin.load_state_dict(weights[step])
        places = sample[step].flatten()
        there = places >= 0
        close_to(score[step].flatten()[there], exact_scores(twin, places[there].tolist()), 2e-5)
        ids, labels, _ = batch_of(places[there].tolist())
        with torch.no_grad():
            assert losses[step] == pytest.approx(float(twin(input_ids=ids, labels=labels).loss), rel=1e-5)
