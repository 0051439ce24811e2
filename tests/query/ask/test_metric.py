"""Without ``metric`` every command takes the one that its part was made for, and says it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore
from ghoststore import ProjectionConfig, Store
from ghoststore.errors import UsageError
from ghoststore.store.part.metric import default_metric, metric_for

if TYPE_CHECKING:
    from tests.conftest import Lab

MADE_FOR = {"part": "dot", "plain": "cosine"}


@pytest.fixture(scope="module")
def store(lab: Lab, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preconditioned part and a plain one."""
    folder = tmp_path_factory.mktemp("metric")
    lab.write(folder / "val.jsonl", lab.sample_rows(3, 8))
    store = Path(shutil.copytree(built, folder / "store"))
    ghoststore.build(
        checkpoint=lab.checkpoint,
        data=lab.corpus,
        store=store,
        name="plain",
        device="cpu",
        projection=ProjectionConfig(precondition="none"),
    )
    return store


@pytest.mark.parametrize("part", MADE_FOR)
def test_a_query_takes_the_metric_of_its_part(store: Path, part: str) -> None:
    own, given = (
        ghoststore.query(store=store, part=part, val_set=store.parent / "val.jsonl", metric=metric, device="cpu")
        for metric in (None, MADE_FOR[part])
    )
    assert own.to_json() == given.to_json()
    assert own.settings["metric"] == MADE_FOR[part]


def test_what_measures_and_indexes_takes_it_too(store: Path) -> None:
    assert ghoststore.index(store=store, part="part", factory="Flat").manifest.metric == "dot"
    report = ghoststore.fidelity(store=store, part="plain", rows=11, val_samples=2, device="cpu")
    assert report.metric == "cosine"


def test_an_index_for_the_other_metric_has_advice(store: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(store, tmp_path / "store", ignore=shutil.ignore_patterns("index")))
    ghoststore.index(store=copied, part="part", metric="cosine", factory="Flat")
    with pytest.raises(UsageError, match=r"no index for `metric=dot`; .* or give `metric=cosine`"):
        ghoststore.query(store=copied, part="part", val_set=store.parent / "val.jsonl", index="ann", device="cpu")


def test_parts_that_disagree(store: Path) -> None:
    parts = [Store.open(store).part(name) for name in ("part", "plain")]
    with pytest.raises(UsageError, match="'part' was made for dot, and part 'plain' for cosine: give `metric=dot`"):
        metric_for(None, parts)
    assert metric_for("cosine", parts) == "cosine"


def test_parts_scaled_by_adam_are_for_dot() -> None:
    assert default_metric({"optimizer_state": "sha256:0", "precondition": "none"}) == "dot"
