"""GhostStoreCallback finds by itself which samples a batch holds, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, Trainer

from ghoststore import Choosing, GhostStoreCallback
from ghoststore.errors import UsageError
from indexer.integrations.numbering import Numbering
from indexer.session.samples import Samples
from tests.support.loops import (
    ROWS,
    VAL_BATCH,
    close_to,
    exact_scores,
    identical,
    in_ranks,
    run_of,
    steps_of,
    weights_of,
)
from tests.support.models import gpt2
from tests.support.trainers import StopAt, Watcher, callback_of, collate, dataset, trainer_of

ORDER = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(2)).tolist()


def still() -> Any:
    return gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A dataset that is none of the library ``datasets``; ``sample`` where it is asked for."""

    def __init__(self, *, sample: bool) -> None:
        self._sample = sample

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, place: int) -> dict[str, Any]:
        ids, labels = ROWS[ORDER[place] if self._sample else place]
        row = {"input_ids": ids.tolist(), "labels": labels.tolist()}
        return {**row, "sample": ORDER[place]} if self._sample else row


FORMS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "no column": (lambda: dataset(sample=False), {}),
    "a column that the Trainer takes out": (lambda: dataset().select(ORDER), {"remove_unused_columns": True}),
    "a column that the collator drops": (
        lambda: dataset().select(ORDER),
        {"data_collator": lambda rows: {k: v for k, v in collate(rows).items() if k != "sample"}},
    ),
    "a column that the collator passes on": (lambda: dataset().select(ORDER), {}),
    "fewer rows, with a column": (lambda: dataset().select(ORDER[:9]), {"remove_unused_columns": True}),
    "another kind of dataset": (lambda: Rows(sample=False), {"remove_unused_columns": True}),
    "another kind of dataset that names them": (lambda: Rows(sample=True), {}),
    "workers": (lambda: dataset(sample=False), {"dataloader_num_workers": 2}),
    "a stream with a column": (lambda: dataset().to_iterable_dataset(), {}),
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_numbered(form: str, tmp_path: Path) -> None:
    rows, settings = FORMS[form]
    plain = trainer_of(tmp_path, [], model=still(), rows=rows(), max_steps=5, **settings)
    plain.train()
    watcher = Watcher()
    callback = callback_of(tmp_path / "store")
    trainer = trainer_of(tmp_path, [watcher, callback], model=still(), rows=rows(), max_steps=5, **settings)
    trainer.train()
    assert identical(weights_of(trainer.model), weights_of(plain.model))
    for step, places, scores in steps_of(run_of(tmp_path / "store", "trainer")):
        twin = still()
        twin.load_state_dict(watcher.weights[step])
        close_to(scores, exact_scores(twin, places.tolist()), 2e-5)


def test_a_run_without_names_has_those_of_the_rows(tmp_path: Path) -> None:
    callback = GhostStoreCallback(store=tmp_path / "store", val_data=VAL_BATCH)
    trainer_of(tmp_path, [callback], rows=dataset(sample=False), max_steps=4).train()
    run = run_of(tmp_path / "store", "trainer")
    assert run.manifest["corpus"]["samples"] == len(ROWS)
    assert sorted(np.concatenate([places for _, places, _ in steps_of(run)]).tolist()) == list(range(len(ROWS)))


@pytest.mark.slow
def test_resuming_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """transformers reads the rest of the epoch from another DataLoader."""
    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, [callback_of(tmp_path / "whole")], rows=dataset(sample=False), **settings).train()
    for again in (False, True):
        trainer = trainer_of(
            tmp_path, [callback_of(tmp_path / "parts")], rows=dataset(sample=False), **{**settings, "max_steps": 6}
        )
        if not again:
            trainer.add_callback(StopAt(2))
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2") if again else None)
    whole, parts = (list(steps_of(run_of(tmp_path / name, "trainer"))) for name in ("whole", "parts"))
    assert len(whole) == len(parts) == 6
    for (_, places, scores), (_, others, again_scores) in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(places, others)
        np.testing.assert_array_equal(scores, again_scores)


@pytest.mark.ddp
def test_each_rank_numbers_its_own(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        callback = callback_of(tmp_path / "store")
        trainer_of(
            tmp_path, [callback], model=still(), rows=dataset(sample=False), max_steps=3, **{"ddp_backend": "gloo"}
        ).train()

    in_ranks(2, work, tmp_path)
    run = run_of(tmp_path / "store", "trainer")
    sample = run.read_committed("sample")
    assert sample.shape[1] == 2
    first = sample[0][sample[0] >= 0]
    assert len(set(first.tolist())) == len(first) == 8


class Flattened:
    def __init__(self) -> None:
        self.collate = DataCollatorWithFlattening(return_tensors="pt")

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        return self.collate([{k: v for k, v in row.items() if k != "sample"} for row in rows])


def test_the_collator_that_flattens(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "data_collator": Flattened(), "gradient_accumulation_steps": 2}
    plain = trainer_of(tmp_path, [], model=still(), **settings)
    plain.train()
    watcher, callback = Watcher(), callback_of(tmp_path / "store")
    trainer = trainer_of(tmp_path, [watcher, callback], model=still(), **settings)
    trainer.train()
    assert identical(weights_of(trainer.model), weights_of(plain.model))
    for step, places, scores in steps_of(run_of(tmp_path / "store", "trainer")):
        assert len(places) > 4
        twin = still()
        twin.load_state_dict(watcher.weights[step])
        close_to(scores, exact_scores(twin, places.tolist()), 2e-5)


def test_flattened_rows_that_do_not_say_where_samples_begin(tmp_path: Path) -> None:
    """With the collator that the error names it is exact: the test above."""
    bare = DataCollatorWithFlattening(return_tensors="pt", return_position_ids=False)
    trainer = trainer_of(tmp_path, [callback := callback_of(tmp_path / "store")], model=still(), max_steps=2)
    trainer.data_collator = lambda rows: bare([{k: v for k, v in row.items() if k != "sample"} for row in rows])
    before = weights_of(trainer.model)
    with pytest.raises(UsageError, match=r"no `position_ids` say where each begins.*DataCollatorWithFlattening"):
        trainer.train()
    callback.close()
    assert identical(weights_of(trainer.model), before)


@pytest.mark.slow
def test_choosing_among_packed_rows(tmp_path: Path) -> None:
    """Where rows are padded, as the error says, samples are chosen."""
    choosing = Choosing(keep=2)
    callback = callback_of(tmp_path / "flat", choosing=choosing)
    with pytest.raises(UsageError, match="packed rows hold several samples: train without packing"):
        trainer_of(tmp_path, [callback], model=still(), max_steps=2, data_collator=Flattened()).train()
    callback.close()
    trainer_of(tmp_path, [callback_of(tmp_path / "store", choosing=choosing)], model=still(), max_steps=2).train()


# What is refused.


def packed(**columns: Any) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [[1, 2, 3, 4], [5, 6, 7]],
            "labels": [[1, 2, 3, 4], [5, 6, 7]],
            "seq_lengths": [[3, 1], [3]],
            **columns,
        }
    )


def test_numbers_of_packed_rows() -> None:
    numbering = Numbering.of(packed(), "sample", None)
    assert numbering.ids == ("0:0", "0:1", "1:0")
    assert numbering.of_rows([1, 0]).tolist() == [2, 0, 1]
    assert (numbering.most_of(1), numbering.most_of(2), numbering.most_of(9)) == (2, 3, 3)
    named = Numbering.of(packed(sample=[[4, 4, 4, 0], [2, 2, 2]]), "sample", Samples.of(9))
    assert named.of_rows([0, 1]).tolist() == [4, 0, 2]
    assert "packing dropped the column" in Numbering.of(packed(), "sample", Samples.of(3)).unknown
    for column, message in {
        ((4, 4, 4), (2, 2, 2)): "row 0 does not",
        ((4, 4, 0, 0), (2, 2, 2)): "packed row 0 names several samples",
    }.items():
        with pytest.raises(UsageError, match=message):
            Numbering.of(packed(sample=[list(tokens) for tokens in column]), "sample", None)


class OwnLoader(Trainer):
    """A DataLoader of its own, over the rows in another order."""

    def get_train_dataloader(self) -> Any:
        rows = self.train_dataset.select(ORDER)
        return torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=self.data_collator)


@pytest.mark.slow
def test_a_loader_of_ones_own(tmp_path: Path) -> None:
    """Its rows need the column that the error names; they have it where it is in the dataset that is read."""
    settings: dict[str, Any] = {"trainer": OwnLoader, "max_steps": 3}
    callback = callback_of(tmp_path / "store")
    with pytest.raises(UsageError, match=r"OwnLoader\.get_train_dataloader reads a dataset.*Give the dataset a column"):
        trainer_of(tmp_path, [callback], rows=dataset(sample=False), **settings).train()
    callback.close()
    for name, collator in {"passes it on": collate, "drops it": FORMS["a column that the collator drops"][1]}.items():
        given = collator if isinstance(collator, dict) else {"data_collator": collator}
        watcher, callback = Watcher(), callback_of(tmp_path / name)
        trainer_of(tmp_path, [watcher, callback], model=still(), rows=dataset(), **settings, **given).train()
        for step, places, scores in steps_of(run_of(tmp_path / name, "trainer")):
            assert places.tolist() == ORDER[4 * step : 4 * step + 4]
            twin = still()
            twin.load_state_dict(watcher.weights[step])
            close_to(scores, exact_scores(twin, places.tolist()), 2e-5)


@pytest.mark.slow
def test_a_column_of_something_else(tmp_path: Path) -> None:
    """The error names the parameter with which another column is taken."""
    rows = dataset(sample=False).add_column("sample", [f"row {place}" for place in range(len(ROWS))])
    with pytest.raises(UsageError, match="another column with `sample_field`"):
        trainer_of(
            tmp_path, [callback_of(tmp_path / "store")], rows=rows, remove_unused_columns=True, max_steps=2
        ).train()
    rows = rows.add_column("place", ORDER)
    settings: dict[str, Any] = {"remove_unused_columns": True, "max_steps": 2}
    callback = callback_of(tmp_path / "store", sample_field="place")
    trainer_of(tmp_path, [callback], rows=rows, **settings).train()
    assert len(list(steps_of(run_of(tmp_path / "store", "trainer")))) == 2


@pytest.mark.slow
def test_a_stream_without_a_number_of_samples(tmp_path: Path) -> None:
    callback = GhostStoreCallback(store=tmp_path / "store", val_data=VAL_BATCH)
    with pytest.raises(UsageError, match="`samples` says how many"):
        trainer_of(tmp_path, [callback], rows=dataset().to_iterable_dataset(), max_steps=2).train()
    callback = callback_of(tmp_path / "store")
    trainer_of(tmp_path, [callback], rows=dataset().to_iterable_dataset(), max_steps=2).train()
