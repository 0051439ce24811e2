"""Manifests, records, shards and sample files from a stranger: an error of ours or none, in bounded memory and time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.fault_commands import WRITING
from tests.support.faulting import UNFINISHED, files_of
from tests.support.fuzzing import byte_steps, mangled, overlays, refused_in_order, sample_files

if TYPE_CHECKING:
    from tests.support.faulting import Faults

pytestmark = pytest.mark.slow
QUICK = settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
"""An example is many cases."""


def json_files(folder: Path) -> list[str]:
    return [name for name in files_of(folder) if name.endswith(".json") and not UNFINISHED.search(name)]


@QUICK
@given(data=st.data())
def test_manifests_and_records(faults: Faults, data: st.DataObject) -> None:
    store = faults.base("store") / "store"
    copied = Path(shutil.copytree(store, faults.folder / "fuzzed", dirs_exist_ok=True))
    names = json_files(store)
    cases = [data.draw(overlays(store, data.draw(st.sampled_from(names)))) for _ in range(12)]
    wrong = refused_in_order(faults, "store", copied, cases)
    assert wrong == [], "\n".join(wrong)


@QUICK
@given(data=st.data())
def test_shards(faults: Faults, data: st.DataObject) -> None:
    folder = faults.folder / "fuzzed-shards"
    if not folder.exists():
        made = faults.fresh("tokenize")
        assert faults.run(WRITING["tokenize"], made).code == 0
        shutil.copytree(made / "shards", folder)
    names = [name for name in files_of(folder) if not name.startswith("tokenizer/")]
    cases = []
    for _ in range(30):
        name = data.draw(st.sampled_from(names))
        whole = (folder / name).read_bytes()
        if name.endswith(".json"):
            cases.append(data.draw(overlays(folder, name)))
        else:
            cases.append({name: mangled(whole, data.draw(byte_steps))})
    wrong = refused_in_order(faults, "shards", folder, cases)
    assert wrong == [], "\n".join(wrong)


@QUICK
@given(data=st.data())
def test_samples(faults: Faults, data: st.DataObject) -> None:
    rows = [json.loads(line) for line in (faults.inputs / "corpus.jsonl").read_text().splitlines()]
    files = sample_files(rows)
    folder = faults.folder / "fuzzed-samples"
    folder.mkdir(exist_ok=True)
    for name, whole in files.items():
        (folder / name).write_bytes(whole)
    names = [data.draw(st.sampled_from(sorted(files))) for _ in range(60)]
    cases = [{name: mangled(files[name], data.draw(byte_steps))} for name in names]
    wrong = refused_in_order(faults, "samples", folder, cases)
    assert wrong == [], "\n".join(wrong)
