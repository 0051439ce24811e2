"""A chat template that asks for the date gets one date: in all rows of a part or of token shards, in every question to
them, and on whatever day they are gone on with.
"""

from __future__ import annotations

import json
import shutil
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import ghoststore
from ghoststore import Store, TokenShards
from ghoststore.corpus import Messages, Sample
from ghoststore.settings.build import TokenizeOptions
from ghoststore.store.base.records import json_digest, read_record, write_record
from indexer.encode.tokens import Tokenizer
from indexer.tokenize.tokenize import tokenize_as_of
from query.ask.encoder import PartEncoder
from tests.support.parts import unbuild
from tests.support.tokenizers_of_all_kinds import byte_level

if TYPE_CHECKING:
    from tests.conftest import Lab

DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today: {{ date_string }}{% for m in messages %} {{ m.role }}: {{ m.content }}{% endfor %}"
)
PLAIN = "{% for m in messages %} {{ m.role }}: {{ m.content }}{% endfor %}"
LONG_AGO = "2020-02-03"
FLOATS = ("--proj-precondition", "none", "--proj-dtype", "float32")
TURNS = [{"role": "user", "content": "hi"}]


def chatter(template: Any = DATED) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), chat_template=template)


def text_of(tokenizer: Tokenizer) -> str:
    ((ids, _),) = tokenizer.encode([Sample(0, "0", None, Messages(TURNS), -1, 0)])
    return str(tokenizer.tokenizer.decode(ids))


def test_the_template_writes_the_date_that_it_is_given() -> None:
    tokenizer = chatter()
    assert text_of(Tokenizer(tokenizer, template_date=LONG_AGO)) == "Today: 03 Feb 2020 user: hi"
    assert text_of(Tokenizer(tokenizer, template_date=LONG_AGO).at("2021-12-31")) == "Today: 31 Dec 2021 user: hi"
    # The template that transformers compiled is the user's, too: its clock goes on.
    today = datetime.now().strftime("%Y")
    assert today in tokenizer.apply_chat_template(TURNS, tokenize=False)
    hours = chatter("{{ strftime_now('%H:%M:%S') }}")
    assert text_of(Tokenizer(hours)) == "00:00:00"


def test_a_date_only_where_the_template_asks_for_it() -> None:
    assert Tokenizer(chatter(), template_date=None).template_date == date.today().isoformat()
    assert Tokenizer(chatter({"default": DATED, "tool_use": PLAIN})).template_date is not None
    for template in (PLAIN, None, {"default": PLAIN}):
        assert Tokenizer(chatter(template), template_date=LONG_AGO).template_date is None


@pytest.fixture(scope="module")
def dated(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint whose template asks for the date, chats, and token shards of them of another day."""
    folder = tmp_path_factory.mktemp("dated")

    def change(model: Any, tokenizer: Any) -> None:
        # As many tokens, in an order that the date decides.
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content }}{% endfor %}"
            "{{ ' the old cat' * 3 if strftime_now('%Y') == '2020' else ' old the cat' * 3 }}"
        )

    checkpoint = lab.model(folder / "model", change=change)
    rows = [{"id": row["id"], "messages": [{"role": "user", "content": row["text"]}]} for row in lab.rows]
    data = lab.write(folder / "chats.jsonl", rows)
    shards = folder / "shards"
    options = TokenizeOptions(data=data, tokenizer=checkpoint, out=shards, shard_samples=8, workers=1)
    tokenize_as_of(options, LONG_AGO)
    return checkpoint, data, shards


def test_token_shards_go_on_with_their_date(dated: tuple[Path, Path, Path], tmp_path: Path) -> None:
    checkpoint, data, made = dated
    shards = Path(shutil.copytree(made, tmp_path / "shards"))
    whole = TokenShards.open(shards)
    expected = [whole.tokens_of(sample).tolist() for sample in range(whole.samples)]
    assert whole.template_date == LONG_AGO
    (shards / "commits" / "00000001.json").unlink()
    # In this process and in others.
    ghoststore.tokenize(data=data, tokenizer=checkpoint, out=shards, shard_samples=8, workers=2)
    again = TokenShards.open(shards, verify=True)
    assert [again.tokens_of(sample).tolist() for sample in range(again.samples)] == expected
    ghoststore.tokenize(data=data, tokenizer=checkpoint, out=tmp_path / "new", shard_samples=8, workers=1)
    new = TokenShards.open(tmp_path / "new")
    assert new.template_date == date.today().isoformat()
    assert new.tokens_of(0).tolist() != expected[0]


def test_a_part_keeps_the_date_for_every_question(dated: tuple[Path, Path, Path], lab: Lab, tmp_path: Path) -> None:
    """The part is of token shards of another day; val sets are chats, tokenized today."""
    checkpoint, data, shards = dated
    store = tmp_path / "store"
    built = lab.build(store, "--checkpoint", checkpoint, "--data", shards, *FLOATS, "--span-rows", "8")
    assert built.code == 0, built.err
    part = Store.open(store).part()
    assert part.manifest["tokens"]["template_date"] == LONG_AGO
    answer = ghoststore.query(store=store, val_set=data, each=True, top_k=1, device="cpu")
    assert [result.hits[0].score for result in answer.results] == pytest.approx([1.0] * len(answer.results), abs=1e-3)
    encoder = PartEncoder(part, device="cpu")
    vectors = encoder.recompute(range(part.rows)).numpy()
    # Built on: a span without its record comes out as before.
    before = np.asarray(part.read("vectors", 0, part.rows))
    np.testing.assert_allclose(vectors, before, rtol=1e-3, atol=1e-4)
    unbuild(part, 1)
    built = lab.build(store, "--checkpoint", checkpoint, "--data", shards, *FLOATS, "--span-rows", "8")
    assert built.code == 0, built.err
    np.testing.assert_array_equal(np.asarray(Store.open(store).part().read("vectors", 0, part.rows)), before)


@pytest.mark.slow
def test_a_build_goes_on_with_the_date_of_its_first_day(
    dated: tuple[Path, Path, Path], lab: Lab, tmp_path: Path
) -> None:
    """The manifest of a part of chats says a day that has passed: whatever is built on is of that day."""
    checkpoint, data, _ = dated
    store = tmp_path / "store"
    words = ["--checkpoint", checkpoint, "--data", data, *FLOATS, "--span-rows", "8"]
    assert lab.build(store, *words).code == 0
    part = Store.open(store).part()
    today = np.asarray(part.read("vectors", 0, part.rows))
    path = part.path / "zarr.json"
    group = json.loads(path.read_text())
    group["attributes"]["manifest"]["tokens"]["template_date"] = LONG_AGO
    group["attributes"]["manifest_sha256"] = json_digest(group["attributes"]["manifest"])
    path.write_text(json.dumps(group))
    unbuild(part, *part.spans)
    assert lab.build(store, *words).code == 0
    then = np.asarray(Store.open(store).part().read("vectors", 0, part.rows))
    assert not np.allclose(today, then)
    answer = ghoststore.query(store=store, val_set=data, each=True, top_k=1, device="cpu")
    assert [result.hits[0].score for result in answer.results] == pytest.approx([1.0] * len(answer.results), abs=1e-3)
    out = tmp_path / "evaluation"
    ghoststore.evaluate(
        store=store,
        val_set=data,
        out=out,
        methods=["random"],
        halves=3,
        max_steps=1,
        batch_size=2,
        workers=1,
        device="cpu",
    )
    assert TokenShards.open(out / "tokens").template_date == LONG_AGO


def test_exact_gradients_go_on_with_the_date(dated: tuple[Path, Path, Path], tmp_path: Path) -> None:
    checkpoint, data, shards = dated
    given: dict[str, Any] = {"checkpoint": checkpoint, "max_samples": 2, "device": "cpu"}
    assert (
        ghoststore.full_gradients(**given, data=shards, out=tmp_path / "of").manifest["tokens"]["template_date"]
        == LONG_AGO
    )
    path = tmp_path / "on" / "manifest.json"
    ghoststore.full_gradients(**given, data=data, out=path.parent)
    stored = read_record(path)
    stored["tokens"]["template_date"] = LONG_AGO
    write_record(path, stored)
    on = ghoststore.full_gradients(**given, data=data, out=path.parent)
    assert on.manifest["tokens"]["template_date"] == LONG_AGO


@pytest.mark.slow
def test_a_training_takes_the_date_of_its_tokens(dated: tuple[Path, Path, Path], tmp_path: Path) -> None:
    checkpoint, data, shards = dated
    losses = []
    for name, source, val in (("as", shards, shards), ("of", shards, data), ("new", data, data)):
        report = ghoststore.train(
            checkpoint=checkpoint,
            data=source,
            val_set=val,
            store=tmp_path / "store",
            name=name,
            output_dir=tmp_path / name,
            max_steps=1,
            batch_size=2,
            device="cpu",
        )
        losses.append(report.val_loss)
        manifest = Store.open(tmp_path / "store").run(name).manifest
        expected = date.today().isoformat() if name == "new" else LONG_AGO
        assert manifest["tokenizer"]["template_date"] == expected
    assert losses[0] == losses[1] != losses[2]
