"""What the tests of exact scores in an evaluation share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.corpus import Fields
from ghoststore.progress import Silent
from ghoststore.settings.question import RebuiltOptions
from ghoststore.store import Store
from indexer.training.retrain import Recipe
from query.ask.question import Question
from query.evaluate.predictors import EXACT
from query.evaluate.task import Task

if TYPE_CHECKING:
    from tests.conftest import Lab

SAMPLES, VAL, UNUSABLE = 24, 5, 7
LENGTH = {"one": 32, "windows": 12}
METHODS = list(EXACT)


def exact_folder(lab: Lab, folder: Path) -> Path:
    """A store with a part of whole samples, one of windows and one of other ranks; a val set of short samples."""
    rows = lab.sample_rows(SAMPLES, 1)
    rows[UNUSABLE]["text"] = ""
    data = lab.write(folder / "train.jsonl", rows)
    texts = ["the cat sees", "a red bird", "the old song", "the moon gives", "a dog runs"]
    lab.write(folder / "val.jsonl", [{"text": text, "domain": ("sky", "earth")[i % 2]} for i, text in enumerate(texts)])
    settings: dict[str, dict[str, Any]] = {
        "one": {"projection": ProjectionConfig(precondition="none")},
        "windows": {
            "projection": ProjectionConfig(precondition="none"),
            "max_length": LENGTH["windows"],
            "overlong": "window",
        },
        "ranks": {"projection": ProjectionConfig(precondition="none", rank_total=16)},
    }
    for name, given in settings.items():
        ghoststore.build(
            checkpoint=lab.checkpoint,
            data=data,
            store=folder / "store",
            name=name,
            proj_dtype="float32",
            span_rows=16,
            device="cpu",
            **given,
        )
    return folder


def scores_of(folder: Path, out: Path, methods: list[str] = METHODS, part: str = "one", **given: Any) -> dict[str, Any]:
    """(V, N) by method."""
    val_set = str(given.pop("val_set", folder / "val.jsonl"))
    task = Task.of(
        Store.open(folder / "store").part(part),
        val_set,
        out,
        fields=Fields(),
        max_val_samples=None,
        recipe=Recipe(),
        behind=RebuiltOptions(),
        device="cpu",
        progress=given.pop("progress", Silent()),
    )
    base = Question(store=folder / "store", val_set=val_set, part=part, each=True, device="cpu")
    found = task.methods(base, [task.part], [1.0], methods, None, None)
    return {method: found[method]().samples_VN for method in methods}
