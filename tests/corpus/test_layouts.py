"""Layouts of rows that people have: fields inside objects, ShareGPT's turns, prompts of messages, ids of all kinds."""

from __future__ import annotations

import json
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from ghoststore.corpus import Corpus, Fields, Messages, ResolvedFields, Sample, SampleScan
from ghoststore.errors import CorpusError, UsageError
from indexer.encode.tokens import Tokenizer
from tests.support.corpora import Write, jsonl_bytes, write_parquet
from tests.support.tokenizers_of_all_kinds import byte_level

NESTED = [
    {
        "body": {"text": f"t{i}", "n": i},
        "meta": {"pile_set_name": "Pile-CC", "at": {"day": f"d{i}"}},
        "key": {"id": f"k{i}"},
    }
    for i in range(4)
]
INSIDE = Fields(text="body.text", domain="meta.pile_set_name", id="key.id")


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "arrow", "feather", "dataset", "folder-parquet"])
def test_fields_inside_objects(form: str, write: Write) -> None:
    corpus = Corpus.open(write(form, NESTED), INSIDE).keeping(["meta.at.day", "body.n"])
    samples = list(corpus.samples())
    assert [(s.id, s.content, s.domain, s.kept) for s in samples] == [
        (f"k{i}", f"t{i}", "Pile-CC", (f"d{i}", i)) for i in range(4)
    ]
    again = ResolvedFields.from_json(json.loads(json.dumps(corpus.resolved.to_json())))
    assert [s.digest() for s in Corpus.open(corpus.source, again).samples()] == [s.digest() for s in samples]


def test_only_the_columns_that_hold_fields_are_read(write: Write) -> None:
    form = Corpus.open(write("parquet", [{**row, "other": "x"} for row in NESTED]))._form
    (_, row), *_ = form.rows(Path(write("parquet", NESTED)), ["meta.pile_set_name", "body.text"], 0)
    assert isinstance(row, dict)
    assert set(row) == {"meta", "body"}


def test_a_name_with_a_dot_comes_first(tmp_path: Path) -> None:
    rows = [{"a.b": "whole", "a": {"b": "inner"}}, {"a": {"b": "inner"}}, {"a": None}, {"a.b": None, "a": {"b": "x"}}]
    (tmp_path / "a.jsonl").write_bytes(jsonl_bytes(rows))
    corpus = Corpus.open(str(tmp_path / "a.jsonl"), Fields(text="a.b"))
    assert [s.content for s in corpus.samples()] == ["whole", "inner", None, None]


def test_a_field_that_is_not_in_the_object(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        jsonl_bytes([{"text": "a", "meta": {"x": "1"}}, {"text": "b", "meta": {"y": "2"}}])
    )
    with pytest.raises(CorpusError, match=r"line 1: no field 'meta.y' \(from `fields.domain`\).*in 'meta': 'x'"):
        list(Corpus.open(str(tmp_path / "a.jsonl"), Fields(domain="meta.y")).samples())
    with pytest.raises(CorpusError, match=r"line 2: no field 'meta.x'; fields found: 'text', 'meta'; in 'meta': 'y'"):
        list(Corpus.open(str(tmp_path / "a.jsonl"), Fields(domain="meta.x")).samples())


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def tokenizer(template: str = TEMPLATE) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), chat_template=template)


def learnt(sample: Sample, template: str = TEMPLATE) -> tuple[str, str]:
    """(what is read, what is learnt) of the text of a sample."""
    ((ids, first),) = Tokenizer(tokenizer(template)).encode([sample])
    return tokenizer().decode(ids[:first]), tokenizer().decode(ids[first:])


TURNS = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Hi", "weight": 0},
    {"from": "gpt", "value": "Hello", "weight": 1},
    {"from": "observation", "value": "42"},
]
SAME = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi", "weight": 0},
    {"role": "assistant", "content": "Hello", "weight": 1},
    {"role": "tool", "content": "42"},
]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "dataset"])
def test_turns_of_sharegpt(form: str, write: Write, tmp_path: Path) -> None:
    """They are the messages that they stand for: the same text, and the same fingerprint."""
    corpus = Corpus.open(write(form, [{"id": "a", "conversations": TURNS}] * 2))
    assert corpus.resolved.messages == "conversations"
    samples = list(corpus.samples())
    assert samples[0].content == Messages(SAME)
    (tmp_path / "same.jsonl").write_bytes(jsonl_bytes([{"id": "a", "messages": SAME}] * 2))
    same = Corpus.open(str(tmp_path / "same.jsonl")).samples()
    assert SampleScan(samples).finish() == SampleScan(same).finish()


def test_a_conversation_by_another_name(write: Write) -> None:
    for name in ("conversations", "conversation"):
        (sample,) = Corpus.open(write("jsonl", [{name: SAME}])).samples()
        assert sample.content == Messages(SAME)
    (sample,) = Corpus.open(write("jsonl", [{"c": TURNS}]), Fields(messages="c")).samples()
    assert sample.content == Messages(SAME)


def test_a_speaker_without_a_role(write: Write) -> None:
    source = write("jsonl", [{"conversations": TURNS}, {"conversations": [*TURNS, {"from": "bot", "value": "x"}]}])
    with pytest.raises(
        CorpusError, match=r"line 2: field 'conversations', message 5: 'from' is 'bot' \(str\), which is none"
    ):
        list(Corpus.open(source).samples())


PROMPTED = {"prompt": SAME[:2], "completion": SAME[2:3]}


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "dataset"])
def test_prompts_of_messages(form: str, write: Write) -> None:
    """The completion alone is learnt, from where a model would answer."""
    corpus = Corpus.open(write(form, [PROMPTED]))
    assert corpus.resolved.kind == "chat-completion"
    (sample,) = corpus.samples()
    assert learnt(sample) == ("<system>Be kind.<user>Hi<assistant>", "Hello</s>")
    assert sample.preview().startswith("system: Be kind.\nuser: Hi")
    (whole,) = Corpus.open([{"messages": SAME[:3]}]).samples()
    assert "".join(learnt(whole)) == "".join(learnt(sample))
    assert whole.digest() != sample.digest()


def test_tools_beside_a_prompt_of_messages(write: Write) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    (sample,) = Corpus.open(write("jsonl", [{**PROMPTED, "tools": tools}])).samples()
    assert sample.content == Messages(SAME[:3], tools, prompt=2)


def test_where_a_completion_begins() -> None:
    """What the template writes before an answer is read as far as the conversation has it; a prompt that it writes
    otherwise there is refused.
    """
    (sample,) = Corpus.open([PROMPTED]).samples()
    thinks = TEMPLATE.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")
    assert learnt(sample, thinks) == ("<system>Be kind.<user>Hi<assistant>", "Hello</s>")
    silent = TEMPLATE.replace("<assistant>{% endif %}", "{% endif %}")
    assert learnt(sample, silent) == ("<system>Be kind.<user>Hi", "<assistant>Hello</s>")
    counts = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(CorpusError, match="row 1: sample '0': the chat template writes the prompt otherwise"):
        learnt(sample, counts)
    (to_user,) = Corpus.open([{"prompt": SAME[:1], "completion": SAME[1:3]}]).samples()
    assert learnt(to_user) == ("<system>Be kind.", "<user>Hi<assistant>Hello</s>")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"prompt": SAME[:2], "completion": "Hello"},
            "line 1: field 'completion': expected a non-empty list of messages",
        ),
        ({"prompt": [], "completion": SAME[2:3]}, "line 1: field 'prompt': expected a non-empty list"),
        ({"prompt": SAME[:1], "completion": [{"role": "user"}]}, "line 1: field 'completion', message 1: expected"),
    ],
)
def test_prompts_that_are_none(row: dict[str, Any], words: str, write: Write) -> None:
    with pytest.raises(CorpusError, match=words):
        list(Corpus.open(write("jsonl", [row])).samples())


def test_texts_and_messages_do_not_mix(write: Write) -> None:
    source = write("jsonl", [{"prompt": "a", "completion": "b"}, PROMPTED])
    with pytest.raises(CorpusError, match="line 2: field 'prompt': expected a string or null"):
        list(Corpus.open(source).samples())


def test_kinds_in_one_batch() -> None:
    """Samples of several kinds are tokenized each as its kind."""
    rows = [{"text": "ab"}, {"prompt": "a", "completion": "b"}, {"messages": SAME[:3]}, PROMPTED, {"text": None}]
    samples = [next(iter(Corpus.open([row]).samples())) for row in rows]
    encode = Tokenizer(tokenizer()).encode
    together, alone = encode(samples), [encode([sample])[0] for sample in samples]
    assert [(ids.tolist(), first) for ids, first in together] == [(ids.tolist(), first) for ids, first in alone]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_role_that_the_template_refuses(name: str, tmp_path: Path) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    rows = [{"messages": SAME[1:]}, {"messages": SAME}]
    if name == "a.parquet":
        write_parquet(tmp_path / name, rows)
    else:
        (tmp_path / name).write_bytes(jsonl_bytes(rows))
    place = {"a.jsonl": "line 2", "a.json": r"row 2 \(line 2\)", "a.parquet": "row 2"}[name]
    words = rf"{name}, {place}: sample '1': the chat template refuses .*System role not supported.*message of the user"
    with pytest.raises(CorpusError, match=words):
        Tokenizer(tokenizer(refuses)).encode(list(Corpus.open(str(tmp_path / name)).samples()))


IDS = {
    "large": ([2**70, -(2**70), 2**63], ["1180591620717411303424", "-1180591620717411303424", "9223372036854775808"]),
    "float": ([1.0, 2.5, -3.0], ["1", "2.5", "-3"]),
    "null": (["a", None, "c"], ["a", "1", "c"]),
    "mixed": ([7, "x", 10**30], ["7", "x", str(10**30)]),
}


@pytest.mark.parametrize("case", IDS)
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_ids_of_all_kinds(form: str, case: str, write: Write) -> None:
    """Also inside an object, where other numbers of the row stay as they were."""
    ids, names = IDS[case]
    assert [s.id for s in Corpus.open(write(form, [{"text": "t", "id": i} for i in ids])).samples()] == names
    rows = [{"text": "t", "meta": {"id": i, "x": [2.0**70]}} for i in ids]
    corpus = Corpus.open(write(form, rows), Fields(id="meta.id"))
    assert [s.id for s in corpus.samples()] == names


def test_ids_of_tables(tmp_path: Path) -> None:
    cases = {
        "uint64": (pyarrow.array([2**64 - 1, 0], pyarrow.uint64()), [str(2**64 - 1), "0"]),
        "decimal": (pyarrow.array([Decimal(10**30), Decimal(7)], pyarrow.decimal128(38, 0)), [str(10**30), "7"]),
        "with missing": (pyarrow.array([1.0, None], pyarrow.float64()), ["1", "1"]),
    }
    for array, names in cases.values():
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "id": array}), tmp_path / "a.parquet")
        assert [s.id for s in Corpus.open(str(tmp_path / "a.parquet")).samples()] == names


@pytest.mark.parametrize("value", [2.0**60, -1e300])
def test_an_id_that_lost_digits(value: float, write: Write) -> None:
    """An integer with missing ones beside it becomes a float in pandas, and some of its digits are gone."""
    source = write("parquet", [{"text": "t", "id": 1.0}, {"text": "t", "id": value}])
    with pytest.raises(
        CorpusError, match=r"row 2: field 'id': .* is a float of more than 2\*\*53.*as strings or integers"
    ):
        list(Corpus.open(source).samples())


def test_no_number_is_no_id(write: Write) -> None:
    source = write("parquet", [{"text": "t", "id": 1.0}, {"text": "t", "id": float("nan")}])
    with pytest.raises(CorpusError, match="row 2: field 'id': expected a string, a number or null, found nan"):
        list(Corpus.open(source).samples())


def test_a_literal_that_json_lacks(write: Write, tmp_path: Path) -> None:
    for literal in ("NaN", "Infinity", "-Infinity"):
        (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{{"text": "b", "score": {literal}}}\n')
        with pytest.raises(CorpusError, match=rf"a\.jsonl, line 2: invalid JSON: {literal} is a literal of Python"):
            list(Corpus.open(str(tmp_path / "a.jsonl")).samples())


def test_kinds_of_a_manifest() -> None:
    fields = ResolvedFields(kind="chat-completion", prompt="p", completion="c")
    assert ResolvedFields.from_json(fields.to_json()) == fields
    assert fields.columns() == ["p", "c", "tools", "documents"]
    with pytest.raises(UsageError, match="messages field of chat-completion content"):
        ResolvedFields(kind="chat-completion", prompt="p", completion="c", messages="m")
