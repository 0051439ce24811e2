"""Scores of exact gradients in an evaluation, against plain autograd; and what has none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import UsageError
from ghoststore.store import Store
from query.exact.gradients import ExactGradients
from tests.support.exact_scores import LENGTH, METHODS, SAMPLES, UNUSABLE, VAL, exact_folder, scores_of

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exact_folder(lab, tmp_path_factory.mktemp("exact"))


def gradients(lab: Lab, folder: Path, part: str, texts: list[str]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(text, gradient of the layers, of all parameters) of each window of ``texts``, by transformers' own loss."""
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint).eval()
    assert model.lm_head.weight is model.transformer.wte.weight, "tied"
    tokenizer = AutoTokenizer.from_pretrained(lab.checkpoint)
    layers = Store.open(folder / "store").part(part).manifest["layers"]
    covered = {name for layer in layers for name in layer["parameters"]}
    found = []
    for place, text in enumerate(texts):
        ids, length = tokenizer(text)["input_ids"], LENGTH[part]
        for start in range(0, len(ids) - 1, length - 1):
            window = torch.tensor([ids[start : start + length]])
            model.zero_grad()
            model(input_ids=window, labels=window).loss.backward()
            by_name = {name: p.grad.double().flatten().numpy() for name, p in model.named_parameters()}
            whole = np.concatenate(list(by_name.values()))
            found.append((place, np.concatenate([by_name[name] for name in by_name if name in covered]), whole))
    return found


def texts_in(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("part", ["one", "windows"])
def test_scores_are_those_of_plain_autograd(lab: Lab, folder: Path, tmp_path: Path, part: str) -> None:
    found = scores_of(folder, tmp_path / "out", part=part)
    vals = gradients(lab, folder, part, texts_in(folder / "val.jsonl"))
    rows = gradients(lab, folder, part, texts_in(folder / "train.jsonl"))
    assert (len(vals), len(rows) > SAMPLES) == (VAL, part == "windows")
    for method in METHODS:
        piece = 1 if "layers" in method else 2
        expected, lengths = np.zeros((VAL, SAMPLES)), np.zeros((VAL, SAMPLES))
        for q, val in enumerate(vals):
            for row in rows:
                product, length = val[piece] @ row[piece], np.linalg.norm(val[piece]) * np.linalg.norm(row[piece])
                expected[q, row[0]] += product / (length if "cosine" in method else 1)
                lengths[q, row[0]] += 1 if "cosine" in method else length
        assert (np.abs(found[method] - expected) <= 1e-6 * lengths).all()
        assert (found[method][:, UNUSABLE] == 0).all()
        assert (found[method] != 0).sum() == VAL * (SAMPLES - 1)
    assert np.abs(found["exact-dot"] - found["exact-layers-dot"]).max() > 0.01


def test_what_has_no_score(lab: Lab, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row without a finite gradient counts 0; a val sample, or one with windows, is refused."""
    original = ExactGradients.__call__
    broken = {"row-3": "transformer.wte.weight"}

    def call(self: ExactGradients, row: Any) -> Any:
        gradient = original(self, row)
        if row.sample.id in broken:
            gradient.parts[broken[row.sample.id]].flatten()[0] = torch.inf
        return gradient

    monkeypatch.setattr(ExactGradients, "__call__", call)
    found = scores_of(folder, tmp_path / "out")
    for method in METHODS:
        assert np.isfinite(found[method]).all()
        assert (found[method][:, 3] == 0).all() == ("layers" not in method)
    val_set = lab.write(tmp_path / "val.jsonl", [{"id": "row-3", "text": "the moon gives"}])
    scores_of(folder, tmp_path / "val", ["exact-layers-dot"], val_set=val_set)
    with pytest.raises(UsageError, match="val sample 'row-3' is not finite"):
        scores_of(folder, tmp_path / "val", ["exact-dot"], val_set=val_set)
    long = lab.write(tmp_path / "long.jsonl", [{"text": " ".join(["moon"] * 20)}])
    with pytest.raises(UsageError, match="usable samples for the store and 1 for the trainings"):
        scores_of(folder, tmp_path / "long", ["exact-dot"], part="windows", val_set=long)


def test_scaled_by_an_optimizer_state(lab: Lab, folder: Path, tmp_path: Path) -> None:
    """Of full rank the part's own scores are exact; all parameters have no scales."""
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * torch.rand(1, generator=generator)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    shutil.copy(folder / "val.jsonl", tmp_path)
    ghoststore.build(
        checkpoint=lab.checkpoint,
        data=folder / "train.jsonl",
        store=tmp_path / "store",
        device="cpu",
        name="one",
        projection=ProjectionConfig(rank_total="full"),
        proj_dtype="float32",
        optimizer_state=tmp_path,
    )
    found = scores_of(tmp_path, tmp_path / "out", ["exact-layers-dot", "dot", "exact-layers-cosine", "cosine"])
    for metric in ("dot", "cosine"):
        np.testing.assert_allclose(found[f"exact-layers-{metric}"], found[metric], rtol=1e-4, atol=1e-5)
    for method in ("exact-dot", "exact-cosine"):
        with pytest.raises(UsageError, match=f"`methods={method}`: .* give exact-layers-dot"):
            scores_of(tmp_path, tmp_path / "out", [method])


def test_command(lab: Lab, folder: Path, tmp_path: Path) -> None:
    common = [
        "evaluate",
        "--store",
        folder / "store",
        "--part",
        "one",
        "--val-set",
        folder / "val.jsonl",
        "--test",
        "tail-patch",
        "--top-k",
        "3",
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
        "--quiet",
        "--method",
    ]
    outcome = lab.run(*common, "exact-dot", "--json")
    assert outcome.code == 0, outcome.err
    (one,) = outcome.json["tail_patch"]
    assert one["method"] == "exact-dot"
    assert one["gain"] > one["random"]
    refused = lab.run(*common, "exact")
    assert refused.code == 2
    assert "'exact' is unknown" in refused.err
    assert all(method in refused.err for method in METHODS)
