"""Two processes that train one model, with their run in object storage: the run of the same two with a local store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ghoststore.store import Store
from tests.support.trainings import arrays_of, open_gym, ranks, same_bits

if TYPE_CHECKING:
    from tests.store.objects.conftest import Bucket

pytestmark = pytest.mark.ddp


def test_a_run_of_two_processes_is_that_of_a_local_store(bucket: Bucket, tmp_path: Path) -> None:
    gym = open_gym(bucket.lab, tmp_path)
    stores = (str(tmp_path / "store"), "s3://bucket/two")
    for number, store in enumerate(stores):
        words = gym.words(tmp_path / str(number), "--batch-size", "2", "--max-steps", "6", "--store", store)
        for outcome in ranks(gym.lab, "", words):
            assert outcome.code == 0, outcome.err
    here, there = (Store.open(store).run("run") for store in stores)
    assert there.complete
    assert same_bits(arrays_of(there), arrays_of(here)) == []
