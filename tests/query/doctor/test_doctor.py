"""The doctor finds each planted defect, by the right check and in the right place, and nothing in a healthy model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ghoststore import ProjectionConfig, doctor
from ghoststore.errors import CaptureError, UsageError
from query.doctor import DoctorReport, disk
from query.doctor.examination import CHECKS
from query.doctor.models import LoadedModels
from tests.indexer.encode.test_non_interference import half_frozen, state_of
from tests.support.models import CAUSAL, gpt2, llama
from tests.support.patients import SICK, SuppressesByFloat32Minimum, Words

ALL = ProjectionConfig(layers=("all",))


@pytest.fixture(autouse=True)
def small_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "FILE", disk.PIECE)


def examine(model: Any, tmp_path: Path, **settings: Any) -> DoctorReport:
    return doctor(model=model, tokenizer=Words(), store=tmp_path, **settings)


@pytest.mark.thin(1)
@pytest.mark.parametrize("projection", [ProjectionConfig(), ALL], ids=["default", "all"])
@pytest.mark.parametrize("architecture", CAUSAL)
def test_nothing_is_wrong_with_a_healthy_model(architecture: str, projection: Any, tmp_path: Path) -> None:
    report = examine(CAUSAL[architecture](), tmp_path, projection=projection)
    assert report.wrong == []
    assert list(report.findings) == [check.name for check in CHECKS]
    for name in ("randomness", "causality", "gradients", "exactness", "invariance", "precision"):
        assert str(report.findings[name].status) == "ok", report.findings[name]
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    details = {name: one["details"] for name, one in found["findings"].items()}
    assert details["exactness"]["vector"] < 1e-5
    assert set(details["invariance"]["kernels"]) == {"eager", "sdpa"}
    assert max(max(one.values()) for one in details["invariance"]["kernels"].values()) < 1e-5
    assert details["precision"]["bfloat16"]["spearman"] > 0.95
    if projection is ALL:
        assert details["coverage"]["squared_norm"] == pytest.approx(1)


@pytest.mark.thin(4)
@pytest.mark.parametrize("defect", SICK)
def test_each_planted_defect_is_found_and_named(defect: str, tmp_path: Path) -> None:
    make, check, words = SICK[defect]
    report = examine(make(), tmp_path)
    assert check in report.wrong
    assert re.search(words, report.findings[check].summary), report.findings[check].summary
    assert report.findings[check].advice
    json.dumps(report.to_json(), allow_nan=False)
    if check == "randomness":
        assert report.wrong == ["randomness"]
        assert "see randomness" in report.findings["exactness"].summary
    elif check == "exactness":
        assert report.wrong == ["exactness"]
        assert list(report.findings["exactness"].details["layers"]) == ["transformer.h.1.mlp.c_fc"]


def test_a_defect_in_a_layer_that_is_left_out_is_no_defect(tmp_path: Path) -> None:
    make, _, _ = SICK["a weight used twice"]
    report = examine(make(), tmp_path, projection=ProjectionConfig(exclude_layers=("transformer.h.1.mlp.c_fc",)))
    assert report.wrong == []


@pytest.mark.thin(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_overflow_in_bfloat16_is_wrong_where_bfloat16_was_asked_for(dtype: str, tmp_path: Path) -> None:
    report = examine(SuppressesByFloat32Minimum(gpt2()), tmp_path, model_dtype=dtype)
    assert report.wrong == (["precision"] if dtype == "bfloat16" else [])
    found = report.findings["precision"]
    assert "bfloat16 overflows" in found.summary
    assert "Use float32" in found.advice[0]
    assert found.details["bfloat16"]["not_finite"] == report.settings["samples"]
    json.dumps(report.to_json(), allow_nan=False)


def test_gradients_that_are_not_finite_in_float32_are_wrong(tmp_path: Path) -> None:
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.fill_(1e30)
    report = examine(model, tmp_path)
    assert report.wrong == ["gradients"]
    assert "see gradients" in report.findings["exactness"].summary


def test_one_leaky_kernel_is_found_and_the_others_stay_sound(tmp_path: Path) -> None:
    report = examine(gpt2(), tmp_path, attn_implementation="leaky")
    assert "invariance" in report.wrong
    assert re.search(r"with leaky, .*padding .*attn", report.findings["invariance"].summary)


def test_a_kernel_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nonesuch"):
        examine(gpt2(), tmp_path, attn_implementation="nonesuch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash attention may be there")
def test_flash_attention_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="flash_attention_2"):
        doctor(model=gpt2(), tokenizer=Words(), attn_implementation="flash_attention_2", model_dtype="bfloat16")


def test_a_layer_that_does_not_run_is_wrong(tmp_path: Path) -> None:
    model = gpt2()
    model.transformer.h[0].mlp.unused = torch.nn.Linear(24, 24)
    report = examine(model, tmp_path)
    assert report.wrong == ["gradients"]
    assert "mlp.unused" in report.findings["gradients"].summary


@pytest.mark.thin(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_left_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    model = half_frozen(llama().to(dtype))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state, kernel, drawn = state_of(model), model.config._attn_implementation, torch.get_rng_state()
    report = examine(model, tmp_path)
    assert report.wrong == []
    assert report.settings["model_dtype"] == str(dtype).removeprefix("torch.")
    assert state_of(model) == state
    assert model.config._attn_implementation == kernel
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert list(tmp_path.iterdir()) == []


def test_a_failing_check_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = half_frozen(gpt2())
    state = state_of(model)
    monkeypatch.setattr("query.doctor.subject.gradients_of", lambda *_: (_ for _ in ()).throw(CaptureError("no")))
    assert "exactness" in examine(model, tmp_path).wrong
    assert state_of(model) == state


def test_a_copy_in_another_dtype_keeps_the_dtype_of_its_buffers() -> None:
    model = llama()
    copied = LoadedModels(model, None, "auto", None).in_dtype("bfloat16")
    assert all(parameter.dtype == torch.bfloat16 for parameter in copied.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert copied.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": 2}, "`samples` must be at least 3"),
        ({"tokenizer": None}, "needs its tokenizer"),
        ({"model": None}, "either a checkpoint or a model"),
        ({"device": "cuda"}, "is on cpu"),
        ({"model_dtype": "int8"}, "int8"),
        ({"max_length": 1000}, "32 positions"),
    ],
)
def test_what_cannot_be_examined_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        doctor(**{"model": gpt2(), "tokenizer": Words(), **settings})
