"""Two processes that train one model, with their run in object storage: the run of the same two with a local store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore
from ghoststore.store import Store
from tests.support.trainings import arrays_of, in_two, open_gym, ranks, same_bits, without_times

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


TRAINER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.support.models import gpt2
from tests.support.trainers import callback_of, dataset, trainer_of
settings = {{"max_steps": 5, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}}
for store in {stores!r}:
    callback = callback_of(store, name="run", dot_prod_save_interval=2, per_layer=True)
    trainer_of(Path({folder!r}), [callback], model=gpt2(), rows=dataset(sample=False), **settings).train()
"""


@pytest.mark.slow
def test_the_callback_in_two_processes(bucket: Bucket, tmp_path: Path) -> None:
    """As under torchrun; the objects are the files of a local store."""
    stores = (str(tmp_path / "store"), "s3://bucket/callback")
    root = str(Path(__file__).resolve().parents[3])
    for outcome in in_two(bucket.lab, TRAINER.format(root=root, stores=stores, folder=str(tmp_path))):
        assert outcome.code == 0, outcome.err
    here, there = (Store.open(store).run("run") for store in stores)
    assert there.complete
    assert there.layout.ranks == 2
    assert same_bits(arrays_of(there), arrays_of(here)) == []
    files, objects = bucket.lab.tree(tmp_path / "store"), bucket.tree("callback")
    assert objects.keys() == files.keys()
    assert without_times(objects) == without_times(files)
    assert ghoststore.verify(stores[1]).sound
