"""A build of a stream into object storage: the same objects as files on a disk, also where it is killed at its end."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import ghoststore
from ghoststore.store import Store
from ghoststore.store.base.object_path import location
from ghoststore.store.part.part import span_table
from tests.conftest import tree
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.store.objects.conftest import Bucket

NEVER = 10**6


def words(bucket: Bucket, name: str) -> list[str]:
    lab = bucket.lab
    return [
        *("build", "--store", f"s3://bucket/{name}", "--checkpoint", str(lab.checkpoint), "--data", str(lab.corpus)),
        *("--stream", "--span-rows", "6", "--name", "part", "--quiet"),
    ]


@pytest.mark.slow
@pytest.mark.kill
def test_a_stream_into_object_storage(bucket: Bucket, tmp_path: Path) -> None:
    outcome = bucket.lab.build(tmp_path / "store", "--stream")
    assert outcome.code == 0, outcome.err
    whole = tree(tmp_path / "store")
    writes = bucket.killed_command(words(bucket, "streamed"), NEVER)
    assert bucket.tree("streamed") == whole
    # Behind the last commit, and before the manifest of the ended part.
    for number, after in ((writes - 9, True), (writes, False)):
        name = f"killed-{number}-{after}"
        bucket.killed_command(words(bucket, name), number, after=after)
        assert ghoststore.verify(f"s3://bucket/{name}").sound
        again = bucket.lab.run(*words(bucket, name))
        assert again.code == 0, again.err
        found = bucket.tree(name)
        assert {key: found[key] for key in whole} == whole
        assert all(key.endswith(".tmp") for key in found.keys() - whole.keys())


def test_a_stream_of_shards_in_object_storage(bucket: Bucket, tmp_path: Path) -> None:
    """Packed shards by a pattern: the rows of the same ones on a disk; killed, it goes on."""
    lab = bucket.lab
    for place in range(3):
        data = gzip.compress("".join(json.dumps(row) + "\n" for row in lab.rows[place * 9 : place * 9 + 9]).encode())
        (tmp_path / f"{place}.jsonl.gz").write_bytes(data)
        location(f"s3://bucket/shards/{place}.jsonl.gz").write_bytes(data)
    given = ["--stream", "--proj-precondition", "none", "--proj-rank-total", "64"]
    here = lab.build(tmp_path / "here", "--data", tmp_path / "*.jsonl.gz", *given)
    assert here.code == 0, here.err
    killed = {"call": "name", "path": r"commits/00000003\.json$", "when": "after", "act": "kill"}
    words = ["--data", "s3://bucket/shards/*.jsonl.gz", *given]
    assert lab.build(tmp_path / "there", *words, fault=killed).code == -9
    there = lab.build(tmp_path / "there", *words)
    assert there.code == 0, there.err
    one, other = (Store.open(tmp_path / name).part("part") for name in ("here", "there"))
    assert np.array_equal(vectors_of(one), vectors_of(other))
    assert np.array_equal(span_table(one), span_table(other))
