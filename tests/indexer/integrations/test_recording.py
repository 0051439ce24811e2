"""Which samples, which val set: what a run knows of them before its first step. And what importing costs."""

from __future__ import annotations

import copy
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from ghoststore import GhostEngineManager
from ghoststore.errors import UsageError
from indexer.session.samples import Samples, places_of, val_fingerprint
from tests.support.loops import VAL_BATCH, batch_of
from tests.support.models import gpt2

DATA: dict[str, Any] = {
    "batch": {"input_ids": torch.arange(6).view(2, 3), "labels": torch.arange(6).view(2, 3)},
    "another number": {"input_ids": torch.arange(6).view(2, 3), "labels": torch.arange(1, 7).view(2, 3)},
    "another key": {"input_ids": torch.arange(6).view(2, 3), "label": torch.arange(6).view(2, 3)},
    "another shape": {"input_ids": torch.arange(6).view(3, 2), "labels": torch.arange(6).view(3, 2)},
    "another dtype": {"input_ids": torch.arange(6).view(2, 3), "labels": torch.arange(6).view(2, 3).int()},
    "a tuple": (torch.arange(6).view(2, 3), torch.arange(6).view(2, 3)),
    "two batches": [{"input_ids": torch.arange(6).view(2, 3)}, {"labels": torch.arange(6).view(2, 3)}],
    "a scalar": torch.tensor(1.0),
    "another scalar": torch.tensor(2.0),
    "a number": 1.0,
    "a string": "1.0",
    "nothing": None,
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "booleans": torch.ones(3, dtype=torch.bool),
    "empty": torch.zeros(0, 3),
}


def test_val_fingerprints_tell_val_sets_apart() -> None:
    assert len({val_fingerprint(value) for value in DATA.values()}) == len(DATA)
    for value in DATA.values():
        assert val_fingerprint(copy.deepcopy(value)) == val_fingerprint(value)
    assert val_fingerprint(np.arange(3)) == val_fingerprint(torch.arange(3))
    assert val_fingerprint(torch.arange(6).view(2, 3).t()) == val_fingerprint(torch.tensor([[0, 3], [1, 4], [2, 5]]))
    with pytest.raises(UsageError, match="object"):
        val_fingerprint({"x": object()})


def test_a_val_fingerprint_copies_no_tensor() -> None:
    batches = [torch.ones(1 << 20) for _ in range(4)]
    tracemalloc.start()
    val_fingerprint(batches)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_samples() -> None:
    assert Samples.of(3).ids == Samples.of(np.int64(3)).ids == ("0", "1", "2")  # type: ignore[arg-type]
    assert Samples.of(["a", "b"], ["x", None]).domain_names == ["x"]
    assert Samples.of(3).fingerprint() != Samples.of(["a", "b", "c"]).fingerprint()
    for count in (0, -2):
        with pytest.raises(UsageError, match="no training samples"):
            Samples.of(count)


@pytest.mark.parametrize("given", [[2, 0], (2, 0), np.array([2, 0], dtype=np.int32), torch.tensor([2, 0])])
def test_places(given: Any) -> None:
    found = places_of(given, 2, Samples.of(3))
    assert found.tolist() == [2, 0]
    assert found.dtype == np.int64


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, ghoststore; names = {'GhostConfig', 'GhostEngineManager', 'GhostStoreCallback'}; "
        "assert names <= set(dir(ghoststore)); assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_manager_does_not_load_the_trainer() -> None:
    code = (
        "import sys, ghoststore; ghoststore.GhostConfig, ghoststore.GhostEngineManager; "
        "assert not {'transformers.trainer', 'accelerate', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_copy_of_the_model_in_the_middle_of_a_step_is_not_scored() -> None:
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    X, Y, _ = batch_of([0, 1])
    found = []
    for copied in (False, True):
        with GhostEngineManager({"method": "GradDotProd"}, model, optimizer, val_data=VAL_BATCH) as manager:
            manager.attach_train_batch(X, Y, 0)
            twin = copy.deepcopy(model) if copied else model
            manager.prepare_forward_input(X, Y)
            model(input_ids=X, labels=Y).loss.backward()
            manager.prepare_gradients()
            if copied:
                twin(input_ids=Y.clamp_min(0), labels=Y).loss.backward()
            manager.aggregate_and_log()
            found.append(manager.last_scores[0].total)
    assert torch.equal(*found)
