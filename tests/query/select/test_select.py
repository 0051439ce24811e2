"""`ghoststore select` on real stores: each way of choosing against the scores of `ghoststore.query`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig, Store
from ghoststore.errors import MismatchError, UsageError
from tests.support.notes import Notes
from tests.support.parts import unbuild
from tests.support.score_runs import run_on
from tests.support.selecting import listed, score_of, select, source_rows, top

if TYPE_CHECKING:
    from tests.conftest import Lab

DOMAIN = ("sky", "earth")


@pytest.fixture(scope="module")
def val(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [row | {"id": f"v{i}", "task": "xyz"[i % 3]} for i, row in enumerate(lab.sample_rows(6, 5))]
    return lab.write(tmp_path_factory.mktemp("val") / "val.jsonl", rows)


@pytest.fixture(scope="module")
def built(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of exact numbers, which these tests read; copy it before asking what keeps a cache."""
    store = tmp_path_factory.mktemp("exact") / "store"
    assert lab.build(store, "--proj-dtype", "float32").code == 0
    return store


@pytest.fixture(scope="module")
def score(built: Path, val: Path) -> np.ndarray:
    """(27,): the score of each row."""
    return score_of(built, val)


@pytest.fixture(scope="module")
def tokens(built: Path) -> np.ndarray:
    """(27,): the tokens of each row."""
    return Store.open(built).part().read("n_tokens", 0, 27).astype(int)


@pytest.fixture(scope="module")
def plain(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of plain gradients, which are alike."""
    store = tmp_path_factory.mktemp("plain") / "store"
    assert lab.build(store, "--proj-precondition", "none").code == 0
    return store


@pytest.fixture(scope="module")
def own_built(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``corpus.jsonl`` and the store of it."""
    folder = tmp_path_factory.mktemp("own")
    assert lab.build(folder / "store", "--data", lab.write(folder / "corpus.jsonl", lab.rows)).code == 0
    return folder


@pytest.fixture
def own(lab: Lab, own_built: Path) -> Path:
    """That folder; its corpus, as the store knows it, may be changed."""
    lab.write(own_built / "corpus.jsonl", lab.rows)
    return own_built


def test_each_amount(built: Path, val: Path, tmp_path: Path, score: np.ndarray, tokens: np.ndarray) -> None:
    threshold = float(np.sort(score)[-4])
    assert source_rows(select(built, val, tmp_path / "a.jsonl", count=5)) == top(score, 5)
    assert source_rows(select(built, val, tmp_path / "b.jsonl", fraction=0.3)) == top(score, 8)
    assert source_rows(select(built, val, tmp_path / "c.jsonl", threshold=threshold)) == top(score, 4)
    best_first = np.argsort(-score)
    for budget in (int(tokens[best_first[:6]].sum()), int(tokens[best_first[:7]].sum()) - 1):
        made = select(built, val, tmp_path / f"{budget}.jsonl", token_budget=budget)
        assert source_rows(made) == top(score, 6)
        assert made.tokens == tokens[best_first[:6]].sum() <= budget


def test_the_report(built: Path, val: Path, tmp_path: Path, score: np.ndarray, tokens: np.ndarray, lab: Lab) -> None:
    made = select(built, val, tmp_path / "out.jsonl", count=6)
    assert json.loads(Path(made.report).read_text()) == made.to_json()
    assert (made.samples, made.available, made.considered) == (6, 27, 27)
    chosen = top(score, 6)
    for share in made.domains:
        mine = [row for row in chosen if DOMAIN[row % 2] == share.domain]
        assert (share.chosen, share.available) == (len(mine), 14 if share.domain == "sky" else 13)
        assert share.tokens == tokens[mine].sum()
        assert share.mean_score == pytest.approx(score[mine].mean())
    assert made.scores["chosen"]["lowest"] == score[chosen].min()
    assert made.scores["all"]["highest"] == made.scores["chosen"]["highest"] == score.max()
    assert made.lengths["all"]["median"] == np.sort(tokens)[13]
    ranks = np.argsort(np.argsort(-score)) + 1
    assert listed(made) == [
        {
            "id": lab.rows[row]["id"],
            "source_row": row,
            "domain": DOMAIN[row % 2],
            "tokens": tokens[row],
            "score": score[row],
            "rank": ranks[row],
            "picked": ranks[row],
        }
        for row in chosen
    ]
    settings = made.settings
    assert (settings["count"], settings["diversity"], settings["metric"], settings["ranking"]) == (
        6,
        "none",
        "dot",
        "mean",
    )
    assert settings["val_set"] == str(val)


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    "options",
    [
        {"metric": "dot"},
        {"group_field": "task", "combine": "max"},
        {"group_field": "task", "combine": "rank-fusion"},
        {"group_field": "task"},
        {"max_samples": 2},
        {"part": "part"},
    ],
    ids=str,
)
def test_scores_are_those_of_query(built: Path, val: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    wanted = score_of(built, val, **options)
    made = select(built, val, tmp_path / "out.jsonl", count=7, **options)
    assert source_rows(made) == top(wanted, 7)
    np.testing.assert_allclose([entry["score"] for entry in listed(made)], wanted[top(wanted, 7)], rtol=1e-9)


def test_with_scores_of_a_run(built: Path, val: Path, tmp_path: Path) -> None:
    """A row without a score in the run cannot be chosen."""
    store = Path(shutil.copytree(built, tmp_path / "store"))
    part = Store.open(store).part()
    run_on(store, "mine", *(part.read(name, 0, 27)[:20] for name in ("source_row", "source_digest")))
    for weight in ("unit", "learning-rate"):
        wanted = score_of(store, val, with_scores="mine", weight=weight)
        assert 5 < np.isfinite(wanted).sum() < 21
        out = tmp_path / f"{weight}.jsonl"
        made = select(store, val, out, count=5, with_scores="mine", score_weight=0.5, weight=weight)
        assert source_rows(made) == top(wanted, 5)
        assert made.available == np.isfinite(wanted).sum()
        assert made.settings["weight"] == weight


def test_layers(lab: Lab, val: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    ghoststore.build(
        checkpoint=lab.checkpoint,
        data=lab.corpus,
        store=store,
        projection=ProjectionConfig(rank_total=16),
        device="cpu",
    )
    wanted = score_of(store, val, layers=["mlp"])
    assert source_rows(select(store, val, tmp_path / "a.jsonl", count=6, layers=["mlp"])) == top(wanted, 6)
    made = select(store, val, tmp_path / "b.jsonl", count=6, layers=["mlp"], diversity="mmr", diversity_weight=0.0)
    assert source_rows(made) == top(wanted, 6)


def test_quotas(built: Path, val: Path, tmp_path: Path, score: np.ndarray) -> None:
    sky = np.where(np.arange(27) % 2 == 0, score, np.nan)
    earth = np.where(np.arange(27) % 2 == 1, score, np.nan)
    for name, quotas, counts in (
        ("share", {"sky": 0.3}, (3, 7)),
        ("count", {"sky": 2}, (2, 8)),
        ("both", {"earth": 0.2, "sky": 8}, (8, 2)),
        ("equal", "equal", (5, 5)),
        ("proportional", "proportional", (5, 5)),
    ):
        made = select(built, val, tmp_path / f"{name}.jsonl", count=10, quotas=quotas)
        assert source_rows(made) == sorted(top(sky, counts[0]) + top(earth, counts[1])), name
        assert made.short == []


def test_a_domain_with_too_little_is_taken_whole(built: Path, val: Path, tmp_path: Path, score: np.ndarray) -> None:
    notes = Notes()
    made = select(built, val, tmp_path / "out.jsonl", count=20, quotas={"earth": 0.8}, progress=notes)
    sky = np.where(np.arange(27) % 2 == 0, score, np.nan)
    assert source_rows(made) == sorted([*range(1, 27, 2), *top(sky, 4)])
    assert made.short == [{"domain": "earth", "asked": 16, "chosen": 13}]
    assert "earth: 16 samples were asked for, there are 13; all are chosen" in notes.said


def test_more_than_there_is(built: Path, val: Path, tmp_path: Path) -> None:
    notes = Notes()
    made = select(built, val, tmp_path / "out.jsonl", count=1000, progress=notes)
    assert source_rows(made) == list(range(27))
    assert made.short == [{"domain": "all", "asked": 1000, "chosen": 27}]
    assert len(notes.said) == 1


@pytest.mark.thin
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize(("diversity", "weight"), [("mmr", 0.9), ("greats", 10.0)])
def test_diversity(plain: Path, val: Path, tmp_path: Path, diversity: Any, weight: float, metric: Any) -> None:
    """Chosen among the candidates, and less alike than the top of the ranking: of plain gradients, which are alike."""
    made = select(
        plain,
        val,
        tmp_path / "out.jsonl",
        count=6,
        diversity=diversity,
        diversity_weight=weight,
        candidates=20,
        metric=metric,
    )
    score = score_of(plain, val, metric=metric)
    candidates, best, chosen = top(score, 20), top(score, 6), source_rows(made)
    assert made.considered == 20
    assert set(chosen) <= set(candidates)
    assert chosen != best
    vectors = Store.open(plain).part().read("vectors", 0, 27).astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    given = vectors if (diversity, metric) == ("greats", "dot") else unit
    pairs = given @ given.T

    def alike(rows: list[int]) -> float:
        return float(pairs[np.ix_(rows, rows)].sum() - pairs[rows, rows].sum())

    assert alike(chosen) < alike(best)
    assert sorted(entry["picked"] for entry in listed(made)) == list(range(1, 7))


def test_mmr_is_the_formula(built: Path, val: Path, tmp_path: Path, score: np.ndarray) -> None:
    """Through the store, in NumPy: (1 − w)·relevance − w·the largest cosine to what is chosen."""
    places = sorted(top(score, 12), key=lambda row: -score[row])
    vectors = Store.open(built).part().read("vectors", 0, 27)[places].astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    relevance = (score[places] - score[places[-1]]) / (score[places[0]] - score[places[-1]])
    chosen: list[int] = []
    while len(chosen) < 5:
        nearest = (unit @ unit[chosen].T).max(1) if chosen else np.zeros(12)
        value = 0.6 * relevance - 0.4 * nearest
        value[chosen] = -np.inf
        chosen.append(int(value.argmax()))
    made = select(built, val, tmp_path / "out.jsonl", count=5, diversity="mmr", diversity_weight=0.4, candidates=12)
    order = [entry["source_row"] for entry in sorted(listed(made), key=lambda entry: entry["picked"])]
    assert order == [places[place] for place in chosen]


@pytest.mark.thin(2)
@pytest.mark.parametrize("diversity", ["mmr", "greats"])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_diversity_is_in_the_metric_of_the_scores(
    built: Path, val: Path, tmp_path: Path, diversity: Any, metric: Any
) -> None:
    """Preconditioned scores go with preconditioned products of candidates."""
    built = shutil.copytree(built, tmp_path / "store")  # it keeps a cache
    settings: dict[str, Any] = {"metric": metric, "precondition": "second-moment", "damping": 0.05}
    score = score_of(built, val, **settings)
    vectors = Store.open(built).part().read("vectors", 0, 27).astype(np.float64)
    groups = Store.open(built).part().groups
    layer = np.repeat(np.arange(len(groups)), [stop - start for _, start, stop in groups])
    second = vectors.T @ vectors / 27 * (layer[:, None] == layer)
    inverse = np.linalg.inv(second + 0.05 * np.trace(second) / len(second) * np.eye(len(second)))
    pairs = vectors @ inverse @ vectors.T
    if metric == "cosine" or diversity == "mmr":
        pairs /= np.sqrt(np.outer(np.diag(pairs), np.diag(pairs)))
    places = sorted(top(score, 15), key=lambda row: -score[row])
    pairs, ours = pairs[np.ix_(places, places)], score[places]
    relevance = (ours - ours[-1]) / (ours[0] - ours[-1])
    eta = 2.0 * np.abs(ours[:6]).mean() / (6 * np.diag(pairs).mean())
    chosen: list[int] = []
    while len(chosen) < 6:
        if diversity == "mmr":
            value = 0.3 * relevance - (0.7 * pairs[:, chosen].max(1) if chosen else 0.0)
        else:
            value = ours - eta * pairs[:, chosen].sum(1)
        value[chosen] = -np.inf
        chosen.append(int(value.argmax()))
    made = select(
        built,
        val,
        tmp_path / "out.jsonl",
        count=6,
        diversity=diversity,
        candidates=15,
        diversity_weight=0.7 if diversity == "mmr" else 2.0,
        **settings,
    )
    order = [entry["source_row"] for entry in sorted(listed(made), key=lambda entry: entry["picked"])]
    assert order == [places[place] for place in chosen]


def test_facility_location_is_the_formula(built: Path, val: Path, tmp_path: Path, score: np.ndarray) -> None:
    """Through the store, in NumPy: what adds most to Σ relevance · the largest cosine to what is chosen."""
    places = sorted(top(score, 20), key=lambda row: -score[row])
    vectors = Store.open(built).part().read("vectors", 0, 27)[places].astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    relevance, pairs = score[places] - score[places[-1]], np.maximum(unit @ unit.T, 0)
    chosen: list[int] = []
    while len(chosen) < 6:
        free = [place for place in range(20) if place not in chosen]
        chosen.append(max(free, key=lambda place: relevance @ pairs[:, [*chosen, place]].max(1)))
    made = select(built, val, tmp_path / "out.jsonl", count=6, diversity="facility-location", candidates=20)
    order = [entry["source_row"] for entry in sorted(listed(made), key=lambda entry: entry["picked"])]
    assert order == [places[place] for place in chosen]


def test_diversity_with_quotas_and_tokens(built: Path, val: Path, tmp_path: Path) -> None:
    made = select(built, val, tmp_path / "a.jsonl", count=10, quotas={"sky": 3}, diversity="mmr")
    assert [share.chosen for share in made.domains] == [7, 3]
    made = select(built, val, tmp_path / "b.jsonl", token_budget=60, diversity="greats", quotas="equal")
    assert all(0 < share.tokens <= 30 for share in made.domains)


def test_candidates_have_a_limit(built: Path, val: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("query.select.strategy.MEMORY", 4 * 256 * 10)  # ten vectors of this store
    made = select(built, val, tmp_path / "out.jsonl", count=6, diversity="mmr")
    assert made.considered == 10
    with pytest.raises(UsageError, match="11 candidates do not fit in 0 GiB, 10 do"):
        select(built, val, tmp_path / "more.jsonl", count=6, diversity="mmr", candidates=11)
    with pytest.raises(UsageError, match=r"`diversity=facility-location`: 10 candidates do not fit .*, 9 do"):
        select(built, val, tmp_path / "more.jsonl", count=10, diversity="facility-location")


def test_windows_are_chosen_with_their_sample(lab: Lab, val: Path, tmp_path: Path) -> None:
    """A sample has the largest score of its windows; its tokens count once, and it is written once, whole."""
    rows = [
        {"id": f"s{i}", "text": " ".join(["the old moon sees a red river", f"{i}"] * (1 + i % 5))} for i in range(12)
    ]
    corpus = lab.write(tmp_path / "long.jsonl", rows)
    store = tmp_path / "store"
    outcome = lab.build(store, "--data", corpus, "--overlong", "window", "--max-length", "16")
    assert outcome.code == 0, outcome.err
    part = Store.open(store).part()
    assert part.rows > 20
    score = score_of(store, val)
    made = select(store, val, tmp_path / "out.jsonl", count=5)
    assert source_rows(made) == top(score, 5)
    lines = corpus.read_bytes().splitlines(keepends=True)
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(lines[row] for row in top(score, 5))
    from ghoststore.checkpoint.load import load_tokenizer

    tokenizer = load_tokenizer(lab.checkpoint)
    for entry in listed(made):
        assert entry["tokens"] == len(tokenizer(rows[entry["source_row"]]["text"])["input_ids"])


def test_what_cannot_be_used_is_never_chosen(lab: Lab, val: Path, tmp_path: Path) -> None:
    corpus = lab.write(
        tmp_path / "c.jsonl", [{"text": ""}, {"text": "the cat runs"}, {"text": None}, {"text": "a dog"}]
    )
    store = tmp_path / "store"
    assert lab.build(store, "--data", corpus).code == 0
    made = select(store, val, tmp_path / "out.jsonl", fraction=1.0)
    assert source_rows(made) == [1, 3]
    assert made.available == 2


def test_deterministic(built: Path, val: Path, tmp_path: Path) -> None:
    """Twice: the same bytes in the rows, the list and, paths aside, the report."""
    for options in ({"count": 7}, {"fraction": 0.3, "diversity": "facility-location"}, {"count": 5, "order": "score"}):
        one, two = (select(built, val, tmp_path / f"{len(options)}{name}.jsonl", **options) for name in "ab")
        for paths in ((one.out, two.out), (one.rows_file, two.rows_file)):
            assert Path(paths[0]).read_bytes() == Path(paths[1]).read_bytes()
        assert one.to_json() | {"out": 0, "report": 0, "rows_file": 0} == two.to_json() | {
            "out": 0,
            "report": 0,
            "rows_file": 0,
        }
        for made in (one, two):
            for path in (made.out, made.report, made.rows_file):
                Path(path).unlink()


def test_leaks(lab: Lab, tmp_path: Path) -> None:
    """A copy of a val sample, in other letters and spaces, is left out, kept, or refused; always reported."""
    text = "the old moon sees a red river under the new tree and the bird runs"
    rows = [*lab.rows, {"id": "copy", "text": f"Yes: {text.upper().replace(' ', '  ')}!", "domain": "sky"}]
    corpus, store = lab.write(tmp_path / "corpus.jsonl", rows), tmp_path / "store"
    val = lab.write(tmp_path / "val.jsonl", [{"id": "v0", "text": text}])
    assert lab.build(store, "--data", corpus).code == 0
    notes = Notes()
    made = select(store, val, tmp_path / "a.jsonl", count=27, progress=notes)
    assert source_rows(made) == list(range(27))
    assert made.leaks["rows"] == [{"id": "copy", "source_row": 27, "val_id": "v0", "val_row": 0, "overlap": 1.0}]
    assert any("1 near-duplicate(s) of the val set" in said for said in notes.said)
    assert 27 in source_rows(select(store, val, tmp_path / "b.jsonl", count=28, leaks="keep"))
    with pytest.raises(UsageError, match=r"no sample that can be chosen \(usable, and no near-duplicate"):
        select(store, corpus, tmp_path / "c.jsonl", count=3)
    with pytest.raises(UsageError, match=r"the first is 'copy' \(row 27\), which holds 100% of val sample 'v0'"):
        select(store, val, tmp_path / "c.jsonl", count=3, leaks="error")
    assert not list(tmp_path.glob("c.jsonl*"))


@pytest.mark.thin(1)
@pytest.mark.parametrize("change", ["text", "fewer", "order"])
def test_a_changed_corpus_is_refused(lab: Lab, own: Path, val: Path, tmp_path: Path, change: str) -> None:
    """Exit code 3, both fingerprints, nothing written."""
    rows = [dict(row) for row in lab.rows]
    if change == "text":
        rows[13]["text"] += " again"
    elif change == "fewer":
        rows.pop()
    else:
        rows.reverse()
    lab.write(own / "corpus.jsonl", rows)
    before = lab.tree(own)
    outcome = lab.run(
        "select", "--store", own / "store", "--val-set", val, "--count", "3", "--out", tmp_path / "o.jsonl"
    )
    assert outcome.code == 3, outcome.err
    assert outcome.err.count("sha256:") == 2
    assert "Nothing was written" in outcome.err
    assert lab.tree(own) == before
    assert not list(tmp_path.iterdir())


def test_a_corpus_that_grew_at_its_end_is_as_good_as_before(lab: Lab, own: Path, val: Path, tmp_path: Path) -> None:
    """The rows of the part are its first ones, which have not changed; no row beyond them is chosen."""
    words = ("select", "--store", own / "store", "--val-set", val, "--count", "27", "--out")
    assert lab.run(*words, tmp_path / "before.jsonl").code == 0
    lab.write(own / "corpus.jsonl", [*lab.rows, {"id": "new", "text": "a new one", "domain": "sky"}])
    outcome = lab.run(*words, tmp_path / "after.jsonl")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "after.jsonl").read_bytes() == (tmp_path / "before.jsonl").read_bytes()


def test_a_row_that_changes_meanwhile_is_refused(
    own: Path, val: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the corpus was read, and before its rows are written."""
    import query.select.files

    corpus = own / "corpus.jsonl"
    real = query.select.files.write_export

    def write_export(*given: Any) -> None:
        corpus.write_text(corpus.read_text().replace("the", "eht"))
        real(*given)

    monkeypatch.setattr("query.select.files.write_export", write_export)
    with pytest.raises(MismatchError, match="is not the one that the part was built from: expected the digest"):
        select(own / "store", val, tmp_path / "out.jsonl", count=27)
    assert not list(tmp_path.glob("*out.jsonl*"))


def test_the_first_rows_of_a_corpus(lab: Lab, val: Path, tmp_path: Path) -> None:
    """A part of the first rows: what follows them may change."""
    corpus, store = lab.write(tmp_path / "corpus.jsonl", lab.rows), tmp_path / "store"
    assert lab.build(store, "--data", corpus, "--max-samples", "10").code == 0
    lab.write(corpus, [*lab.rows[:10], {"text": "another"}])
    assert source_rows(select(store, val, tmp_path / "out.jsonl", fraction=1.0)) == list(range(10))


def test_an_incomplete_part(built: Path, val: Path, tmp_path: Path, score: np.ndarray) -> None:
    """Rows of spans that are not committed do not exist."""
    store = Path(shutil.copytree(built, tmp_path / "store"))
    unbuild(ghoststore.Store.open(store).part(), 1)
    there = np.where(np.arange(27) // 6 == 1, np.nan, score)
    made = select(store, val, tmp_path / "out.jsonl", count=8)
    assert made.available == 21
    assert source_rows(made) == top(there, 8)


@pytest.mark.thin(1)
@pytest.mark.parametrize("form", ["folder", "csv", "parquet", "dataset"])
def test_other_forms(lab: Lab, val: Path, tmp_path: Path, form: str) -> None:
    """From the store to the rows, with a field of the user's own; see also tests/corpus/test_export.py."""
    rows = [row | {"note": f"n{number}"} for number, row in enumerate(lab.rows)]
    corpus, out, table = tmp_path / f"in.{form}", tmp_path / f"out.{form}", datasets.Dataset.from_list(rows)
    if form == "folder":
        corpus.mkdir()
        out = tmp_path / "out.jsonl"
        for name, some in (("a", rows[:10]), ("b", rows[10:])):
            lab.write(corpus / f"{name}.jsonl", some)
    elif form == "dataset":
        out = tmp_path / "out"
        table.save_to_disk(str(corpus))
    else:
        getattr(table, f"to_{form}")(str(corpus))
    assert lab.build(tmp_path / "store", "--data", corpus).code == 0
    made = select(tmp_path / "store", val, out, count=9)
    found = datasets.load_from_disk(str(out)) if form == "dataset" else None
    if found is None:
        read = {".jsonl": datasets.Dataset.from_json, ".csv": datasets.Dataset.from_csv}
        found = read.get(out.suffix, datasets.Dataset.from_parquet)(str(out), cache_dir=str(tmp_path / "cache"))
    assert found.to_list() == [rows[row] for row in source_rows(made)]
