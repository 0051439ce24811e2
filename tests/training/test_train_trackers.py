"""What TensorBoard gets of the scores at save intervals, against what the run has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from indexer.training.score_summary import COLUMNS, RankedSamples
from indexer.training.trackers import _markdown

if TYPE_CHECKING:
    from tests.support.trainings import Gym, Trained

STEPS = 10


def cut(array: Any, start: int, stop: int) -> np.ndarray:
    return np.asarray(array[start:stop]).reshape(-1, *array.shape[3:])


def training(gym: Gym, folder: Path, **options: Any) -> tuple[Trained, Any]:
    """A training that logs, and the events that it logged."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained = gym.fresh(folder, max_steps=STEPS, val_groups=True, tensorboard=folder / "logs", **options)
    return trained, EventAccumulator(str(folder / "logs"), size_guidance={"histograms": 0, "tensors": 0}).Reload()


@pytest.mark.slow
@pytest.mark.parametrize("choosing", [{}, {"candidates": 9, "keep": 3, "choosing_begins_at": 0}])
def test_scores_at_save_intervals(gym: Gym, tmp_path: Path, choosing: dict[str, Any]) -> None:
    trained, events = training(gym, tmp_path, **choosing)
    run, arrays = trained.run, trained.arrays()
    scalars = {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
        if tag.startswith("scores/")
    }
    histograms = {event.step: event.histogram_value for event in events.Histograms("scores/histogram")}
    assert sorted(histograms) == [4, 8, STEPS]  # a save interval is 4 steps
    domain = np.array(trained.rows("domain"))
    for stop in histograms:
        start = (stop - 1) // 4 * 4
        score, sample = (cut(arrays[name], start, stop) for name in ("score", "sample"))
        weight = cut(arrays["weight"], start, stop) if choosing else None
        histogram = histograms[stop]
        assert (histogram.num, histogram.min, histogram.max) == (len(score), score.min(), score.max())
        for place, name in enumerate([*run.domains, "none"]):
            own = domain[sample] == (place if place < len(run.domains) else -1)
            tag = f"scores/by_domain/{name}"
            if not own.any():
                assert stop not in scalars.get(f"{tag}/mean", {})
                continue
            assert scalars[f"{tag}/mean"][stop] == pytest.approx(score[own].mean(), rel=1e-5)
            assert scalars[f"{tag}/negative_share"][stop] == pytest.approx((score[own] < 0).mean())
            if weight is not None:
                assert scalars[f"{tag}/kept_share"][stop] == pytest.approx((weight[own] > 0).mean())
        for place, name in enumerate(run.layout.groups):
            of_group = cut(arrays["group_score"], start, stop)[:, place]
            finite = of_group[np.isfinite(of_group)]
            tag = f"scores/by_group/{name}"
            assert scalars[f"{tag}/mean"][stop] == pytest.approx(finite.mean(), rel=1e-5)
            assert scalars[f"{tag}/negative_share"][stop] == pytest.approx((finite < 0).mean())
        ids, texts = trained.rows("sample_id"), {row["id"]: row["text"] for row in gym.lab.rows}
        for name, best in (("best", int(score.argmax())), ("worst", int(score.argmin()))):
            (table,) = [
                event.tensor_proto.string_val[0].decode()
                for event in events.Tensors(f"scores/{name}/text_summary")
                if event.step == stop
            ]
            first = table.splitlines()[2].replace("\\", "")
            sample_id = ids[sample[best]]
            assert first.startswith(f"| {score[best]:.4g} | {sample_id} |")
            assert " ".join(texts[sample_id].split())[:40] in first
            assert 3 <= len(table.splitlines()) <= 7
    if choosing:
        assert list(scalars["scores/kept_share"].values()) == pytest.approx([1 / 3] * STEPS)
    else:
        assert not any("kept" in tag for tag in scalars)


def test_texts_mark_nothing_up() -> None:
    table = _markdown(RankedSamples([(1.5, "a|b", "x", "yes", "<b>*bold*</b> [l](http://x) `c`")]))
    assert table.splitlines() == [
        f"| {' | '.join(COLUMNS)} |",
        "| --- | --- | --- | --- | --- |",
        r"| 1.5 | a\|b | x | yes | \<b\>\*bold\*\</b\> \[l\]\(http://x\) \`c\` |",
    ]
