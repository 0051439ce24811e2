"""``build --like PART``: other rows with the settings and the projection of a part; and corpora that grew."""

from __future__ import annotations

import gzip
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.checkpoint.load import find_checkpoint, load_model
from ghoststore.errors import MismatchError, UsageError
from ghoststore.store import Store
from ghoststore.store.part.part import fixed_array
from indexer.projection.adam import SCALES
from indexer.projection.calibration import FACTORS
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

ROWS, OLD, SPAN = 30, 16, 8
SETTINGS: dict[str, Any] = {
    "max_length": 24,
    "overlong": "skip",
    "loss_reduction": "sum",
    "proj_dtype": "int8",
    "batch_tokens": 96,
    "span_rows": SPAN,
    "keep_fields": ("source",),
    "store_text": True,
    "projection": ProjectionConfig(seed=5, layers=("mlp",), calibration_samples=12),
    "device": "cpu",
}


def rows_of(lab: Lab) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = lab.sample_rows(ROWS, 1)
    return [row | {"source": f"s{place % 3}"} for place, row in enumerate(rows)]


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``old``: of the first rows, with settings that are not the defaults; its corpus has grown since."""
    folder = tmp_path_factory.mktemp("like")
    rows = rows_of(lab)
    data = lab.write(folder / "train.jsonl", rows[:OLD])
    ghoststore.build(checkpoint=lab.checkpoint, data=data, store=folder / "store", name="old", **SETTINGS)
    lab.write(data, rows)
    lab.write(folder / "new.jsonl", rows[OLD:])
    ghoststore.build(like="old", data=folder / "new.jsonl", store=folder / "store", name="new", device="cpu")
    return folder / "store"


def test_has_the_settings_and_what_was_learned(store: Path) -> None:
    old, new = (Store.open(store).part(name) for name in ("old", "new"))
    for section in ("checkpoint", "tokenizer", "tokens", "loss", "projection", "layers", "dtype", "batching"):
        assert new.manifest[section] == old.manifest[section], section
    assert new.manifest["storage"] == old.manifest["storage"] | {"rows": ROWS - OLD}
    assert new.manifest["source"]["like"] == {"part": "old", "hash": old.manifest["projection"]["hash"]}
    for name in FACTORS:
        np.testing.assert_array_equal(fixed_array(new, name), fixed_array(old, name))
    assert new.complete


def test_vectors_are_those_of_one_part_of_all_rows(store: Path, lab: Lab) -> None:
    """Bit for bit: spans begin at the same rows, and what was learned is the old part's."""
    ghoststore.build(like="old", data=store.parent / "train.jsonl", store=store, name="all", device="cpu")
    whole, old, new = (Store.open(store).part(name) for name in ("all", "old", "new"))
    np.testing.assert_array_equal(vectors_of(whole), np.concatenate([vectors_of(old), vectors_of(new)]))
    assert whole.read_rows("text", [0, OLD]) == [old.read_rows("text", [0])[0], new.read_rows("text", [0])[0]]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"max_length": 12}, ("tokens.max_length", "24", "12")),
        ({"overlong": "truncate"}, ("tokens.overlong", "skip", "truncate")),
        ({"loss_reduction": "mean"}, ("loss.reduction", "sum", "mean")),
        ({"proj_dtype": "onebit"}, ("storage.dtype", "int8", "onebit")),
        ({"span_rows": 4}, ("storage.span_rows", "8", "4")),
        ({"model_dtype": "bfloat16"}, ("dtype.model", "float32", "bfloat16")),
        ({"keep_fields": ()}, ("storage.fields", "source", "[]")),
        ({"projection": ProjectionConfig(seed=6, layers=("mlp",), calibration_samples=12)}, ("seed", "5", "6")),
        ({"projection": ProjectionConfig(seed=5, layers=("mlp",))}, ("calibration_samples", "12", "256")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_that_differs_is_refused(store: Path, given: dict[str, Any], named: tuple[str, ...]) -> None:
    """Also where it is the default: both values are shown, and no part appears."""
    with pytest.raises(MismatchError) as refused:
        ghoststore.build(like="old", data=store.parent / "new.jsonl", store=store, name="other", device="cpu", **given)
    assert all(word in str(refused.value) for word in named), refused.value
    assert "other" not in Store.open(store).part_names()


def test_an_option_that_agrees_is_taken(store: Path) -> None:
    report = ghoststore.build(like="old", data=store.parent / "new.jsonl", store=store, name="new", **SETTINGS)
    assert report.resumed_rows == ROWS - OLD


def test_on_the_command_line_a_default_that_is_given_counts(store: Path, lab: Lab) -> None:
    words = ["build", "--like", "old", "--data", store.parent / "new.jsonl", "--store", store, "--name", "other"]
    refused = lab.run(*words, "--overlong", "truncate")
    assert refused.code == 3
    assert "tokens.overlong: stored 'skip', asked for 'truncate'" in refused.err
    again = lab.run(*words[:-1], "new", "--quiet")
    assert again.code == 0, again.err


def test_another_checkpoint_or_part_is_refused(store: Path, lab: Lab, tmp_path: Path) -> None:
    new: dict[str, Any] = {"data": store.parent / "new.jsonl", "store": store, "device": "cpu"}
    with pytest.raises(MismatchError, match=r"checkpoint\.fingerprint: stored"):
        ghoststore.build(like="old", checkpoint=lab.model(tmp_path / "model", seed=9), name="other", **new)
    with pytest.raises(UsageError, match="'none'"):
        ghoststore.build(like="none", name="other", **new)
    with pytest.raises(UsageError, match="another `name`"):
        ghoststore.build(like="old", name="old", **new)
    with pytest.raises(UsageError, match="give `checkpoint`; or `like`"):
        ghoststore.build(name="other", **new)
    # A part of another projection is not continued as one like this.
    ghoststore.build(checkpoint=lab.checkpoint, name="alone", **{**SETTINGS, **new})
    with pytest.raises(MismatchError, match=r"projection\.hash"):
        ghoststore.build(like="old", name="alone", **new)


def test_fields_of_another_type_are_refused(store: Path, lab: Lab, tmp_path: Path) -> None:
    rows = [row | {"source": place} for place, row in enumerate(lab.sample_rows(4, 2))]
    with pytest.raises(MismatchError, match=r"'source' as string; it is int"):
        ghoststore.build(
            like="old", data=lab.write(tmp_path / "new.jsonl", rows), store=store, name="other", device="cpu"
        )


def test_names_of_fields_of_a_compressed_corpus(lab: Lab, tmp_path: Path) -> None:
    """They are those of the part, although its rows have a field of the conventional name, too."""
    rows = [{"body": row["text"], "text": "a title", "id": row["id"]} for row in lab.sample_rows(8, 2)]
    where: dict[str, Any] = {"store": tmp_path / "store", "device": "cpu"}
    old, plain, packed = (tmp_path / name for name in ("old.jsonl", "new.jsonl", "packed.jsonl.gz"))
    lab.write(old, rows[:5])
    packed.write_bytes(gzip.compress(lab.write(plain, rows[5:]).read_bytes()))
    ghoststore.build(checkpoint=lab.checkpoint, data=old, name="old", fields=ghoststore.Fields(text="body"), **where)
    for data in (plain, packed):
        ghoststore.build(like="old", data=data, name=data.name, **where)
    parts = [Store.open(tmp_path / "store").part(data.name) for data in (plain, packed)]
    assert [part.manifest["corpus"]["fields"]["text"] for part in parts] == ["body", "body"]
    np.testing.assert_array_equal(*map(vectors_of, parts))


def test_a_scaled_part(lab: Lab, tmp_path: Path) -> None:
    """Scales of an optimizer state are copied, too, and the state is not read again."""
    folder = lab.model(tmp_path / "model")
    model = load_model(find_checkpoint(folder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.arange(2, 22).view(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    where: dict[str, Any] = {"store": tmp_path / "store", "device": "cpu"}
    data = lab.write(tmp_path / "data.jsonl", lab.sample_rows(6, 2))
    ghoststore.build(checkpoint=folder, data=lab.corpus, name="old", optimizer_state=folder, **where)
    (folder / "optimizer.pt").unlink()
    ghoststore.build(like="old", data=data, name="new", **where)
    old, new = (Store.open(tmp_path / "store").part(name) for name in ("old", "new"))
    assert old.manifest["projection"]["optimizer_state"] == new.manifest["projection"]["optimizer_state"] is not None
    for name in SCALES:
        np.testing.assert_array_equal(fixed_array(new, name), fixed_array(old, name))


def test_a_learned_array_that_is_lost_is_copied_back(store: Path) -> None:
    part = Store.open(store).part("new")
    (lost,) = [part.path / name for name in part.files if name.startswith(f"{FACTORS[0]}/c")]
    before = lost.read_bytes()
    lost.unlink()
    assert ghoststore.repair(store=store, part="new", device="cpu").sound
    assert lost.read_bytes() == before


def test_workers_build_the_same(store: Path) -> None:
    ghoststore.build(like="old", data=store.parent / "new.jsonl", store=store, name="two", workers=2, device="cpu")
    new, two = (Store.open(store).part(name) for name in ("new", "two"))
    np.testing.assert_array_equal(vectors_of(two), vectors_of(new))
    assert two.manifest["source"]["like"] == new.manifest["source"]["like"]


def test_a_corpus_that_grew_is_offered_its_new_rows(store: Path, lab: Lab) -> None:
    """The command that the error names builds them, and the next growth is offered from there."""
    words: list[str | Path] = ["build", "--checkpoint", lab.checkpoint, "--data", store.parent / "train.jsonl"]
    words += ["--store", store, "--name", "old", "--max-length", "24", "--overlong", "skip", "--loss-reduction", "sum"]
    words += ["--proj-dtype", "int8", "--batch-tokens", "96", "--span-rows", str(SPAN), "--keep-fields", "source"]
    words += ["--store-text", "--proj-seed", "5", "--proj-layers", "mlp", "--calibration-samples", "12"]
    grown = lab.run(*words, "--device", "cpu")
    assert grown.code == 3
    assert f"the {OLD} samples of the part are unchanged, {ROWS - OLD} follow" in grown.err
    command = next(line for line in grown.err.splitlines() if line.startswith("  ghoststore build"))
    done = lab.run(*shlex.split(command)[1:])
    assert done.code == 0, done.err
    part, new = (Store.open(store).part(name) for name in (f"old-from-{OLD}", "new"))
    np.testing.assert_array_equal(vectors_of(part), vectors_of(new))
    assert part.column("source_row").tolist() == list(range(OLD, ROWS))
    assert part.manifest["corpus"]["skip_samples"] == OLD
    longer = [*rows_of(lab), *(row | {"source": "x"} for row in lab.sample_rows(3, 8))]
    before = (store.parent / "train.jsonl").read_text()
    try:
        lab.write(store.parent / "train.jsonl", longer)
        grown = lab.run(*shlex.split(command)[1:])
        assert grown.code == 3
        assert f"--like old-from-{OLD}" in grown.err
        assert f"--name old-from-{ROWS} --skip-samples {ROWS}" in grown.err
    finally:
        (store.parent / "train.jsonl").write_text(before)


def test_a_corpus_that_changed_elsewhere_is_not(store: Path, lab: Lab, tmp_path: Path) -> None:
    rows = rows_of(lab)
    rows[3] = rows[3] | {"text": "other words"}
    for changed in (rows, rows_of(lab)[: OLD - 1], rows_of(lab)[:OLD][::-1]):
        data = lab.write(tmp_path / "train.jsonl", changed)
        with pytest.raises(MismatchError) as refused:
            ghoststore.build(checkpoint=lab.checkpoint, data=data, store=store, name="old", **SETTINGS)
        assert "skip" not in str(refused.value).replace("overlong: stored 'skip'", "")
    grown_and_other = SETTINGS | {"projection": replace(SETTINGS["projection"], seed=6)}
    with pytest.raises(MismatchError, match=r"projection\.seed"):
        ghoststore.build(
            checkpoint=lab.checkpoint, data=store.parent / "train.jsonl", store=store, name="old", **grown_and_other
        )


def test_samples_are_skipped(lab: Lab, tmp_path: Path) -> None:
    where: dict[str, Any] = {"checkpoint": lab.checkpoint, "store": tmp_path / "store", "device": "cpu"}
    ghoststore.build(data=lab.corpus, skip_samples=5, max_samples=7, name="some", **where)
    part = Store.open(tmp_path / "store").part("some")
    assert part.column("source_row").tolist() == list(range(5, 12))
    assert part.read_rows("sample_id", [0]) == [json.loads(lab.corpus.read_text().splitlines()[5])["id"]]
    with pytest.raises(UsageError, match="beyond the first 27"):
        ghoststore.build(data=lab.corpus, skip_samples=27, name="none", **where)
