"""Names and counts that fit by chance: what is joined by them is checked by what it is, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import UsageError
from query.ask.blend import values_of_rows
from query.evaluate.lds import half, lds
from tests.support.notes import Notes

if TYPE_CHECKING:
    from tests.conftest import Lab

SAMPLES, HALVES = 24, 9


# Val rows that have a gradient at several checkpoints.


@pytest.fixture(scope="module")
def broken(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, each with one character whose embedding overflows, and val samples of one id with them:
    at each checkpoint two of three have a gradient, but not the same two.
    """
    folder = tmp_path_factory.mktemp("broken")
    rows = lab.sample_rows(SAMPLES, 1)
    data = lab.write(folder / "train.jsonl", rows)
    texts = ["the cat # sees", "the dog @ sees", "the sun runs"]
    lab.write(folder / "val.jsonl", [{"id": "a", "text": text, "task": "t"} for text in texts])
    for seed, (name, character) in enumerate({"one": "#", "two": "@"}.items()):

        def change(model: Any, tokenizer: Any, character: str = character) -> None:
            (token,) = tokenizer(character)["input_ids"]
            model.transformer.wte.weight[token] = 3e38 * (-1.0) ** torch.arange(32)

        ghoststore.build(
            checkpoint=lab.model(folder / name, seed=seed, change=change, tie_word_embeddings=False),
            data=data,
            store=folder / "store",
            name=name,
            projection=ProjectionConfig(precondition="none"),
            device="cpu",
        )
    return folder


@pytest.mark.parametrize("mode", [{"each": True}, {}, {"group_field": "task"}], ids=["each", "mean", "groups"])
def test_other_val_rows_of_the_same_ids_are_not_summed(broken: Path, mode: Any) -> None:
    def ask(part: Any, **settings: Any) -> Any:
        return ghoststore.query(
            store=broken / "store",
            val_set=broken / "val.jsonl",
            part=part,
            text=False,
            device="cpu",
            **mode,
            **settings,
        )

    used = [ask(part).settings["val_rows"] for part in ("one", "two")]
    assert used == [2, 2], "as many at both"
    with pytest.raises(UsageError, match=r"2 val samples have a gradient .* and 2 \(or others\)"):
        ask(["one", "two"], part_weights="equal")


# Groups of a val set.


def val_of(lab: Lab, path: Path, domains: tuple[str, ...], seed: int) -> Path:
    rows = lab.sample_rows(len(domains), seed)
    return lab.write(path, [row | {"domain": domain} for row, domain in zip(rows, domains, strict=True)])


@pytest.fixture(scope="module")
def trained(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part; and runs against one val set, with its groups and without, and against another with the same names."""
    folder = tmp_path_factory.mktemp("groups")
    data = lab.write(folder / "train.jsonl", lab.sample_rows(SAMPLES, 1))
    ghoststore.build(checkpoint=lab.checkpoint, data=data, store=folder / "store", name="part", device="cpu")
    val_of(lab, folder / "val.jsonl", ("all", "sky", "sky", "sky"), 3)
    val_of(lab, folder / "other.jsonl", ("sky", "all", "sky"), 9)
    for name, val, groups in (("whole", "val", False), ("grouped", "val", True), ("other", "other", True)):
        ghoststore.train(
            data=data,
            val_set=folder / f"{val}.jsonl",
            checkpoint=lab.checkpoint,
            output_dir=folder / name,
            store=folder / "store",
            name=name,
            max_steps=6,
            batch_size=4,
            val_groups=groups,
            overlong="truncate",
            device="cpu",
        )
    return folder


def of_run(folder: Path, out: Path, run: str, notes: Notes) -> tuple[Any, Any]:
    """(the LDS of a run as it is said, that of its values for the whole val set against the mean of all losses)."""
    found = ghoststore.evaluate(
        store=folder / "store",
        val_set=folder / "val.jsonl",
        out=out,
        part="part",
        run=run,
        methods=["random"],
        halves=HALVES,
        max_steps=3,
        batch_size=4,
        workers=1,
        device="cpu",
        progress=notes,
    )
    kept = np.stack([half(0, number, SAMPLES) for number in range(HALVES)])
    files = sorted((out / "trainings").iterdir())
    losses = np.stack([json.loads(file.read_text())["val_loss"] for file in files], axis=1)
    store = ghoststore.Store.open(folder / "store")
    whole = np.nan_to_num(values_of_rows(store.part("part"), store.run(run), "unit", notes).value)
    (said,) = (one.groups for one in found.lds if one.method.startswith("training-time"))
    return said, lds(whole[None], kept, losses.mean(0, keepdims=True))


@pytest.mark.slow
def test_a_group_called_all_is_not_the_whole(trained: Path, tmp_path: Path) -> None:
    """Scores for the whole val set are compared with the losses of all of it."""
    said, expected = of_run(trained, tmp_path / "out", "whole", Notes())
    assert said == expected


@pytest.mark.slow
def test_groups_of_another_val_set_are_not_ours(trained: Path, tmp_path: Path) -> None:
    notes = Notes()
    said, expected = of_run(trained, tmp_path / "out", "other", notes)
    assert said == expected
    assert [note for note in notes.said if "against another val set" in note]
    notes = Notes()
    said, _ = of_run(trained, tmp_path / "out", "grouped", notes)
    assert said.targets == 2
    assert not [note for note in notes.said if "against another val set" in note]


@pytest.mark.slow
def test_a_domain_called_none_is_not_no_domain(lab: Lab, tmp_path: Path) -> None:
    rows = lab.sample_rows(3, 3)
    val = lab.write(tmp_path / "val.jsonl", [rows[0] | {"domain": "none"}, rows[1] | {"domain": None}, rows[2]])
    settings: dict[str, Any] = {
        "data": lab.corpus,
        "checkpoint": lab.checkpoint,
        "store": tmp_path / "store",
        "val_groups": True,
        "max_steps": 1,
        "batch_size": 2,
        "overlong": "truncate",
        "device": "cpu",
    }
    with pytest.raises(UsageError, match=r"'row-0' \(row 0\) has a domain called 'none'"):
        ghoststore.train(val_set=val, output_dir=tmp_path / "a", **settings)
    lab.write(val, [rows[0] | {"domain": "none"}, rows[1] | {"domain": "None"}, rows[2]])
    report = ghoststore.train(val_set=val, output_dir=tmp_path / "b", **settings)
    assert sorted(report.val_loss_by_domain) == ["None", "none", "sky"]
    lab.write(val, [rows[0] | {"domain": ""}, rows[1] | {"domain": None}, rows[2]])
    report = ghoststore.train(val_set=val, output_dir=tmp_path / "c", name="empty", **settings)
    assert sorted(report.val_loss_by_domain) == ["", "none", "sky"]


# An explicit id that looks like a place.


def test_an_id_that_is_another_rows_place(lab: Lab, tmp_path: Path) -> None:
    """Ids are the field's, not places, and a hit's row is its place."""
    rows = [row | {"id": str(SAMPLES - 1 - place)} for place, row in enumerate(lab.sample_rows(SAMPLES, 1))]
    data = lab.write(tmp_path / "train.jsonl", rows)
    ghoststore.build(checkpoint=lab.checkpoint, data=data, store=tmp_path / "store", device="cpu")
    found = ghoststore.query(store=tmp_path / "store", val_set=data, top_k=SAMPLES, device="cpu").results[0].hits
    assert {hit.source_row: (hit.id, hit.text) for hit in found} == {
        place: (row["id"], row["text"]) for place, row in enumerate(rows)
    }
