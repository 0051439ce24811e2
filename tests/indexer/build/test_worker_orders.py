"""What workers of a build are told, and what they keep between orders."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore.progress import Silent
from ghoststore.settings.build import BuildOptions
from ghoststore.store import Part, Store
from indexer.build import crew, inputs, spans
from indexer.build.beginning import begin
from indexer.build.build import opened
from indexer.build.crew import Death, Done, Hand, Ready, build_by
from indexer.build.report import BuildReport
from tests.support.parts import unbuild

if TYPE_CHECKING:
    from tests.conftest import Lab


def options_of(lab: Lab, store: Path, span_rows: int = 6) -> BuildOptions:
    return BuildOptions(
        store=store, checkpoint=lab.checkpoint, data=lab.corpus, name="part", span_rows=span_rows, device="cpu"
    )


class Told:
    """A worker that does nothing, and says at once that it has done it."""

    def __init__(self, number: int, report: BuildReport) -> None:
        self.number, self.says = number, [Ready(report=report, learning=0.0)]
        self.orders: list[int] = []

    def order(self, spans: Sequence[int] | None) -> None:
        if spans is not None:
            self.orders.append(len(spans))
            self.says = [Done()]

    def end(self) -> None:
        pass


class Hands:
    """Workers in turn, each as fast as the other."""

    def __init__(self, report: BuildReport) -> None:
        self.report = report
        self.all: list[Told] = []

    def start(self, number: int, keywords: Mapping[str, Any]) -> Hand:
        self.all.append(Told(number, self.report))
        return self.all[-1]

    def hear(self, hands: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        for hand in hands:
            yield hand, hand.says.pop() if hand.says else Death("it was let go")


def test_lists_are_shorter_at_the_end(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last are of one span: nobody waits long for another's."""
    monkeypatch.setattr(crew, "PIECES", 2)
    options = options_of(lab, tmp_path / "store", span_rows=1)
    with opened(options, Silent(), lambda spans: []) as (job, part):
        report = BuildReport.of(job)
    count = part.layout.spans
    hands = Hands(report)
    build_by(hands, 2, options, Silent())
    one, other = (hand.orders for hand in hands.all)
    assert sum(one) + sum(other) == count
    assert one[0] == count // 4 > 1
    assert one[-1] == other[-1] == 1
    assert sorted(one, reverse=True) == one


def test_one_encoder_for_all_lists(lab: Lab, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first batch alone is checked; the bytes are those of one list."""
    made, encoder = [], spans.row_encoder
    monkeypatch.setattr(spans, "row_encoder", lambda job: made.append(job) or encoder(job))
    options = options_of(lab, tmp_path / "store")
    with opened(options, Silent(), lambda spans: []) as (job, part), spans.KeptEncoder(job) as kept:
        half = part.layout.spans // 2
        for only in (range(half), (), range(half, part.layout.spans)):
            spans.compute_spans(Part(part.path), job, Silent(), only, kept=kept)
    assert len(made) == 1
    assert lab.tree(tmp_path / "store") == lab.tree(built)


def test_no_encoder_where_nothing_is_left(lab: Lab, built: Path) -> None:
    with opened(options_of(lab, built), Silent(), lambda spans: []) as (job, part), spans.KeptEncoder(job) as kept:
        assert part.complete
        assert spans.compute_spans(part, job, Silent(), range(part.layout.spans), kept=kept)["compute"] == 0


def test_the_model_is_loaded_while_another_begins(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, before the part is there; the spans are then those of the part as the other made it."""
    ghoststore.build(store=tmp_path / "store", checkpoint=lab.checkpoint, data=lab.corpus, name="part", span_rows=6)
    whole = lab.tree(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    unbuild(store.part(), 0, 1)
    part, aside = store.part_path("part"), tmp_path / "aside"
    part.rename(aside)
    held = begin(store, "part", Silent(), pytest.fail)
    loaded, load = [], inputs.load_model

    def loading(*given: Any, **named: Any) -> Any:
        loaded.append(part.exists())
        if len(loaded) == 1:
            aside.rename(part)
            held.close()
        return load(*given, **named)

    monkeypatch.setattr(inputs, "load_model", loading)
    monkeypatch.setattr("indexer.build.beginning._Folder.pause", property(lambda claim: pytest.fail("it only waits")))
    ghoststore.build(
        store=tmp_path / "store",
        checkpoint=lab.checkpoint,
        data=lab.corpus,
        name="part",
        span_rows=6,
        worker="1/1",
    )
    assert loaded == [False]
    assert lab.tree(tmp_path / "store") == whole


def test_nothing_to_wait_for(lab: Lab, built: Path, tmp_path: Path) -> None:
    called = threading.Event()
    begin(Store.open(built), "part", Silent(), called.set).close()
    begin(Store.create(tmp_path / "new"), "part", Silent(), called.set).close()
    assert not called.is_set()
