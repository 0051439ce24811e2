"""Val rows without a target have no loss: they do not dilute the mean, nor make it zero."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ghoststore import GhostEngineManager, GhostStoreCallback
from ghoststore.errors import UsageError
from indexer.dotprod import GradDotProdEngine, language_model_losses
from indexer.encode.losses import IGNORED
from tests.support.loops import ROWS, batch_of, close_to, run_of, steps_of
from tests.support.models import Example, gpt2
from tests.support.scoring import BATCH, VAL, agree, causal_step, exact_causal, val_batch
from tests.support.trainers import trainer_of


def emptied(*places: int, first_kept: bool = False) -> list[Example]:
    """``VAL[:3]``, of which some have no target; ``first_kept``: but the label that nothing predicts."""
    found = []
    for place, (ids, labels) in enumerate(VAL[:3]):
        nothing = torch.full_like(labels, IGNORED)
        if first_kept:
            nothing[0] = ids[0]
        found.append((ids, nothing if place in places else labels))
    return found


def as_tuple(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return batch["input_ids"], batch["labels"], batch["attention_mask"]


def quietly(*args: Any, **settings: Any) -> GradDotProdEngine:
    """An engine, whose warning is of no interest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return GradDotProdEngine(*args, **settings)


FORMS: dict[str, Any] = {
    "mapping": lambda rows: val_batch(rows),
    "tuple": lambda rows: as_tuple(val_batch(rows)),
    "batches": lambda rows: [val_batch(rows[:1]), val_batch(rows[1:])],
    "tuples": lambda rows: [as_tuple(val_batch([row])) for row in rows],
    "more tensors": lambda rows: {**val_batch(rows), "position_ids": torch.arange(20).expand(3, -1)},
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("first_kept", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("places", [(1,), (0, 2)])
def test_the_mean_is_over_rows_with_targets(places: tuple[int, ...], form: str, first_kept: bool) -> None:
    model = gpt2()
    expected = exact_causal(model, BATCH, [VAL[place] for place in range(3) if place not in places])
    with pytest.warns(RuntimeWarning, match=f"{len(places)} of 3 val rows have no target"):
        engine = GradDotProdEngine(model, FORMS[form](emptied(*places, first_kept=first_kept)))
    assert engine.val_samples == 3 - len(places)
    with engine:
        agree(causal_step(engine, model).total, expected.total().mean(1))


def test_no_row_with_a_target() -> None:
    with pytest.raises(UsageError, match=r"no row of the val set has a target \(each of 3 has -100"):
        GradDotProdEngine(gpt2(), val_batch(emptied(0, 1, 2)))
    engine = GradDotProdEngine(gpt2(), val_batch(VAL[:3]))
    with pytest.raises(UsageError, match="no row of the val set has a target"):
        engine.set_validation(val_batch(emptied(0, 1, 2, first_kept=True)))


def test_each_row_keeps_its_place_as_its_name() -> None:
    model = gpt2()
    with quietly(model, val_batch(emptied(1)), groups="each") as engine:
        scores = causal_step(engine, model)
    assert engine.group_names == ["0", "2"]
    agree(scores.groups, exact_causal(model, BATCH, [VAL[0], VAL[2]]).total())


def test_named_groups() -> None:
    model = gpt2()
    with quietly(model, val_batch(emptied(1)), groups=["sky", "sky", "earth"]) as engine:
        scores = causal_step(engine, model)
    assert engine.group_names == ["sky", "earth"]
    agree(scores.groups, exact_causal(model, BATCH, [VAL[0], VAL[2]]).total())
    with pytest.raises(UsageError, match=r"no row of the val group 'earth' has a target \(2 of -100 alone\)"):
        GradDotProdEngine(model, val_batch(emptied(1, 2)), groups=["sky", "earth", "earth"])
    with pytest.raises(UsageError, match="`groups` names 2 val samples, but there are 3"):
        GradDotProdEngine(model, val_batch(emptied(1)), groups=["sky", "earth"])


def test_a_val_set_that_is_given_later() -> None:
    model = gpt2()
    engine = GradDotProdEngine(model, val_batch(VAL[:3]))
    with engine:
        causal_step(engine, model)
        with pytest.warns(RuntimeWarning, match="2 of 3 val rows"):
            engine.set_validation(val_batch(emptied(0, 1)), "each")
        scores = causal_step(engine, model)
        agree(scores.total, exact_causal(model, BATCH, [VAL[2]]).total().mean(1))
        assert engine.group_names == ["2"]
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            engine.set_validation(engine.val_batches)  # told once


def test_losses_that_are_built_on_the_default_ones() -> None:
    # The engine cannot leave rows out of a val set of another form; such a row has no loss, and that is an error.
    model = gpt2()

    def losses(model: Any, batch: Any) -> Tensor:
        return language_model_losses(model, batch)

    with (
        GradDotProdEngine(model, val_batch(emptied(1)), val_losses=losses) as engine,
        pytest.raises(UsageError, match=r"loss of val sample\(s\) \[1\] is not finite; leave them out"),
    ):
        engine.prepare(4)


def test_the_manager() -> None:
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    X, Y, _ = batch_of([0, 1, 2, 3])
    expected = exact_causal(model, ROWS[:4], [VAL[0], VAL[2]]).total().mean(1)
    with pytest.warns(RuntimeWarning, match="1 of 3 val rows"):
        manager = GhostEngineManager({"method": "GradDotProd"}, model, optimizer, as_tuple(val_batch(emptied(1))))
    with manager:
        manager.attach_train_batch(X, Y, 0)
        manager.prepare_forward_input(X, Y)
        model(input_ids=X, labels=Y).loss.backward()
        manager.prepare_gradients()
        manager.aggregate_and_log()
        agree(manager.last_scores[0].total, expected)


def test_the_callback(tmp_path: Path) -> None:
    model = gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    expected = exact_causal(model, ROWS, [VAL[0], VAL[2]]).total().mean(1)
    callback = GhostStoreCallback(store=tmp_path / "store", val_data=val_batch(emptied(1)), samples=len(ROWS))
    with pytest.warns(RuntimeWarning, match="1 of 3 val rows"):
        trainer_of(tmp_path, [callback], model=model, max_steps=1).train()
    ((_, places, scores),) = steps_of(run_of(tmp_path / "store", "trainer"))
    close_to(scores, expected[torch.from_numpy(places.astype("int64"))])
