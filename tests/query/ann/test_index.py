"""The approximate index against exact search, with real FAISS: every kind, every dtype, and what it must refuse."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import ghoststore
from ghoststore.errors import MismatchError, UsageError
from ghoststore.store import Part
from query.ann.command import choose_dimension, choose_factory
from query.ann.engine import check_device, load_faiss
from query.ann.index import AnnIndex
from query.search.part_score import Metric, Term
from query.search.search import search
from query.search.top_k import Ranking
from tests.support.made_parts import DIMENSION, ROWS, UNUSABLE, clustered, make_part

if TYPE_CHECKING:
    from tests.conftest import Lab

KINDS = [
    "Flat",
    "SQ8",
    "SQfp16",
    "RaBitQ",
    "RaBitQfs",
    "RR96,RaBitQ",
    "PCAR32,SQ8",
    "IVF8,Flat",
    "IVF8,SQ8",
    "IVF8,RaBitQ",
    "IVF8,RaBitQfs",
    "HNSW16,Flat",
    "HNSW16,SQ8",
    "PQ8x4fs",
    "IVF4,PQ8x4fs,Refine(SQ8)",
]


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return make_part(tmp_path_factory.mktemp("index") / "store", clustered())


def build(part: Part, **options: Any) -> ghoststore.IndexReport:
    return ghoststore.index(store=part.path.parent.parent, part=part.name, **{"rebuild": True, **options})


def questions(metric: Metric, part: Part, weight: float = 1.0, count: int = 6) -> Term:
    """Queries near clusters, of lengths that differ."""
    queries = torch.from_numpy(clustered(count, part.layout.dimension, seed=0)).double() + 0.1
    return Term.of(part, queries, metric=metric, weight=weight)


def equal(found: Ranking, exact: Ranking) -> None:
    np.testing.assert_array_equal(found.rows, exact.rows)
    np.testing.assert_array_equal(found.scores, exact.scores)


def exhaustive(index: AnnIndex) -> AnnIndex:
    """Every row a candidate, of every list."""
    searcher = index._searcher
    searcher.candidates = ROWS
    searcher.engine.set_effort(searcher.engine.efforts()[-1])
    return index


@pytest.mark.thin(1)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("factory", KINDS)
def test_every_kind_equals_exact_search_where_all_rows_are_candidates(part: Part, factory: str, metric: Metric) -> None:
    """Rows, order and scores, bit for bit: the candidates are scored as exact search scores them."""
    report = build(part, factory=factory, metric=metric, target_recall=1.0)
    assert (report.manifest.factory, report.manifest.rows) == (factory, ROWS - len(UNUSABLE))
    index = exhaustive(AnnIndex.open(part, report.name))
    term = questions(metric, part)
    for found, exact in zip(
        index.search(term, top_k=ROWS, bottom_k=20), search([term], top_k=ROWS, bottom_k=20), strict=True
    ):
        if "HNSW" not in factory:  # a graph may not lead to every row
            equal(found, exact)
        else:
            assert np.mean([len(set(a) & set(b)) for a, b in zip(found.rows, exact.rows[:, :10], strict=True)]) > 9
        assert not set(found.rows.ravel()) & set(UNUSABLE)
        assert len(set(found.rows[0]) - {-1}) == (found.rows[0] >= 0).sum()


@pytest.mark.thin(1)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype(tmp_path: Path, dtype: str, metric: Metric) -> None:
    part = make_part(tmp_path / "store", clustered(), dtype=dtype)
    report = build(part, metric=metric)
    assert report.manifest.recall_at_10 >= 0.97
    term = questions(metric, part)
    equal(AnnIndex.open(part).search(term, top_k=7)[0], search([term], top_k=7)[0])


@pytest.mark.thin(2)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("weight", [1.0, 0.25, -2.0])
def test_weights_and_layers(part: Part, metric: Metric, weight: float) -> None:
    build(part, metric=metric, name=metric)
    index = exhaustive(AnnIndex.open(part, metric))
    term = questions(metric, part, weight)
    for found, exact in zip(index.search(term, top_k=9, bottom_k=4), search([term], top_k=9, bottom_k=4), strict=True):
        equal(found, exact)
    some = Term.of(part, term.queries_QD, metric=metric, groups=[1])
    if metric == "dot":
        equal(index.search(some, top_k=9)[0], search([some], top_k=9)[0])
    else:
        with pytest.raises(UsageError, match=r"not some layers.*`index=exact`"):
            index.search(some, top_k=9)


@pytest.mark.parametrize("dimension", [48, "none"])
def test_a_sketch_in_front(part: Part, dimension: int | str) -> None:
    report = build(part, dimension=dimension, name=f"sketch-{dimension}")
    assert report.manifest.front_dimension == (48 if dimension == 48 else DIMENSION)
    term = questions("cosine", part)
    equal(AnnIndex.open(part, report.name).search(term, top_k=5)[0], search([term], top_k=5)[0])


def test_gaps_between_spans(tmp_path: Path) -> None:
    """Rows keep their numbers in the part."""
    part = make_part(tmp_path / "store", clustered(), spans=[1, 4, 7])
    build(part)
    term = questions("cosine", part)
    found, _ = AnnIndex.open(part).search(term, top_k=200)
    equal(found, search([term], top_k=200)[0])
    assert set(found.rows.ravel() // 50) == {1, 4, 7, -1}


def test_equal_rows_come_by_number(tmp_path: Path) -> None:
    vectors = clustered()
    vectors[[300, 50, 222]] = vectors[11]
    part = make_part(tmp_path / "store", vectors)
    build(part)
    term = Term.of(part, torch.from_numpy(vectors[11:12]), metric="cosine")
    assert AnnIndex.open(part).search(term, top_k=4)[0].rows.tolist() == [[11, 50, 222, 300]]


def test_rows_of_zeros(tmp_path: Path) -> None:
    """A usable row whose gradient is zero has the cosine 0, and is no sample query."""
    vectors = clustered()
    vectors[100:300] = 0
    part = make_part(tmp_path / "store", vectors)
    build(part)
    term = questions("cosine", part)
    equal(AnnIndex.open(part).search(term, top_k=ROWS)[0], search([term], top_k=ROWS)[0])


@pytest.mark.parametrize("rows", [1, 2, 9, 51])
def test_few_rows(tmp_path: Path, rows: int) -> None:
    """k larger than the store: what there is, then -1."""
    part = make_part(tmp_path / "store", clustered(rows), unusable=())
    assert build(part).manifest.rows == rows
    term = questions("cosine", part)
    found, _ = AnnIndex.open(part).search(term, top_k=60)
    equal(found, search([term], top_k=60)[0])
    assert (found.rows[:, rows:] == -1).all()


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["RaBitQ", "IVF8,SQ8", "HNSW16,SQ8"])
def test_the_same_part_gives_the_same_bytes(tmp_path: Path, factory: str) -> None:
    manifests = [build(make_part(tmp_path / name, clustered()), factory=factory).manifest for name in ("one", "other")]
    same = ("files", "effort", "candidates", "recall", "coverage", "front_key", "scale")
    for field in same:
        assert getattr(manifests[0], field) == getattr(manifests[1], field)


def test_the_recall_of_the_manifest_is_that_of_the_search(part: Part) -> None:
    """Measured again here the slow way, for single rows: a row's own place in its ranking is taken out."""
    report = build(part, factory="IVF8,RaBitQ", name="measured", target_recall=0.5)
    index = AnnIndex.open(part, "measured")
    stored = torch.from_numpy(part.encoding.decode(part.read("vectors", 0, ROWS))).double()
    rows = [row for row in range(ROWS) if row not in UNUSABLE]
    term = Term.of(part, stored[rows], metric="cosine")
    found, exact = (ranking.rows[:, 1:11] for ranking in (index.search(term, top_k=11)[0], search([term], top_k=11)[0]))
    recall = np.mean([len(set(one) & set(other)) / 10 for one, other in zip(found, exact, strict=True)])
    assert report.manifest.recall["row"].at_10 == pytest.approx(recall, abs=0.1)
    assert report.manifest.recall["row"].queries == 64
    assert report.manifest.recall["mean"].queries > 10


@pytest.mark.slow
def test_a_target_that_is_not_reached_is_said(tmp_path: Path, lab: Lab) -> None:
    """Noise in few dimensions: nothing is near anything."""
    store = tmp_path / "store"
    rng = np.random.default_rng(0)
    make_part(store, rng.standard_normal((6000, 64)).astype(np.float32), unusable=())
    options = ("--factory", "RaBitQ", "--dimension", "8", "--target-recall", "1")
    outcome = lab.run("index", "--store", store, *options, "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    assert outcome.json["reached"] is False
    assert outcome.json["recall"]["row"]["at_10"] < 1
    assert "of the exact ten best; 1.0 were asked for" in " ".join(outcome.err.split())


def test_the_command(lab: Lab, built: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(built, tmp_path / "store"))
    outcome = lab.run("index", "--store", store, "--name", "mine", "--json", "--quiet")
    assert (outcome.code, outcome.json["built"], outcome.json["name"]) == (0, True, "mine"), outcome.err
    again = lab.run("index", "--store", store, "--name", "mine", "--quiet")
    assert (again.code, "there and current" in again.err) == (0, True)
    listed = lab.run("index", "--store", store, "--list", "--json").json
    assert {"name": "mine", "state": "current"}.items() <= next(
        one for one in listed["indexes"] if one["name"] == "mine"
    ).items()
    assert "mine" in lab.run("index", "--store", store, "--list").out
    assert "index mine" in lab.run("info", "--store", store, "--part", "part").out
    assert lab.run("verify", "--store", store).code == 0
    mixed = lab.run("index", "--store", store, "--list", "--factory", "SQ8")
    assert (mixed.code, "leave out --factory" in mixed.err) == (2, True)
    assert lab.run("index", "--store", store, "--remove", "mine").code == 0
    gone = lab.run("index", "--store", store, "--remove", "mine")
    assert (gone.code, "has no index 'mine'" in gone.err) == (2, True)
    assert not (store / "parts/part/index/mine").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"factory": "Nonsense"}, "`factory` 'Nonsense' is not one that FAISS makes: could not parse"),
        ({"factory": ""}, "is not one that FAISS makes"),
        ({"factory": "IDMap,Flat"}, "cannot be used for rows numbered from 0"),
        ({"factory": "IVF0,Flat"}, "has no inverted list"),
        ({"factory": "IVF4096,Flat"}, "cannot be used with 396 rows to train on"),
        ({"dimension": 97}, "`dimension=97`: give 1 to 96"),
        ({"dimension": 0}, "`dimension=0`"),
        ({"dimension": "all"}, "`dimension=all`"),
        ({"metric": "l2"}, "`metric` 'l2' is unknown; known: cosine, dot"),
        ({"target_recall": 0}, "`target_recall` must be above 0"),
        ({"name": "../x"}, "cannot name a index"),
        ({"device": "tpu"}, "an index knows cpu, cuda and cuda:N"),
    ],
)
def test_bad_options(part: Part, options: dict[str, Any], words: str) -> None:
    before = ghoststore.info(part.path.parent.parent).parts[0].indexes
    with pytest.raises(UsageError) as caught:
        build(part, **options)
    assert words in str(caught.value)
    assert ghoststore.info(part.path.parent.parent).parts[0].indexes == before


def test_a_part_without_usable_rows(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no usable row"):
        build(make_part(tmp_path / "all", clustered(60), unusable=range(60)))
    with pytest.raises(UsageError, match="no usable row"):
        build(make_part(tmp_path / "none", clustered(60), spans=[]))
    with pytest.raises(UsageError, match="every usable row of part 'part' is zero"):
        build(make_part(tmp_path / "zero", clustered(60) * 0))


@pytest.mark.slow
def test_other_settings_under_the_same_name_need_rebuild(tmp_path: Path) -> None:
    part = make_part(tmp_path / "store", clustered())
    build(part, name="mine", factory="Flat")
    with pytest.raises(UsageError, match=r"has factory 'Flat', not 'SQ8': give `rebuild`"):
        build(part, name="mine", factory="SQ8", rebuild=False)
    assert build(part, name="mine", factory="SQ8").built
    assert not build(part, name="mine", factory="SQ8", rebuild=False).built


def test_which_index(tmp_path: Path) -> None:
    part = make_part(tmp_path / "store", clustered())
    with pytest.raises(UsageError, match=r"no index for `metric=dot`; `ghoststore index --part part --metric dot`"):
        AnnIndex.open(part, metric="dot")
    with pytest.raises(UsageError, match=r"no index 'x'; it has: none"):
        AnnIndex.open(part, "x")
    build(part, name="c")
    build(part, name="d", metric="dot")
    assert AnnIndex.open(part, metric="dot").name == "d"
    with pytest.raises(UsageError, match=r"more than one index; choose with `index_name`: c, d"):
        AnnIndex.open(part)
    with pytest.raises(MismatchError, match="is for `metric=cosine`, not dot"):
        AnnIndex.open(part, "c", metric="dot")
    with pytest.raises(UsageError, match="is for `metric=cosine`, not dot"):
        AnnIndex.open(part, "c").search(questions("dot", part), top_k=1)


@pytest.mark.slow
def test_what_an_index_cannot_rank(tmp_path: Path) -> None:
    part = make_part(tmp_path / "store", clustered())
    other = make_part(tmp_path / "store", clustered(seed=1), name="other")
    build(part)
    index, term = AnnIndex.open(part), questions("cosine", part)
    with pytest.raises(UsageError, match="summed over 2"):
        index.refuse([term, term])
    with pytest.raises(UsageError, match="is of part 'part', not 'other'"):
        index.refuse([questions("cosine", other)])

    class Identity:
        def apply(self, vectors_QD: torch.Tensor) -> torch.Tensor:
            return vectors_QD

        def squares(self, span: int) -> np.ndarray:
            raise AssertionError

        def halved(self, rows_RD: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    with pytest.raises(UsageError, match="preconditioned"):
        index.refuse([Term.of(part, term.queries_QD, metric="cosine", preconditioner=Identity())])


ANONYMOUS = """
import sys
from pathlib import Path
from ghoststore import Store
from query.ann.index import AnnIndex

def anonymous():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10

part = Store.open({store!r}).part()
first = AnnIndex.open(part, "large")  # libraries are loaded, buffers and the interpreter's own tables are there
before = anonymous()
index = AnnIndex.open(part, "large")
print(anonymous() - before, index.manifest.size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells what memory is mapped")
@pytest.mark.parametrize("factory", ["IVF16,Flat", "Flat"])
def test_an_index_is_mapped_not_read(tmp_path: Path, lab: Lab, factory: str) -> None:
    part = make_part(tmp_path / "store", clustered(8000, 512), unusable=())
    build(part, factory=factory, name="large")
    outcome = lab.run(code=ANONYMOUS.format(store=str(tmp_path / "store")))
    assert outcome.code == 0, outcome.err
    taken, size = map(int, outcome.out.split())
    assert size > 16e6
    assert taken < size / 4


def test_defaults() -> None:
    assert choose_dimension("auto", 12_288) == 1024
    assert choose_dimension("auto", 2048) == choose_dimension("none", 2048) == 2048
    assert choose_factory(6_000, 1024, "cpu") == "RaBitQ"
    assert choose_factory(6_000, 64, "cpu") == "SQ8"
    assert choose_factory(1_000_000, 1024, "cpu") == "IVF4096,RaBitQ"
    assert choose_factory(1_000_000, 1024, "cuda") == "IVF4096,SQ8"


def test_without_faiss(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def none(name: str, *rest: Any, **named: Any) -> Any:
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return real(name, *rest, **named)

    monkeypatch.delitem(sys.modules, "faiss")
    monkeypatch.setattr(builtins, "__import__", none)
    with pytest.raises(UsageError, match=r"pip install 'ghoststore\[cpu\]'"):
        build(part)


def test_faiss_is_imported_for_an_index_alone(lab: Lab, built: Path) -> None:
    code = (
        "import sys; [sys.modules.pop(name) for name in list(sys.modules) if name.partition('.')[0] == 'faiss']; "
        "import ghoststore; "  # this process has it from its parent
        f"ghoststore.query(store={str(built)!r}, val_set={str(lab.corpus)!r}, max_samples=1, device='cpu'); "
        "ghoststore.index; sys.exit('faiss' in sys.modules)"
    )
    assert lab.run(code=code).code == 0


@pytest.mark.skipif(hasattr(load_faiss(), "StandardGpuResources"), reason="the faiss that is installed has GPU indexes")
def test_cuda_without_a_faiss_for_it(part: Part, lab: Lab) -> None:
    with pytest.raises(UsageError, match=r"faiss-gpu .*CUDA 12.* or faiss-gpu-cuvs .*CUDA 13.* in place of faiss-cpu"):
        check_device("cuda")
    outcome = lab.run("index", "--store", part.path.parent.parent, "--device", "cuda:0")
    assert (outcome.code, "faiss-gpu" in outcome.err) == (2, True)


@pytest.mark.gpu
@pytest.mark.skipif(
    not hasattr(load_faiss(), "StandardGpuResources") or load_faiss().get_num_gpus() == 0,
    reason="needs a CUDA device and a faiss for it (faiss-gpu, faiss-gpu-cuvs)",
)
@pytest.mark.parametrize("factory", ["Flat", "IVF8,SQ8"])
def test_on_a_gpu(part: Part, factory: str) -> None:
    report = build(part, device="cuda", factory=factory, name="gpu", target_recall=1.0)
    term = questions("cosine", part)
    for device in ("cuda", "cpu"):
        index = AnnIndex.open(part, report.name, device=device)
        equal(index.search(term, top_k=5)[0], search([term], top_k=5)[0])


def test_manifests_are_plain_json(part: Part) -> None:
    report = build(part, name="plain")
    text = (part.path / "index" / "plain" / "index.json").read_text()
    assert json.loads(text)["factory"] == report.manifest.factory
    json.dumps(report.to_json())
    told = AnnIndex.open(part, "plain").settings()
    assert (told["index"], told["index_name"], told["factory"]) == ("ann", "plain", report.manifest.factory)
    assert json.loads(json.dumps(told["recall"]))["mean"]["at_10"] == report.manifest.recall["mean"].at_10
