"""What workers of a build are told, and what they keep between orders."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore.errors import UsageError
from ghoststore.progress import Silent
from ghoststore.settings.build import BuildOptions
from ghoststore.store import Part, Store
from ghoststore.store.base import writers
from ghoststore.store.spans.writer import BackgroundWriter, SpanData, write_span
from indexer.build import crew, inputs, spans
from indexer.build.beginning import begin
from indexer.build.crew import Death, Done, Hand, Ready, build_by
from indexer.build.estimate import report_of
from indexer.build.opened import opened
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
        """Spans of each."""
        self.lists: list[int] = []
        """How many it had, with each."""

    def order(self, spans: Sequence[int] | None) -> None:
        if spans is not None:
            self.orders.append(len(spans))
            self.says.append(Done())
            self.lists.append(len(self.says))

    def end(self) -> None:
        pass


class Hands:
    """Workers in turn, each as fast as the other."""

    def __init__(self, report: BuildReport, ahead: int = 1) -> None:
        self.report, self.ahead = report, ahead
        self.all: list[Told] = []

    def start(self, number: int, keywords: Mapping[str, Any]) -> Hand:
        self.all.append(Told(number, self.report))
        return self.all[-1]

    def hear(self, hands: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        for hand in hands:
            yield hand, hand.says.pop() if hand.says else Death("it was let go")


@pytest.mark.parametrize("ahead", [1, 2])
def test_lists_are_shorter_at_the_end(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """The last are of one span, and wait for nobody: no worker waits long for another's."""
    monkeypatch.setattr(crew, "PIECES", 2)
    options = options_of(lab, tmp_path / "store", span_rows=1)
    with opened(options, Silent(), lambda spans: []) as (job, part):
        report = report_of(job)
    count = part.layout.spans
    hands = Hands(report, ahead)
    build_by(hands, 2, options, Silent())
    assert [max(hand.lists) for hand in hands.all] == [ahead, ahead]
    assert [hand.lists[-1] for hand in hands.all] == [1, 1]
    one, other = (hand.orders for hand in hands.all)
    assert sum(one) + sum(other) == count
    assert one[0] == count // 4 > 1
    assert one[-1] == other[-1] == 1
    assert sorted(one, reverse=True) == one


def test_lists_follow_each_other(lab: Lab, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one encoder, whose first batch alone is checked. A list is asked for before the last one is written. The
    bytes are those of one list.
    """
    made, done, encoder, asked = [], [], spans.row_encoder, threading.Event()
    monkeypatch.setattr(spans, "row_encoder", lambda job: made.append(job) or encoder(job))
    options = options_of(lab, tmp_path / "store")
    with opened(options, Silent(), lambda spans: []) as (job, part), spans.KeptEncoder(job) as kept:
        half, count = part.layout.spans // 2, part.layout.spans

        def lists() -> Iterator[Sequence[int]]:
            yield range(half)
            asked.set()
            yield from ((), range(half, count), range(count))

        def write(part: Part, data: SpanData) -> None:
            assert data.span < half - 1 or asked.wait(60)
            write_span(part, data)

        monkeypatch.setattr(spans, "BackgroundWriter", partial(BackgroundWriter, write=write))
        spans.compute_lists(
            part, job, Silent(), lists(), kept=kept, done=lambda: done.append(Part(part.path).spans), wake=lambda: None
        )
    assert len(made) == 1
    assert done == [list(range(half))] * 2 + [list(range(count))] * 2
    assert lab.tree(tmp_path / "store") == lab.tree(built)


@pytest.mark.parametrize("where", ["computed", "written"])
def test_a_list_that_never_comes(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """An error, also of the thread that writes, ends the wait for it; what was written before is committed."""
    options, woken, handed_over = options_of(lab, tmp_path / "store"), threading.Event(), threading.Event()
    seal = spans.sealed_span

    def lists() -> Iterator[Sequence[int]]:
        yield [0, 1]
        assert woken.wait(60)

    def sealed(encoder: Any, rows: Sequence[Any], *others: Any) -> Any:
        if where == "computed" and rows[0].sample.source_row:
            raise UsageError("no more")
        return seal(encoder, rows, *others)

    class Writer(BackgroundWriter):
        def then(self, call: Callable[[], None]) -> None:
            super().then(call)
            handed_over.set()

    def write(part: Part, data: SpanData) -> None:
        if data.span:
            assert handed_over.wait(60)
            raise UsageError("no more")
        write_span(part, data)

    monkeypatch.setattr(spans, "sealed_span", sealed)
    monkeypatch.setattr(spans, "BackgroundWriter", partial(Writer, write=write))
    with (
        opened(options, Silent(), lambda spans: []) as (job, part),
        spans.KeptEncoder(job) as kept,
        pytest.raises(UsageError, match="no more"),
    ):
        spans.compute_lists(part, job, Silent(), lists(), kept=kept, done=pytest.fail, wake=woken.set)
    assert Store.open(tmp_path / "store").damaged_part("part").spans == [0]


def test_no_encoder_where_nothing_is_left(lab: Lab, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "row_encoder", pytest.fail)
    with opened(options_of(lab, built), Silent(), lambda spans: []) as (job, part), spans.KeptEncoder(job) as kept:
        assert part.complete
        every = range(part.layout.spans)
        assert spans.compute_spans(part, job, Silent(), every)["compute"] == 0
        done = []
        spans.compute_lists(
            part, job, Silent(), iter([every]), kept=kept, done=lambda: done.append(every), wake=lambda: None
        )
    assert done == [every]


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


def test_a_claim_that_goes_and_comes_while_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last owner removes it, and a third worker makes it again: that is no error, and it is tried once more."""
    store, write, tries = Store.create(tmp_path / "store"), writers._write, []

    def gone(place: Path, *given: Any) -> Path:
        tries.append(place)
        if len(tries) > 1:
            return write(place, *given)
        place.parent.rmdir()
        try:
            return write(place, *given)
        finally:
            place.parent.mkdir()

    monkeypatch.setattr(writers, "_write", gone)
    called = threading.Event()
    begin(store, "part", Silent(), called.set).close()
    assert called.is_set()
    assert len(tries) == 2
