"""``ghoststore query --run``: what is damaged, and what cannot be asked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore.errors import CorruptError, MismatchError, UsageError
from tests.support.harms import flip
from tests.support.kept_runs import ask, at_checkpoint, scores, train
from tests.support.runs import rewrite_manifest

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_damage_is_never_an_answer(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "store", tmp_path / "store")
    (chunk,) = (tmp_path / "store/runs/moving/gradient/c").rglob("0/0/0/0")
    flip(chunk, chunk.stat().st_size // 2)
    with pytest.raises(CorruptError, match=r"gradient/c/0/0/0/0 is damaged"):
        ask(tmp_path)
    assert [damage.file for damage in ghoststore.verify(tmp_path / "store").damage] == ["gradient/c/0/0/0/0"]


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    "wrong",
    [
        {"gradients": {"projection": {"compress": None}, "layers": [{"name": "a"}]}},
        {"gradients": {"projection": 5, "layers": []}},
        {
            "gradients": {
                "projection": {"compress": None},
                "layers": [{"name": "a", "type": "linear", "columns": [0, 9**9]}],
            }
        },
    ],
)
def test_a_manifest_may_say_anything(folder: Path, wrong: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(folder / "store", tmp_path / "store")
    rewrite_manifest(tmp_path / "store/runs/moving", lambda manifest: manifest["scoring"].update(wrong))
    with pytest.raises(CorruptError, match="does not describe"):
        ask(tmp_path, layers=("a",))
    with pytest.raises(CorruptError, match="does not describe a projection"):
        ask(tmp_path, **at_checkpoint(folder))
    assert len(scores(ask(tmp_path))) > 0  # its own val gradients need neither


def test_a_run_that_does_not_describe_its_projection(folder: Path, tmp_path: Path) -> None:
    """It is taken for the default one, and refused where its hash says that it is not."""
    shutil.copytree(folder / "store", tmp_path / "store")
    rewrite_manifest(tmp_path / "store/runs/moving", lambda manifest: manifest["scoring"].pop("gradients"))
    with pytest.raises(MismatchError, match="it is not the default one"):
        ask(tmp_path, **at_checkpoint(folder))
    with pytest.raises(UsageError, match="it has no scores by layer"):
        ask(tmp_path, layers=("mlp",))


def test_what_cannot_be_is_refused(folder: Path, lab: Lab, tmp_path: Path) -> None:
    checkpoint = {"checkpoint": folder / "moving" / "checkpoint-6"}
    val = {"val_set": folder / "val.jsonl"}
    for options, words in (
        (val, "give `checkpoint`, a checkpoint of that training"),
        (checkpoint, "`checkpoint` is for a val set: give `val_set`"),
        ({"each": True}, "`each` is for a val set"),
        ({"part": "part"}, "`part` is for parts"),
        ({"precondition": "second-moment"}, "`precondition=second-moment` is for parts"),
        ({"index": "ann"}, "`index=ann` is for parts"),
        ({"rerank": 5}, "`rerank` is for parts"),
        ({"rerank_with": "cg"}, "`rerank_with=cg` is for parts"),
        ({"cg_steps": 3}, "`cg_steps` is for parts"),
        ({"index_name": "i"}, "`index_name` is for parts"),
        ({"report": tmp_path / "r.html"}, "`report` is for parts"),
        ({"last": 0}, "`last` must be at least 1"),
        ({"last": 3, "step_window": "0:3"}, "`last` is a window of steps, and so is `step_window`"),
        ({"step_window": "3:4"}, "keeps the gradients of one step in 2, and steps 3 to 3 have none"),
        ({"step_window": "x"}, "`step_window` 'x': expected first:stop"),
        ({"layers": ("attn.nothing",)}, "matches no layer of run 'moving'"),
        ({**val, **checkpoint, "layers": ("head",)}, "matches no layer of run 'moving'"),
    ):
        with pytest.raises(UsageError, match=words):
            ask(folder, **options)
    with pytest.raises(UsageError, match="give `val_set`: what is asked for is near its gradient"):
        ghoststore.query(store=folder / "store")
    for name, value in (("last", 3), ("step_window", "0:3")):
        with pytest.raises(UsageError, match=f"`{name}.*` belongs to `run`"):
            ghoststore.query(store=folder / "store", **val, **{name: value})
    with pytest.raises(UsageError, match=r"`weight=loss-fall` is what a step .*: give `run`, or `with_scores`"):
        ghoststore.query(store=folder / "store", **val, weight="loss-fall")
    other = lab.model(tmp_path / "other", layers=2)
    with pytest.raises(MismatchError, match=r"run 'moving' is of another model"):
        ask(folder, **val, checkpoint=other)
    train(lab, folder, "plain", max_steps=2, projection=None)
    with pytest.raises(UsageError, match="run 'plain' keeps no gradients"):
        ask(folder, "plain")
    assert lab.run("query", "--store", folder / "store", "--run", "plain").code == 2
