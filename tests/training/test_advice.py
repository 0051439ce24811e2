"""What a refusal of choosing and scoring options advises is not refused in its turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import ghoststore
from ghoststore import Choosing, GhostConfig, GhostStoreCallback
from ghoststore.cli import cli
from ghoststore.errors import UsageError
from ghoststore.settings.train import TrainOptions
from indexer.session.ranks import Ranks
from indexer.training.usage import refuse_usage

Options = dict[str, Any]
LEFT_OUT = object()
"""An option that is taken away."""
FOUR_OF_EIGHT: Options = {"candidates": 8, "keep": 4, "batch_size": 8}
EXACT: Options = {**FOUR_OF_EIGHT, "batch_size": 3, "contrast": True}

ADVICE: dict[str, tuple[Options, int, str, list[Options]]] = {
    # Options, ranks, words of the advice, and what it says to change: each is followed by itself.
    "no-candidates": ({"keep": 4}, 1, "give `candidates`, too", [{"candidates": 8}]),
    "no-candidates-nor-keep": ({"policy": "random"}, 1, "`candidates` and `keep`", [{"candidates": 8, "keep": 4}]),
    "no-keep": ({"candidates": 8}, 1, "give `keep`", [{"keep": 4}]),
    "keep": ({**FOUR_OF_EIGHT, "keep": 9}, 1, "keep fewer", [{"keep": 8}]),
    "no-threshold": ({"candidates": 8, "policy": "threshold"}, 1, "give it as `threshold`", [{"threshold": 0.0}]),
    "threshold": (
        {"candidates": 8, "threshold": 0.0},
        1,
        "belongs to `policy=threshold`: give that, too",
        [{"policy": "threshold"}],
    ),
    "threshold-of-top-k": ({**FOUR_OF_EIGHT, "threshold": 0.0}, 1, "or leave it out", [{"threshold": LEFT_OUT}]),
    "temperature": (
        {**FOUR_OF_EIGHT, "temperature": 1.0},
        1,
        "`policy=reweight`: give that, too, or leave it out",
        [{"policy": "reweight"}, {"temperature": LEFT_OUT}],
    ),
    "contrast-of-random": (
        {**FOUR_OF_EIGHT, "contrast": True, "policy": "random"},
        1,
        "leave `contrast` out",
        [{"contrast": LEFT_OUT}],
    ),
    "contrast-in-adam": (
        {**FOUR_OF_EIGHT, "contrast": True, "score_metric": "adam"},
        1,
        "leave one of them out",
        [{"contrast": LEFT_OUT}, {"score_metric": LEFT_OUT}],
    ),
    "contrast-in-parts": (
        {**EXACT, "score": "exact"},
        1,
        "give `batch_size=8`, not 3, or `score=sketched`",
        [{"batch_size": 8}, {"score": "sketched"}],
    ),
    "contrast-by-route": (
        {**EXACT, "route": "direct"},
        1,
        "give `batch_size=8`, not 3, or `score=sketched` without `route`",
        [{"batch_size": 8}, {"score": "sketched", "route": LEFT_OUT}],
    ),
    "contrast-by-layer": (
        {**EXACT, "per_layer": True, "exclude_layers": ("*.c_fc",)},
        1,
        "or `score=sketched` without `exclude_layers` and `per_layer`",
        [{"batch_size": 8}, {"score": "sketched", "exclude_layers": LEFT_OUT, "per_layer": LEFT_OUT}],
    ),
    "contrast-in-ranks": (
        {**EXACT, "keep": 3, "score_layers": "all"},
        2,
        "give `batch_size=4`, not 3 and `choose_over=rank` and `keep=2`, or `score=sketched` without `score_layers`",
        [{"batch_size": 4, "choose_over": "rank", "keep": 2}, {"score": "sketched", "score_layers": LEFT_OUT}],
    ),
    "greats": (
        {**FOUR_OF_EIGHT, "batch_size": 3, "policy": "greats", "score": "sketched", "score_metric": "adam"},
        1,
        "leave out `score=sketched` and leave out `score_metric=adam` and give `batch_size=8`, not 3",
        [{"score": LEFT_OUT, "score_metric": LEFT_OUT, "batch_size": 8}],
    ),
    "not-dealt-out": ({**FOUR_OF_EIGHT, "candidates": 7}, 2, "give a multiple of 2", [{"candidates": 8}]),
    "keep-not-dealt-out": (
        {**FOUR_OF_EIGHT, "keep": 1, "choose_over": "rank"},
        2,
        "give a multiple of 2",
        [{"keep": 2}],
    ),
    "accumulation": (
        {**FOUR_OF_EIGHT, "gradient_accumulation_steps": 2},
        1,
        "leave it out",
        [{"gradient_accumulation_steps": LEFT_OUT}],
    ),
    "regular": (
        {**FOUR_OF_EIGHT, "method": "Regular"},
        1,
        "leave out one of them",
        [{"method": LEFT_OUT}, {"candidates": LEFT_OUT, "keep": LEFT_OUT}],
    ),
    "sketched-by-route": (
        {"score": "sketched", "route": "gram"},
        1,
        "`route` belongs to `score=exact`: leave out one or the other",
        [{"score": LEFT_OUT}, {"route": LEFT_OUT}],
    ),
    "sketched-layers": (
        {"score": "sketched", "exclude_layers": ("*.c_fc",), "score_layers": "all"},
        1,
        "leave out one or the other; which layers are sketched `projection.layers` says",
        [
            {"score": LEFT_OUT},
            {
                "exclude_layers": LEFT_OUT,
                "score_layers": LEFT_OUT,
                "projection": ghoststore.ProjectionConfig(layers=("mlp",)),
            },
        ],
    ),
    "adam-by-gram": ({"score_metric": "adam", "route": "gram"}, 1, "leave `route=gram` out", [{"route": LEFT_OUT}]),
    "projection": (
        {"projection": ghoststore.ProjectionConfig()},
        1,
        "`score=sketched` and `keep_gradients`: give one of them, or leave the projection options out",
        [{"score": "sketched"}, {"keep_gradients": 2}, {"projection": LEFT_OUT}],
    ),
    "projection-of-exact-candidates": (
        {**FOUR_OF_EIGHT, "route": "direct", "projection": ghoststore.ProjectionConfig()},
        1,
        "`score=sketched` without `route` and `keep_gradients`",
        [{"score": "sketched", "route": LEFT_OUT}, {"keep_gradients": 2}, {"projection": LEFT_OUT}],
    ),
    "projection-of-greats": (
        {**FOUR_OF_EIGHT, "policy": "greats", "projection": ghoststore.ProjectionConfig()},
        1,
        "`score=sketched` without `policy=greats` and `keep_gradients`",
        [{"score": "sketched", "policy": LEFT_OUT}, {"keep_gradients": 2}, {"projection": LEFT_OUT}],
    ),
}


def check(options: Options, ranks: int, folder: Path) -> None:
    """As ``ghoststore train`` checks its options on each of so many ranks."""
    paths: Options = {"data": "d", "val_set": "v", "store": folder / "store", "output_dir": folder, "checkpoint": "c"}
    given = TrainOptions(**paths, **options)
    refuse_usage(given, given.configuration(), Ranks(0, ranks))


@pytest.mark.parametrize("name", ADVICE)
def test_advice_of_the_command_can_be_followed(name: str, tmp_path: Path) -> None:
    options, ranks, words, followed = ADVICE[name]
    with pytest.raises(UsageError) as caught:
        check(options, ranks, tmp_path)
    assert words in str(caught.value)
    for change in followed:
        changed = {**options, **change}
        check({key: value for key, value in changed.items() if value is not LEFT_OUT}, ranks, tmp_path)


LOOPS: dict[str, tuple[Options, str, list[Options]]] = {
    "no-keep": ({"policy": "top-k"}, "give `keep`", [{"keep": 2}]),
    "no-threshold": ({"policy": "threshold"}, "give it as `threshold`", [{"threshold": 0.0}]),
    "threshold": (
        {"keep": 2, "threshold": 0.0},
        "belongs to `policy=threshold`: give that, too, or leave it out",
        [{"policy": "threshold"}, {"threshold": LEFT_OUT}],
    ),
    "contrast": (
        {"keep": 2, "policy": "random", "contrast": True},
        "leave `contrast` out",
        [{"contrast": LEFT_OUT}],
    ),
    "contrast-in-adam": (
        {"keep": 2, "contrast": True, "score_metric": "adam"},
        "leave one of them out",
        [{"contrast": LEFT_OUT}, {"score_metric": LEFT_OUT}],
    ),
}


def loops_of(options: Options, folder: Path) -> None:
    """A manager's configuration and a callback, which choose so."""
    of_loop = {key: value for key, value in options.items() if key == "score_metric"}
    choosing = Choosing(**{key: value for key, value in options.items() if key not in of_loop})
    for make in (
        lambda: GhostConfig(choosing=choosing, **of_loop),
        lambda: GhostStoreCallback(store=folder, val_data=[{}], samples=4, choosing=choosing, **of_loop),
    ):
        make()


@pytest.mark.parametrize("name", LOOPS)
def test_advice_in_loops_can_be_followed(name: str, tmp_path: Path) -> None:
    options, words, followed = LOOPS[name]
    with pytest.raises(UsageError) as caught:
        loops_of(options, tmp_path)
    assert words in str(caught.value)
    for change in followed:
        loops_of({key: value for key, value in {**options, **change}.items() if value is not LEFT_OUT}, tmp_path)


def test_the_callback_refuses_what_the_manager_refuses(tmp_path: Path) -> None:
    choosing = Choosing(keep=2, contrast=True)
    with pytest.raises(UsageError, match="`contrast` takes plain products"):
        GhostStoreCallback(store=tmp_path, val_data=[{}], samples=4, choosing=choosing, score_metric="adam")


@pytest.mark.slow
def test_advice_is_in_flags(tmp_path: Path) -> None:
    """Projection options do not ask for sketched scores where a route asks for exact ones."""
    (tmp_path / "d.jsonl").write_text('{"text": "one row"}\n')
    words = ["train", "--data", str(tmp_path / "d.jsonl"), "--val-set", str(tmp_path / "d.jsonl")]
    words += ["--store", str(tmp_path / "s"), "--output-dir", str(tmp_path / "o")]
    words += ["--architecture", "GPT2-Tiny", "--candidates", "8", "--keep", "4", "--route", "direct"]
    outcome = CliRunner().invoke(cli, [*words, "--proj-kind", "rademacher"])
    assert outcome.exit_code == 2
    assert "--score sketched without --route and --keep-gradients: give one of them" in outcome.output
