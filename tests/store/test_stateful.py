"""Whatever interrupts a build, and however often, the store ends as if nothing had."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ghoststore
from ghoststore.errors import StorageError

if TYPE_CHECKING:
    from tests.conftest import Lab

CALLS = ("fsync", "link", "replace", "rename")
steps = st.one_of(
    st.tuples(st.just("fail"), st.sampled_from(CALLS), st.integers(1, 60)),
    st.just(("read",)),
    st.just(("same-process",)),
)
"""Fail at the n-th call of a function of the disk; read what there is; or build on with nothing in the way."""


class Broken:
    """A function of ``os`` that fails at its n-th call and works before and after."""

    def __init__(self, name: str, number: int) -> None:
        self.real, self.left = getattr(os, name), number

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.EIO, "Input/output error")
        return self.real(*arguments, **options)


@pytest.mark.slow
@pytest.mark.kill
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(steps, min_size=1, max_size=4))
def test_any_history_ends_in_the_same_store(lab: Lab, built: Path, history: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory(dir=lab.folder) as folder:
        store = Path(folder) / "store"
        committed = 0
        for kind, *details in history:
            if kind == "read":
                committed = read(lab, store, committed)
            elif kind == "fail":
                name, number = details
                with mock.patch.object(os, name, Broken(name, number)):
                    build(lab, store, may_fail=True)
            else:
                build(lab, store)
            committed = read(lab, store, committed)
        build(lab, store)
        whole, found = lab.tree(built), lab.tree(store)
        assert found.keys() == whole.keys()
        assert [name for name in whole if found[name] != whole[name]] == []


def build(lab: Lab, store: Path, may_fail: bool = False) -> None:
    try:
        ghoststore.build(
            checkpoint=lab.checkpoint, data=lab.corpus, store=store, name="part", span_rows=6, device="cpu"
        )
    except StorageError:
        assert may_fail


def read(lab: Lab, store: Path, at_least: int) -> int:
    """The number of committed rows, which never falls; every one is sound and found."""
    if not (store / "parts" / "part").exists():
        assert not at_least
        return 0
    part = ghoststore.Store.open(store).part()
    assert part.rows >= at_least
    assert ghoststore.verify(store).sound
    if part.rows:
        hits = ghoststore.query(store=store, val_set=lab.corpus, max_samples=1, top_k=99, device="cpu").results[0].hits
        spans = (range(*part.layout.span_of(span)) for span in part.spans)
        assert sorted(hit.source_row for hit in hits) == [row for span in spans for row in span]
    return part.rows
