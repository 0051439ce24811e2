"""Every command that takes a device gives on a GPU what it gives on the CPU."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.store import Store
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Lab

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICES = ("cpu", "cuda")


def near(one: np.ndarray, other: np.ndarray, tolerance: float = 1e-3) -> None:
    assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(one)


@pytest.fixture(scope="module")
def stores(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cuda")
    for device in DEVICES:
        for name, settings in {
            "plain": {"projection": ProjectionConfig(rank_total=16, precondition="none")},
            "default": {},
        }.items():
            given: dict[str, Any] = {"checkpoint": lab.checkpoint, "data": lab.corpus, "store": folder / device}
            ghoststore.build(**given, name=name, span_rows=6, device=device, proj_dtype="float32", **settings)
    return {device: folder / device for device in DEVICES}


def test_parts_of_plain_gradients(stores: dict[str, Path]) -> None:
    one, other = (Store.open(stores[device]).part("plain") for device in DEVICES)
    near(vectors_of(one), vectors_of(other))


def test_rankings_of_the_default(stores: dict[str, Path], lab: Lab) -> None:
    """What a part learns by default may turn by rounding: the rankings must agree, not the numbers. Of numbers that are
    exact: the signs of other directions are other signs.
    """
    scores = []
    for device in DEVICES:
        result = ghoststore.query(
            store=stores[device], part="default", val_set=lab.corpus, top_k=27, device=device
        ).results[0]
        by_row = {hit.source_row: hit.score for hit in result.hits}
        scores.append(np.array([by_row[row] for row in sorted(by_row)]))
    assert np.corrcoef(scores[0], scores[1])[0, 1] >= 0.99


def test_a_part_of_a_cpu_is_asked_on_a_gpu(stores: dict[str, Path], lab: Lab) -> None:
    answers = [
        ghoststore.query(store=stores["cpu"], part="plain", val_set=lab.corpus, top_k=5, device=device).results[0]
        for device in DEVICES
    ]
    assert [hit.source_row for hit in answers[0].hits] == [hit.source_row for hit in answers[1].hits]


def test_exact_gradients(lab: Lab, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    written = []
    for device in DEVICES:
        ghoststore.full_gradients(
            checkpoint=lab.checkpoint, data=lab.corpus, out=tmp_path / device, max_samples=7, device=device
        )
        files = json.loads((tmp_path / device / "manifest.json").read_text())["files"]
        written.append(torch.cat([load_file(tmp_path / device / name)["gradients"] for name in files]).numpy())
    near(*written)


def test_fidelity(stores: dict[str, Path]) -> None:
    found = [ghoststore.fidelity(store=stores[device], part="plain", rows=20, device=device) for device in DEVICES]
    numbers = [json.loads(json.dumps(report.to_json())) for report in found]
    assert numbers[0].keys() == numbers[1].keys()


def test_plot_error(stores: dict[str, Path], tmp_path: Path) -> None:
    for place, device in enumerate(DEVICES):
        given: dict[str, Any] = {"store": stores[device], "part": ("plain",), "rows": 20, "device": device}
        ghoststore.plot_error(**given, out=tmp_path / f"{place}.svg")


def test_doctor(lab: Lab, tmp_path: Path) -> None:
    assert ghoststore.doctor(checkpoint=lab.checkpoint, store=tmp_path, device=DEVICES[1]) is not None


def test_evaluate(stores: dict[str, Path], lab: Lab, tmp_path: Path) -> None:
    for device in DEVICES:
        given: dict[str, Any] = {"store": stores[device], "part": "plain", "val_set": lab.corpus, "device": device}
        ghoststore.evaluate(**given, out=tmp_path / device, halves=3, max_steps=4, max_val_samples=3)
