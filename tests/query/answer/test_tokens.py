"""`ghoststore query --tokens`: what each token adds, against float64 by hand; sums, places, lines, pages, refusals."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.cli.tokens import marked
from ghoststore.errors import CaptureError, UsageError
from ghoststore.store import Store
from indexer.encode.encoder import RowEncoder
from indexer.encode.positions import position_scores
from indexer.encode.tokens import Row
from indexer.projection.matrices import Projection
from query.answer.report import colored
from query.answer.tokens import Token, pieces, strongest
from query.ask.encoder import PartEncoder

if TYPE_CHECKING:
    from tests.conftest import Lab

ROWS = 20
HOSTILE = "<script>alert(1)</script> & \x1b[31m the river"
BUILDS: dict[str, dict[str, Any]] = {
    "default": {},
    "float32": {"projection": ProjectionConfig(precondition="none", compress=200), "proj_dtype": "float32"},
    "all": {
        "projection": ProjectionConfig(precondition="none", rank_total=36, layers=("all",), include_embeddings=True),
        "proj_dtype": "float32",
    },
    "windows": {"max_length": 12, "overlong": "window"},
}


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the parts of BUILDS, and val sets of single texts, and of prompts with completions."""
    folder = tmp_path_factory.mktemp("tokens")
    rows = lab.sample_rows(ROWS, 1)
    rows[0] = rows[0] | {"text": HOSTILE}
    lab.write(folder / "train.jsonl", rows)
    val = lab.sample_rows(3, 3)
    val[0] = val[0] | {"text": HOSTILE}
    lab.write(folder / "val.jsonl", [row | {"task": "ab"[place % 2]} for place, row in enumerate(val)])
    pairs = [{"id": row["id"], "prompt": row["text"][:9], "completion": row["text"][9:]} for row in val[1:]]
    lab.write(folder / "pairs.jsonl", pairs)
    (folder / "model").symlink_to(lab.checkpoint)
    return folder


def built(folder: Path, name: str) -> Any:
    """The part, which is built when it is first asked for."""
    if not (folder / "store" / "parts" / name).exists():
        ghoststore.build(
            checkpoint=folder / "model", data=folder / "train.jsonl", store=folder / "store", name=name, span_rows=16,
            device="cpu", **{"max_length": 32, "overlong": "truncate", **BUILDS[name]},
        )  # fmt: skip
    return Store.open(folder / "store").part(name)


def ask(folder: Path, part: str = "float32", **options: Any) -> Any:
    built(folder, part)
    wanted: dict[str, Any] = {"val_set": folder / "val.jsonl", "top_k": 3, "bottom_k": 2, "tokens": True} | options
    return ghoststore.query(store=folder / "store", part=part, device="cpu", **wanted)


def by_hand(encoder: PartEncoder, row: Row, query_D: Tensor) -> list[float]:
    """Σ over layers of ⟨S (P_out δ_t)(P_in [x_t, 1])ᵀ, q⟩ for each position, by autograd of the model in float64."""
    projection, model = encoder._encoder.engine.projection, deepcopy(encoder.model).double().requires_grad_(False)
    captured: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def capture(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            captured[name] = (args[0], y if y.requires_grad else y.requires_grad_(True))
            return captured[name][1]

        return capture

    names = [layer.block.name for layer in projection.plan.layers]
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, Conv1D)
        module.register_forward_hook(hook(name))
    ids = torch.from_numpy(row.tokens).long()[None]
    logits = model(input_ids=ids).logits[0, row.first_target - 1 : -1]
    loss = nn.functional.cross_entropy(logits, ids[0, row.first_target :])
    deltas = torch.autograd.grad(loss, [captured[name][1] for name in names])
    scores = []
    for t in range(len(row.tokens)):
        blocks = []
        for name, delta in zip(names, deltas, strict=True):
            p_in, p_out = projection.sides[name]
            assert p_in is not None
            assert p_out is not None
            x = torch.cat([captured[name][0][0, t], torch.ones(1, dtype=torch.float64)])
            blocks.append(torch.outer(p_out.double() @ delta[0, t], p_in.double() @ x)[None])
        vector_D = projection.assemble([block * 1e6 for block in blocks])[0].double() / 1e6
        scores.append(float((vector_D @ query_D).detach()))
    return scores


SLOW = pytest.param("default", marks=pytest.mark.slow)


@pytest.mark.parametrize("part", [SLOW, "float32"])
def test_each_position_by_hand(folder: Path, part: str) -> None:
    encoder = PartEncoder(built(folder, part), device="cpu")
    rows = encoder.source_rows(np.array([3, 8]))
    queries_QD = torch.from_numpy(np.random.default_rng(0).standard_normal((2, encoder.dimension)))
    found = encoder.token_scores(rows, queries_QD)
    for row, scores_QT in zip(rows, found, strict=True):
        assert scores_QT.shape == (2, len(row.tokens))
        for query_D, scores_T in zip(queries_QD, scores_QT, strict=True):
            expected = np.array(by_hand(encoder, row, query_D))
            np.testing.assert_allclose(scores_T, expected, atol=2e-5 * np.abs(expected).max())
    assert all(parameter.requires_grad for parameter in encoder.model.parameters())


@pytest.mark.parametrize("part", ["all", SLOW])
def test_positions_sum_to_the_vector(folder: Path, part: str) -> None:
    """Also of embeddings, norms and heads that are tied to them; alone or in a batch."""
    encoder = PartEncoder(built(folder, part), device="cpu")
    numbers = np.array([1, 5, 6])
    exact, rows = encoder.recompute(numbers).double(), encoder.source_rows(numbers)
    query_D = torch.from_numpy(np.random.default_rng(1).standard_normal(encoder.dimension))
    together = encoder.token_scores(rows, query_D[None])
    for row, vector_D, scores_QT in zip(rows, exact, together, strict=True):
        size = float(vector_D.norm() * query_D.norm())
        assert float(scores_QT.sum() - vector_D @ query_D) == pytest.approx(0, abs=1e-6 * size)
        (alone,) = encoder.token_scores([row], query_D[None])
        torch.testing.assert_close(alone, scores_QT, atol=1e-6 * size, rtol=0)


@pytest.mark.parametrize(
    ("part", "options"),
    [
        pytest.param("default", {"each": True, "metric": "dot"}, marks=pytest.mark.slow),
        pytest.param("default", {"metric": "cosine"}, marks=pytest.mark.slow),
        ("float32", {"each": True, "metric": "dot"}),
        ("all", {"group_field": "task", "metric": "cosine", "minus": "pairs"}),
        pytest.param(
            "all", {"precondition": "second-moment", "damping": 1.0, "metric": "cosine"}, marks=pytest.mark.slow
        ),
        pytest.param(
            "all",
            {"rerank": 10, "rerank_with": "vectors", "where": "domain = 'sky'", "layers": ("mlp",)},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one bit", "one bit, cosine", "each", "groups", "second-moment", "rerank"],
)
def test_sums(folder: Path, part: str, options: dict[str, Any]) -> None:
    """Tokens sum to the similarity of the row's own gradient, and those of all val rows, too (which is checked where
    they are computed); of one val sample alone its tokens are all there is.
    """
    if "minus" in options:
        options = options | {"minus": folder / "pairs.jsonl"}
    plain, found = ask(folder, part, tokens=False, **options), ask(folder, part, **options)
    for before, result in zip(plain.results, found.results, strict=True):
        for old, hit in zip((*before.hits, *before.bottom), (*result.hits, *result.bottom), strict=True):
            assert (old.id, old.score, old.tokens) == (hit.id, hit.score, None)
            assert sum(token.score for token in hit.tokens) == pytest.approx(hit.recomputed, abs=1e-4 * abs(hit.score))
            if part != "default":
                assert hit.recomputed == pytest.approx(hit.score, rel=1e-4)
            asked = hit.val_sample
            assert sum(token.score for token in asked.tokens) == pytest.approx(asked.score, rel=1e-9)
            if "each" in options:
                assert asked.score == pytest.approx(hit.recomputed, rel=1e-4)
                assert asked.val_row == result.val_row
    if part == "default":
        hit = found.results[0].hits[0]
        assert hit.recomputed != pytest.approx(hit.score, rel=1e-3), "one bit a number is a rounding"


@pytest.mark.slow
def test_places(folder: Path) -> None:
    """Tokens are where they say, whatever the row is of: a text, a prompt with its completion, a window."""
    for part, options in (("float32", {}), ("float32", {"val_set": folder / "pairs.jsonl"}), ("windows", {})):
        hits = [hit for result in ask(folder, part, top_k=12, each=True, **options).results for hit in result.hits]
        for hit in hits:
            for text, tokens in ((hit.text, hit.tokens), (hit.val_sample.text, hit.val_sample.tokens)):
                assert [text[token.start : token.end] for token in tokens] == [token.token for token in tokens]
                starts = [token.start for token in tokens]
                assert starts == sorted(starts)
            assert hit.tokens[0].start == 0 or hit.window_start
    assert any(hit.window_start for hit in hits)


def test_refused(folder: Path) -> None:
    ask(folder)
    common: dict[str, Any] = {"store": folder / "store", "val_set": folder / "val.jsonl", "tokens": True}
    for message, options in (
        ("several parts have several: give one", {"part": ["float32", "all"], "part_weights": "equal"}),
        ("give `rerank_with=vectors`", {"rerank": 10}),
        ("`combine=max` is not: give `combine=mean`", {"group_field": "task", "combine": "max"}),
    ):
        with pytest.raises(UsageError, match=message):
            ghoststore.query(**common, **{"part": "float32", **options})
    with pytest.raises(UsageError, match="`tokens` is for parts, and `run=r`"):
        ghoststore.query(store=folder / "store", run="r", tokens=True)
    gone = (folder / "train.jsonl").rename(folder / "gone.jsonl")
    try:
        for options in ({"tokens": True}, {"tokens": False, "rerank": 20}):
            with pytest.raises(UsageError, match=r"train\.jsonl.* does not exist"):
                ask(folder, checkpoint="nowhere", **options)  # before a model is looked for
        assert ask(folder, data=gone).results[0].hits[0].tokens
    finally:
        gone.rename(folder / "train.jsonl")


class Sideways(nn.Module):
    """A model whose layer runs along the positions, each feature on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.head = nn.Embedding(11, 6), nn.Linear(8, 8), nn.Linear(6, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.mlp(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        return type("Output", (), {"logits": self.head(hidden)})


def test_a_layer_without_positions(lab: Lab) -> None:
    model = Sideways()
    projection = Projection.for_model(model, ProjectionConfig(precondition="none", rank_total=16, layers=("mlp",)))
    encoder = RowEncoder(model, projection)
    row = Row(None, 0, 0, np.arange(8, dtype=np.int32), 1, None)  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match=r"'mlp' gave an output of shape .* second axis is not that of the tokens"):
        position_scores(encoder, [row], torch.ones(1, projection.plan.dimension), 64)
    zeros = position_scores(encoder, [row], torch.zeros(2, projection.plan.dimension), 64)
    assert [scores_QT.tolist() for scores_QT in zeros] == [[[0.0] * 8] * 2]
    assert not model.mlp._forward_hooks


def tokens(text: str, scores: list[float]) -> list[Token]:
    """One token a word."""
    found, read = [], 0
    for word, score in zip(text.split(), scores, strict=True):
        start = text.index(word, read)
        read = start + len(word)
        found.append(Token(token=word, start=start, end=read, score=score))
    return found


def test_the_tokens_of_one_character_are_one_piece() -> None:
    """Its bytes together add what no single one of them does: in the terminal, the report and the explorer."""
    text = "a 𝔘 dog"
    places = [(0, 1, 4.0), (2, 3, 1.0), (2, 3, 1.5), (2, 3, 3.0), (4, 7, 1.0), (None, None, 9.0)]
    of_text = [Token(token="?", start=start, end=end, score=score) for start, end, score in places]
    assert pieces(text, of_text) == [("a", 4.0), (" ", None), ("𝔘", 5.5), (" ", None), ("dog", 1.0)]
    assert colored(text, of_text)[2] == ("𝔘", "p5", 5.5)
    assert colored(text, of_text)[0] == ("a", "p4", 4.0)
    assert strongest([score or 0.0 for _, score in pieces(text, of_text)], 1.0, 1) == {2}
    assert marked(text, of_text, 1.0, 5, False) == "…«𝔘»…"
    assert pieces("", of_text[:2]) == [("?", 4.0), ("?", 1.0)]
    assert pieces("a 𝔘", of_text) == [("a", 4.0), (" ", None), ("𝔘", 5.5)], "of a text that is cut, its tokens alone"


def test_marks() -> None:
    text = "one two\nthree  four five six seven"
    of_text = tokens(text, [0.0, 3.0, 2.0, -9.0, 0.1, 1.0, 0.0])
    scores = [token.score for token in of_text]
    assert strongest(scores, 1.0, 2) == {1, 2}
    assert strongest(scores, -1.0, 5) == {3}
    assert strongest(scores, 1.0, 9) == {1, 2, 5}, "none below a tenth of the first"
    assert marked(text, of_text, 1.0, None, False) == "one «two» «three» four five «six» seven"
    assert marked(text, of_text, -1.0, None, True) == "one two three [four] five six seven"
    assert marked(None, of_text, -1.0, None, True) == "onetwothree[four]fivesixseven"
    for columns in range(1, 45):
        line = marked(text, of_text, 1.0, columns, False)
        assert len(line) <= columns
        assert columns < 16 or "«two»" in line
    assert colored(text, of_text)[:3] == [("one", "", 0.0), (" ", "", None), ("two", "p2", 3.0)]
    assert ("four", "n5", -9.0) in colored(text, of_text)


def test_the_command(lab: Lab, folder: Path, tmp_path: Path) -> None:
    built(folder, "float32")
    words = ["query", "--store", folder / "store", "--part", "float32", "--val-set", folder / "val.jsonl", "--tokens"]
    words += ["--each", "--top-k", "2", "--max-samples", "2"]
    done = lab.run(*words, "--json", "--out", tmp_path / "hits.csv", "--report", tmp_path / "page.html")
    hit = done.json["results"][1]["hits"][0]
    assert {"token", "start", "end", "score"} == hit["tokens"][0].keys()
    assert {"id", "val_row", "score", "tokens", "text"} == hit["val_sample"].keys()
    assert "tokens" not in (tmp_path / "hits.csv").read_text().splitlines()[0]
    page = (tmp_path / "page.html").read_text()
    assert 'class="p5"' in page
    assert "<script" not in page
    assert "&lt;" in page
    table = lab.run(*words)
    assert table.code == 0, table.err
    assert "  has: " in table.out
    assert "  asked by row-1: " in table.out
    assert "\x1b[31m" not in table.out
    assert "Tokens sum to the cosine of gradients that were computed again and not rounded: " in table.out
    plain = lab.run(*[word for word in words if word != "--tokens"], "--json").json
    assert "tokens" not in plain["results"][0]["hits"][0]
