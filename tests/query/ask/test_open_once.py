"""A command opens each part, the val set and each model once, and fingerprints the weights once."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore import Part, ProjectionConfig
from ghoststore.checkpoint import load
from ghoststore.checkpoint.find import Checkpoint
from ghoststore.corpus import corpus
from ghoststore.corpus.corpus import Corpus
from ghoststore.store.spans.group import Spanned

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a sketched part, and plain parts of two checkpoints and of two ranks."""
    folder = tmp_path_factory.mktemp("once")
    data = lab.write(folder / "train.jsonl", lab.sample_rows(40, 1))
    lab.write(folder / "val.jsonl", lab.sample_rows(4, 3))
    plain = ProjectionConfig(precondition="none", rank_total=16)
    builds: dict[str, dict[str, Any]] = {
        "sketched": {"projection": ProjectionConfig(precondition="none", compress=24)},
        "plain": {"projection": plain},
        "other": {"projection": plain, "checkpoint": lab.model(folder / "other", seed=1)},
        "wider": {"projection": ProjectionConfig(precondition="none", rank_total=32)},
    }
    for name, given in builds.items():
        settings: dict[str, Any] = {"checkpoint": lab.checkpoint, "span_rows": 16, "device": "cpu"} | given
        ghoststore.build(data=data, store=folder / "store", name=name, **settings)
    return folder


@pytest.fixture
def opened(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each thing is opened from here on, by one who has asked nothing before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    counts: Counter[str] = Counter()

    def counted(owner: Any, name: str, what: Callable[..., str | None]) -> None:
        real = getattr(owner, name)

        def wrapper(*args: Any, **settings: Any) -> Any:
            if (key := what(*args)) is not None:
                counts[key] += 1
            return real(*args, **settings)

        monkeypatch.setattr(owner, name, wrapper)

    counted(load, "refuse_lookahead", lambda *_: "model")  # the end of every load
    counted(Checkpoint, "fingerprint", lambda *_: "fingerprint")
    counted(corpus, "locate", lambda source: Path(source).stem)
    counted(Spanned, "__init__", lambda self, path: path.name if isinstance(self, Part) else None)
    assert Corpus.open(str(folder / "val.jsonl"))
    assert counts.pop("val") == 1
    return counts


@pytest.mark.thin(4)
@pytest.mark.parametrize("part", ["sketched", "plain"])
@pytest.mark.parametrize("settings", [{}, {"rerank": 12}, {"each": True, "rerank": 12}, {"group_field": "domain"}])
def test_query(folder: Path, tmp_path: Path, opened: Counter[str], part: str, settings: dict[str, Any]) -> None:
    report = tmp_path / "page.html"
    ghoststore.query(
        store=folder / "store", part=part, val_set=folder / "val.jsonl", report=report, device="cpu", **settings
    )
    del opened["train"]  # the texts of the hits
    assert opened == {part: 1, "val": 1, "model": 1, "fingerprint": 1}


def test_query_of_several_parts(folder: Path, tmp_path: Path, opened: Counter[str]) -> None:
    ghoststore.query(
        store=folder / "store",
        part=["plain", "other"],
        part_weights="equal",
        val_set=folder / "val.jsonl",
        report=tmp_path / "page.html",
        text=False,
        device="cpu",
    )
    assert opened == {"plain": 1, "other": 1, "val": 1, "model": 2, "fingerprint": 2}


def test_select(folder: Path, tmp_path: Path, opened: Counter[str]) -> None:
    ghoststore.select(
        store=folder / "store",
        part="sketched",
        val_set=folder / "val.jsonl",
        count=5,
        diversity="mmr",
        out=tmp_path / "out.jsonl",
        device="cpu",
    )
    assert opened == {"sketched": 1, "val": 1, "train": 1, "model": 1, "fingerprint": 1}


def test_self_influence(folder: Path, opened: Counter[str]) -> None:
    ghoststore.self_influence(store=folder / "store", part="plain", damping=1.0, text=False, device="cpu")
    assert opened == {"plain": 1}


@pytest.mark.parametrize("val_set", [True, False])
def test_fidelity(folder: Path, opened: Counter[str], val_set: bool) -> None:
    given = folder / "val.jsonl" if val_set else None
    ghoststore.fidelity(store=folder / "store", part="sketched", rows=20, val_samples=3, val_set=given, device="cpu")
    assert opened == {"sketched": 1, "train": 1, "model": 1, "fingerprint": 1} | ({"val": 1} if val_set else {})


@pytest.mark.slow
def test_plot_error(folder: Path, tmp_path: Path, opened: Counter[str]) -> None:
    """Parts of one checkpoint share its model."""
    ghoststore.plot_error(
        store=folder / "store",
        part=["plain", "wider"],
        rows=20,
        val_samples=3,
        out=tmp_path / "curve.png",
        device="cpu",
    )
    assert opened == {"plain": 1, "wider": 1, "train": 1, "model": 1, "fingerprint": 1}


@pytest.mark.slow
def test_evaluate(folder: Path, tmp_path: Path, opened: Counter[str]) -> None:
    """The trainings read the val set by themselves: once to plan them, once where they run."""
    ghoststore.evaluate(
        store=folder / "store",
        part=["plain", "other"],
        part_weights="equal",
        val_set=folder / "val.jsonl",
        out=tmp_path / "out",
        methods=("dot", "cosine", "preconditioned-dot", "exact-dot"),
        damping=1.0,
        halves=3,
        max_steps=1,
        batch_size=2,
        workers=1,
        device="cpu",
    )
    assert opened["plain"] == opened["other"] == 1
    assert opened["model"] == opened["fingerprint"] == 2
    assert opened["val"] == 1 + 2


def test_a_val_set_on_standard_input(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be read once alone, and serves what layers add, too."""
    report = tmp_path / "page.html"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((folder / "val.jsonl").read_bytes())))
    ghoststore.query(store=folder / "store", part="sketched", val_set="-", report=report, device="cpu")
    assert "What each layer adds, mean" in report.read_text()
