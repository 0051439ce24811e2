"""The page of object storage: the commands that it shows run, with the variables that it names."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.store.objects.conftest import Bucket

PAGE = Path(__file__).parents[3] / "docs/object-storage.md"


def test_its_commands_run(bucket: Bucket, tmp_path: Path) -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    lines = [shlex.split(line) for line in block.splitlines()]
    exported = {word.partition("=")[0] for line in lines if line[0] == "export" for word in line[1:]}
    assert exported == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"} <= bucket.environment.keys()
    shutil.copytree(bucket.lab.checkpoint, tmp_path / "gpt2")
    shutil.copy(bucket.lab.corpus, tmp_path / "corpus.jsonl")
    bucket.lab.write(tmp_path / "val.jsonl", bucket.lab.sample_rows(5, seed=9))
    commands = [line[1:] for line in lines if line[0] == "ghoststore"]
    assert [words[0] for words in commands] == ["build", "query"]
    for words in commands:
        outcome = bucket.lab.run(*words, cwd=tmp_path)
        assert outcome.code == 0, outcome.err
    assert bucket.lab.rows[0]["id"].partition("-")[0] in outcome.out  # hits, by their ids
    assert bucket.tree("stores/web")["parts/gpt2-corpus/zarr.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "gpt2", "val.jsonl"]
