"""A build of a stream into object storage: the same objects as files on a disk, also where it is killed at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore
from tests.conftest import tree

if TYPE_CHECKING:
    from tests.store.objects.conftest import Bucket

NEVER = 10**6


def words(bucket: Bucket, name: str) -> list[str]:
    lab = bucket.lab
    return [
        *("build", "--store", f"s3://bucket/{name}", "--checkpoint", str(lab.checkpoint), "--data", str(lab.corpus)),
        *("--stream", "--span-rows", "6", "--name", "part", "--quiet"),
    ]


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
