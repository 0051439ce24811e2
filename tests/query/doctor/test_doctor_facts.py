"""What the doctor measures is so: shares of the gradient, rankings, rows, disk, memory, FAISS."""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ghoststore import Corpus, ProjectionConfig, doctor
from ghoststore.checkpoint.load import load_tokenizer
from ghoststore.errors import UsageError
from ghoststore.machine import available_memory, computes_bfloat16, processor, total_memory
from indexer.encode.tokens import Tokenizer
from query.doctor import DoctorReport, disk, subject
from query.doctor.compare import relative_errors, same_ranking
from query.doctor.rows import choose_rows
from tests.support.models import gpt2
from tests.support.oracle import gradients_alone
from tests.support.patients import Words

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture(autouse=True)
def small_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "FILE", disk.PIECE)


def examine(tmp_path: Path, **settings: Any) -> DoctorReport:
    return doctor(**{"model": gpt2(), "tokenizer": Words(), "store": tmp_path, "samples": 4, **settings})


def test_shares_of_the_gradient_are_those_of_plain_autograd(tmp_path: Path) -> None:
    model = gpt2()
    rows = choose_rows(None, Tokenizer(Words()), max_length=32, count=4)

    def loss_of(model: Any, sample: int) -> torch.Tensor:
        ids = torch.from_numpy(rows[sample].tokens).long().unsqueeze(0)
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    gradients = gradients_alone(model, len(rows), loss_of)
    squares = [{name: float(g.square().sum()) for name, g in one.items()} for one in gradients]
    covered = ("attn", "mlp")
    expected = np.mean(
        [sum(v for k, v in s.items() if any(c in k for c in covered)) / sum(s.values()) for s in squares]
    )
    details = examine(tmp_path, model=model).findings["coverage"].details
    assert details["squared_norm"] == pytest.approx(float(expected), rel=1e-4)
    assert sum(details["by_type"].values()) == pytest.approx(1)
    assert set(details["by_type"]) == {"conv1d", "embedding", "layernorm"}


@pytest.mark.slow
def test_a_small_or_lopsided_share_brings_advice(tmp_path: Path) -> None:
    found = examine(tmp_path, projection=ProjectionConfig(layers=("ln_1",))).findings["coverage"]
    assert found.status == "advice"
    assert "`projection.layers`" in found.advice[0]
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight.mul_(100)
    found = examine(tmp_path, model=model).findings["coverage"]
    assert any("decides every score" in sentence for sentence in found.advice)


@pytest.mark.slow
def test_what_does_not_fit_into_memory_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "available_memory", lambda device: 1000)
    report = examine(tmp_path)
    skipped = [name for name, finding in report.findings.items() if finding.status == "skipped"]
    assert skipped == ["exactness", "precision", "coverage"]
    assert "GiB" in report.findings["exactness"].summary
    monkeypatch.setattr("query.doctor.models.available_memory", lambda device: 1000)
    with pytest.raises(UsageError, match="in float32"):
        examine(tmp_path, model=gpt2().to(torch.bfloat16))


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    found = examine(tmp_path, store=tmp_path / "not" / "yet").findings["disk"]
    assert found.details["folder"] == str(tmp_path.resolve())
    assert found.details["bytes"] == disk.PIECE
    assert min(found.details["write_bytes_per_second"], found.details["read_bytes_per_second"]) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_brings_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that makes a row smaller: an encoding alone does not, each keeps as many numbers as the same bytes hold."""
    monkeypatch.setattr(disk, "SLOW", float("inf"))
    (advice,) = examine(tmp_path).findings["disk"].advice
    assert "local disk" in advice
    assert "--proj-compress" in advice
    assert "--proj-dtype" not in advice


@pytest.mark.slow
def test_a_disk_that_is_full_or_refuses_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
        found = examine(tmp_path).findings["disk"]
        assert (found.status, "1 MiB left" in found.summary) == ("skipped", True)

    def refuse(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    found = examine(tmp_path).findings["disk"]
    assert (found.status, "Input/output error" in found.summary) == ("skipped", True)


def test_without_faiss_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    report = examine(tmp_path)
    assert report.findings["faiss"].status == "advice"
    assert "ghoststore[cpu]" in report.findings["faiss"].advice[0]
    assert report.wrong == []


def test_rows_are_of_different_lengths_even_where_the_corpus_is_not(lab: Lab, tmp_path: Path) -> None:
    path = lab.write(tmp_path / "even.jsonl", [{"text": "one two three four five six seven eight"}] * 9)
    rows = choose_rows(Corpus.open(str(path)), Tokenizer(Words()), max_length=32, count=6)
    assert [len(row.tokens) for row in rows] == [8, 4, 8, 4, 8, 4]
    lab.write(path, [{"prompt": "the cat sees", "completion": " the dog"}] * 4)
    tokenizer = load_tokenizer(lab.checkpoint)
    prompt, whole = (len(tokenizer(text)["input_ids"]) for text in ("the cat sees", "the cat sees the dog"))
    rows = choose_rows(Corpus.open(str(path)), Tokenizer(tokenizer), max_length=32, count=6)
    expected = [(whole, prompt), (max(whole // 2, prompt + 1), prompt)] * 2
    assert [(len(row.tokens), row.first_target) for row in rows] == expected
    lab.write(path, [{"text": "one two"}, {"text": "one"}, {"text": ""}])
    with pytest.raises(UsageError, match=r"even\.jsonl: 1 samples"):
        choose_rows(Corpus.open(str(path)), Tokenizer(Words()), max_length=32, count=6)


def test_differences_and_rankings() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    y = torch.tensor([[3.0, 4.5], [0.0, 0.0], [float("nan"), 0.0]])
    assert relative_errors(y, x).tolist() == [pytest.approx(0.1), 0.0, float("inf")]
    vectors = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert same_ranking(vectors * torch.arange(1, 7).unsqueeze(1), vectors) == pytest.approx([1.0] * 6)
    assert min(same_ranking(torch.randn(6, 5), vectors)) < 1


def test_the_machine_says_what_it_has() -> None:
    assert processor()
    assert computes_bfloat16() in (True, False)
    free = available_memory()
    assert free is None or 0 < free < total_memory()
