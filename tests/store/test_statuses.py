"""Every row of the corpus keeps its place with a status; a row without a vector is in no result."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore import Status
from ghoststore.errors import UsageError
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

ODD = "~"
"""A character of no other row; byte-level, it is a token of its own."""


def build(lab: Lab, folder: Path, rows: list[dict[str, Any]], **settings: Any) -> ghoststore.Part:
    corpus = lab.write(folder / "rows.jsonl", rows)
    store = folder / "store"
    plain = ghoststore.ProjectionConfig(precondition="none")  # scales of models stay those of their gradients
    settings = {
        "checkpoint": lab.checkpoint,
        "span_rows": 4,
        "device": "cpu",
        "projection": plain,
        "proj_dtype": "float32",
    } | settings
    report = ghoststore.build(data=corpus, store=store, **settings)
    part = ghoststore.Store.open(store).part()
    counts: dict[str, int] = {}
    for status in read(part, "status"):
        counts[Status(status).name.lower()] = counts.get(Status(status).name.lower(), 0) + 1
    assert report.statuses == ghoststore.info(store).parts[0].statuses == counts
    assert report.rows == len(read(part, "status"))
    return part


def read(part: ghoststore.Part, name: str) -> np.ndarray:
    return part.read(name, 0, part.layout.rows)


def statuses(part: ghoststore.Part) -> list[Status]:
    return [Status(value) for value in read(part, "status")]


def check(lab: Lab, part: ghoststore.Part, metric: str = "cosine") -> None:
    """Unusable rows are zeros, and no query returns them from either end; usable ones are all there."""
    usable = [row for row, status in enumerate(statuses(part)) if status.usable]
    vectors = vectors_of(part)
    for row, status in enumerate(statuses(part)):
        assert np.isfinite(vectors[row]).all()
        assert bool(vectors[row].any()) == status.usable
        if not status.usable:
            assert not read(part, "norm")[row].any()
            assert read(part, "loss")[row] == 0
    assert np.isfinite(read(part, "norm")).all()
    assert np.isfinite(read(part, "loss")).all()
    found = ghoststore.query(
        store=part.path.parent.parent,
        val_set=lab.corpus,
        metric=metric,
        top_k=1000,
        bottom_k=1000,
        device="cpu",
        checkpoint=part.manifest["source"]["checkpoint"],
    )
    for hits in (found.results[0].hits, found.results[0].bottom):
        assert sorted(hit.source_row for hit in hits) == sorted(int(read(part, "source_row")[row]) for row in usable)
        assert all(np.isfinite(hit.score) for hit in hits)


def test_rows_without_a_target(lab: Lab, tmp_path: Path) -> None:
    texts: list[Any] = ["the cat sees the dog", "", None, "a", "the cat", " ", "old moon over the river", "", "red sun"]
    part = build(lab, tmp_path, [{"text": text, "id": f"s{i}"} for i, text in enumerate(texts)])
    expected = [
        Status.OK,
        Status.EMPTY,
        Status.EMPTY,
        Status.TOO_SHORT,
        Status.OK,
        Status.TOO_SHORT,
        Status.OK,
        Status.EMPTY,
        Status.OK,
    ]
    assert statuses(part) == expected
    assert read(part, "sample_id").tolist() == [f"s{i}" for i in range(9)]
    assert read(part, "source_row").tolist() == list(range(9))
    assert [count > 1 for count in read(part, "n_tokens")] == [status.usable for status in expected]
    check(lab, part)


def test_prompts_and_completions(lab: Lab, tmp_path: Path) -> None:
    pairs: list[tuple[Any, Any]] = [
        ("the cat", " sees the dog"),
        ("the cat", ""),
        ("", "the dog"),
        ("", ""),
        (None, "dog"),
        ("cat", None),
        ("the old moon over the river " * 9, " never read"),
        ("cat", "s"),
    ]
    part = build(lab, tmp_path, [{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    assert statuses(part) == [
        Status.OK,
        Status.NO_TARGETS,
        Status.OK,
        Status.EMPTY,
        Status.EMPTY,
        Status.EMPTY,
        Status.NO_TARGETS,
        Status.OK,
    ]
    check(lab, part)


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("overlong", "expected"),
    [("truncate", [Status.OK, Status.TRUNCATED, Status.OK]), ("skip", [Status.OK, Status.TOO_LONG, Status.OK])],
)
def test_overlong_rows(lab: Lab, tmp_path: Path, overlong: str, expected: list[Status]) -> None:
    rows = [{"text": "the cat"}, {"text": "the old moon " * 20}, {"text": "the dog"}]
    part = build(lab, tmp_path, rows, overlong=overlong, max_length=8)
    assert statuses(part) == expected
    assert read(part, "n_tokens").max() <= 8
    check(lab, part)


def test_overlong_rows_in_windows(lab: Lab, tmp_path: Path) -> None:
    """Each window is a row of its sample: its first token is named, and every token but the first is a target once."""
    rows = [{"text": "the cat"}, {"text": "the old moon " * 8}, {"text": "the dog"}]
    part = build(lab, tmp_path, rows, overlong="window", max_length=8)
    sources, starts, lengths = (read(part, name).tolist() for name in ("source_row", "window_start", "n_tokens"))
    windows = [row for row, source in enumerate(sources) if source == 1]
    assert sources == [0, *[1] * len(windows), 2]
    assert len(windows) > 2
    assert [starts[row] for row in windows] == list(range(0, 7 * len(windows), 7))
    assert all(lengths[row] == 8 for row in windows[:-1])
    found = ghoststore.query(store=tmp_path / "store", val_set=lab.corpus, top_k=100, device="cpu").results[0].hits
    assert sorted((hit.source_row, hit.window_start) for hit in found) == sorted(zip(sources, starts, strict=True))
    assert {hit.text for hit in found if hit.source_row == 1} == {"the old moon " * 8}
    check(lab, part)


def test_overlong_rows_as_an_error(lab: Lab, tmp_path: Path) -> None:
    rows = [{"text": "the cat", "id": "short"}, {"text": "the old moon " * 20, "id": "long"}]
    with pytest.raises(UsageError, match=r"sample 'long' \(row 1\) has \d+ tokens; `max_length` is 8"):
        build(lab, tmp_path, rows, overlong="error", max_length=8)


def overflowing(model: Any, tokenizer: Any) -> None:
    """The embedding of one token is finite, and what is computed from it is not."""
    model.transformer.wte.weight[tokenizer(ODD)["input_ids"]] = 3e38


def test_rows_that_are_not_finite(lab: Lab, tmp_path: Path) -> None:
    """They have zeros; their batch mates are what they are without them."""
    checkpoint = lab.model(tmp_path / "model", change=overflowing, tie_word_embeddings=False)
    rows = lab.sample_rows(11)
    odd = [2, 3, 9]
    for row in odd:
        rows[row] = rows[row] | {"text": f"the {ODD} cat {row}"}
    part = build(lab, tmp_path, rows, checkpoint=checkpoint)
    assert statuses(part) == [Status.NOT_FINITE if row in odd else Status.OK for row in range(11)]
    check(lab, part)
    (tmp_path / "plain").mkdir()
    plain = build(lab, tmp_path / "plain", lab.sample_rows(11), checkpoint=checkpoint)
    for row in set(range(11)) - set(odd):
        np.testing.assert_allclose(read(part, "vectors")[row], read(plain, "vectors")[row], rtol=1e-3, atol=1e-5)


def test_a_val_set_that_is_not_finite(lab: Lab, tmp_path: Path) -> None:
    """Such val rows are left out and counted; if none is left, that is an error."""
    checkpoint = lab.model(tmp_path / "model", change=overflowing, tie_word_embeddings=False)
    build(lab, tmp_path, lab.sample_rows(11), checkpoint=checkpoint)
    val = lab.write(tmp_path / "val.jsonl", [{"text": f"{ODD} cat"}, {"text": "the dog"}, {"text": ""}])
    found = ghoststore.query(store=tmp_path / "store", val_set=val, device="cpu")
    assert found.settings["val_rows"] == 1
    assert found.settings["val_rows_left_out"] == {"not_finite": 1, "empty": 1}
    with pytest.raises(UsageError, match=r"no row of the val set .* can be used"):
        ghoststore.query(store=tmp_path / "store", val_set=val, max_samples=1, device="cpu")


@pytest.mark.thin(1)
@pytest.mark.parametrize(("scale", "kinds"), [(5.5e4, {Status.OK, Status.OUT_OF_RANGE}), (1e8, {Status.OUT_OF_RANGE})])
def test_rows_too_large_for_float16(lab: Lab, tmp_path: Path, scale: float, kinds: set[Status]) -> None:
    def steeper(model: Any, tokenizer: Any) -> None:
        model.transformer.ln_f.weight.mul_(scale)

    checkpoint = lab.model(tmp_path / "model", change=steeper, tie_word_embeddings=False)
    (tmp_path / "exact").mkdir()
    same: dict[str, Any] = {
        "checkpoint": checkpoint,
        "projection": ghoststore.ProjectionConfig(precondition="none", compress=256),
    }
    exact = build(lab, tmp_path / "exact", lab.rows, **same)
    assert set(statuses(exact)) == {Status.OK}
    largest = np.abs(read(exact, "vectors")).max(1)
    part = build(lab, tmp_path, lab.rows, **same, proj_dtype="float16")
    assert statuses(part) == [Status.OUT_OF_RANGE if value > 65519 else Status.OK for value in largest]
    assert set(statuses(part)) == kinds
    check(lab, part)
    check(lab, part, metric="dot")


def test_gradients_near_the_end_of_float32(lab: Lab, tmp_path: Path) -> None:
    """Their squares overflow: a cosine is a cosine all the same, and a dot product that is none is no score."""

    def steeper(model: Any, tokenizer: Any) -> None:
        model.transformer.ln_f.weight.mul_(1e20)

    checkpoint = lab.model(tmp_path / "model", change=steeper, tie_word_embeddings=False)
    part = build(lab, tmp_path, lab.rows, checkpoint=checkpoint)
    assert set(statuses(part)) == {Status.OK}
    assert np.abs(read(part, "vectors")).max() > 1e19
    wanted = {"store": tmp_path / "store", "val_set": tmp_path / "rows.jsonl", "each": True, "device": "cpu"}
    with suppress(UsageError):
        hits = ghoststore.query(**wanted, metric="dot").results[0].hits
        assert all(np.isfinite(hit.score) for hit in hits)
    found = ghoststore.query(**wanted, metric="cosine")
    assert [result.hits[0].source_row for result in found.results] == list(range(len(lab.rows)))
    assert all(result.hits[0].score == pytest.approx(1, abs=1e-5) for result in found.results)
