"""Scores of exact gradients in an evaluation: against plain autograd, computed once, kept, and gone on with."""

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
import query.exact_dots
from ghoststore import ProjectionConfig
from ghoststore.corpus import Fields
from ghoststore.errors import CorruptError, MismatchError, UsageError
from ghoststore.progress import Silent
from ghoststore.store import Store
from indexer.training.retrain import Recipe
from query.evaluate import exact
from query.evaluate.predictors import EXACT
from query.evaluate.task import Task
from query.exact_gradients import ExactGradients
from query.question import Question

if TYPE_CHECKING:
    from tests.conftest import Lab

SAMPLES, VAL, UNUSABLE = 24, 5, 7
LENGTH = {"one": 32, "windows": 12}
METHODS = list(EXACT)


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a part of whole samples, one of windows and one of other ranks; a val set of short samples."""
    folder = tmp_path_factory.mktemp("exact")
    rows = lab.sample_rows(SAMPLES, 1)
    rows[UNUSABLE]["text"] = ""
    data = lab.write(folder / "train.jsonl", rows)
    texts = ["the cat sees", "a red bird", "the old song", "the moon gives", "a dog runs"]
    lab.write(folder / "val.jsonl", [{"text": text, "domain": ("sky", "earth")[i % 2]} for i, text in enumerate(texts)])
    settings: dict[str, dict[str, Any]] = {
        "one": {}, "windows": {"max_length": LENGTH["windows"], "overlong": "window"},
        "ranks": {"projection": ProjectionConfig(rank_total=16)},
    }  # fmt: skip
    for name, given in settings.items():
        ghoststore.build(
            checkpoint=lab.checkpoint, data=data, store=folder / "store", name=name, span_rows=16, device="cpu", **given
        )
    return folder


def scores_of(folder: Path, out: Path, methods: list[str] = METHODS, part: str = "one", **given: Any) -> dict[str, Any]:
    """(V, N) by method."""
    val_set = str(given.pop("val_set", folder / "val.jsonl"))
    task = Task.of(
        Store.open(folder / "store").part(part), val_set, out, fields=Fields(), max_val_samples=None, recipe=Recipe(),
        device="cpu", progress=given.pop("progress", Silent()),
    )  # fmt: skip
    base = Question(store=folder / "store", val_set=val_set, part=part, each=True, device="cpu")
    found = task.methods(base, {"part": [part]}, methods, None, None)
    return {method: found[method]().samples_VN for method in methods}


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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the samples whose gradients were computed."""
    seen: list[str] = []
    original = ExactGradients.__call__

    def count(self: ExactGradients, row: Any) -> Any:
        seen.append(row.sample.id)
        return original(self, row)

    monkeypatch.setattr(ExactGradients, "__call__", count)
    return seen


def test_one_pass_for_all_methods_and_parts(folder: Path, tmp_path: Path, calls: list[str]) -> None:
    found = scores_of(folder, tmp_path / "out")
    assert len(calls) == VAL + SAMPLES - 1
    again = scores_of(folder, tmp_path / "out", part="ranks")
    assert len(calls) == VAL + SAMPLES - 1, "another projection of the same layers"
    assert all(np.array_equal(found[method], again[method]) for method in METHODS)
    scores_of(folder, tmp_path / "out", ["exact-dot"], part="windows")
    assert len(calls) > 2 * (VAL + SAMPLES)


class Bars(Silent):
    """Keeps what is told of progress bars."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int | None, int]] = []
        self.advanced = 0

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Any:
        if description != "exact gradients":
            return super().task(description, total, done, unit)
        self.begun.append((description, total, done))
        return self

    def advance(self, rows: int, tokens: int = 0) -> None:
        self.advanced += rows

    def close(self) -> None:
        pass


def test_goes_on_where_it_was_killed(
    lab: Lab, folder: Path, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 4 rows and 2 val samples: 3 × 6. The third block of the second val samples is cut short."""
    numbers = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(lab.checkpoint).parameters())
    monkeypatch.setattr(query.exact_dots, "MEMORY", 2 * 4 * numbers)
    monkeypatch.setattr(exact, "ROWS_AT_ONCE", 4)
    rows = SAMPLES - 1
    whole = scores_of(folder, tmp_path / "whole")
    assert len(calls) == VAL + 3 * rows
    counted = ExactGradients.__call__

    def killed(self: ExactGradients, row: Any) -> Any:
        if len(calls) == VAL + 3 * rows + (2 + rows) + (2 + 9):
            raise KeyboardInterrupt
        return counted(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(ExactGradients, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            scores_of(folder, tmp_path / "out")
    calls.clear()
    bars = Bars()
    found = scores_of(folder, tmp_path / "out", progress=bars)
    assert len(calls) == (2 + rows - 8) + (1 + rows), "val gradients again, and rows that are missing"
    assert bars.begun == [("exact gradients", VAL + 3 * rows, 2 + rows + 8)]
    assert bars.advanced == len(calls)
    assert lab.tree(tmp_path / "out" / "exact") == lab.tree(tmp_path / "whole" / "exact")
    assert all(found[method].tobytes() == whole[method].tobytes() for method in METHODS)
    monkeypatch.undo()
    at_once = scores_of(folder, tmp_path / "at once")
    for method in METHODS:
        np.testing.assert_allclose(found[method], at_once[method], rtol=1e-5, atol=1e-6)


def test_damaged_and_foreign(lab: Lab, folder: Path, tmp_path: Path, calls: list[str]) -> None:
    out, method = tmp_path / "out", ["exact-cosine"]
    whole = scores_of(folder, out, method)
    (block,) = out.glob("exact/*/*.npz")
    kept = block.read_bytes()
    block.write_bytes(kept[:200] + b"?" + kept[201:])
    with pytest.raises(CorruptError, match=rf"{block} is damaged .* remove it"):
        scores_of(folder, out, method)
    record = block.with_suffix(".json")
    record.write_text(record.read_text().replace("sha256", "sha265", 1))
    with pytest.raises(CorruptError, match=rf"{record} is damaged .* remove it"):
        scores_of(folder, out, method)
    record.unlink()
    calls.clear()
    assert np.array_equal(scores_of(folder, out, method)["exact-cosine"], whole["exact-cosine"])
    assert len(calls) == VAL + SAMPLES - 1
    assert block.read_bytes() == kept
    block.unlink()
    assert np.array_equal(scores_of(folder, out, method)["exact-cosine"], whole["exact-cosine"])
    scores_of(folder, out, method, part="windows")
    (other,) = set(out.glob("exact/*/*.json")) - {*block.parent.iterdir()} - {*out.glob("exact/*/manifest.json")}
    shutil.copy(other, record)
    with pytest.raises(MismatchError, match=rf"{block} is of another evaluation"):
        scores_of(folder, out, method)
    val_set = lab.write(tmp_path / "val.jsonl", [{"text": "the moon gives"}, {"text": "a new song"}])
    with pytest.raises(MismatchError, match=r"exact/\w+ was computed with other settings(.|\n)*val.fingerprint"):
        scores_of(folder, out, method, part="windows", val_set=val_set)


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
        checkpoint=lab.checkpoint, data=folder / "train.jsonl", store=tmp_path / "store", device="cpu", name="one",
        projection=ProjectionConfig(rank_total="full"), optimizer_state=tmp_path,
    )  # fmt: skip
    found = scores_of(tmp_path, tmp_path / "out", ["exact-layers-dot", "dot", "exact-layers-cosine", "cosine"])
    for metric in ("dot", "cosine"):
        np.testing.assert_allclose(found[f"exact-layers-{metric}"], found[metric], rtol=1e-4, atol=1e-5)
    for method in ("exact-dot", "exact-cosine"):
        with pytest.raises(UsageError, match=f"--method {method}: .* give exact-layers-dot"):
            scores_of(tmp_path, tmp_path / "out", [method])


def test_command(lab: Lab, folder: Path, tmp_path: Path) -> None:
    common = [
        "evaluate", "--store", folder / "store", "--part", "one", "--val-set", folder / "val.jsonl", "--test",
        "tail-patch", "--top-k", "3", "--out", tmp_path / "out", "--device", "cpu", "--quiet", "--method",
    ]  # fmt: skip
    outcome = lab.run(*common, "exact-dot", "--json")
    assert outcome.code == 0, outcome.err
    (one,) = outcome.json["tail_patch"]
    assert one["method"] == "exact-dot"
    assert one["gain"] > one["random"]
    refused = lab.run(*common, "exact")
    assert refused.code == 2
    assert "'exact' is unknown" in refused.err
    assert all(method in refused.err for method in METHODS)
