"""Conversations with tools: nothing of them is dropped, and a conversation is the same in every form of file."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ghoststore.corpus import Corpus, Fields, Messages, Sample, SampleScan
from ghoststore.corpus.fields import resolve
from ghoststore.errors import CorpusError
from indexer.encode.tokens import Tokenizer
from tests.support.corpora import Write, jsonl_bytes, write_parquet
from tests.support.tokenizers_of_all_kinds import byte_level

TEMPLATE = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% if documents %}({{ documents | tojson }}){% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
)


def tool(name: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": f"The {name}.", "parameters": schema}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "Is it raining in Rome?"},
            {"role": "assistant", "content": None, "tool_calls": [call("weather", city="Rome")]},
            {"role": "tool", "content": "sun", "name": "weather"},
            {"role": "assistant", "content": "No."},
        ],
        "tools": [tool("weather", city="string"), tool("add", left="number", right="number")],
    },
    # A model that only calls a tool: without content, which Arrow does not know from a content of null.
    {
        "messages": [
            {"role": "user", "content": "2 + 3?"},
            {"role": "assistant", "tool_calls": [call("add", left=2, right=3)]},
        ],
        "tools": [tool("add", left="number", right="number")],
    },
    {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}], "tools": None},
    {"messages": [{"role": "user", "content": "No tools at all."}, {"role": "assistant", "content": "Fine."}]},
    {"messages": [{"role": "user", "content": "None to choose from."}], "tools": []},
]
PARTS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Which?"}, {"type": "image", "image": "cat.png"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ],
        "documents": [{"title": "cats", "text": "A cat is a cat."}, {"title": "untitled"}],
    },
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Again."}]}]},
]


@cache
def chatter() -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), chat_template=TEMPLATE)


def ids_of(samples: list[Sample]) -> list[list[int]]:
    return [ids.tolist() for ids, _ in Tokenizer(chatter()).encode(samples)]


@pytest.mark.parametrize("rows", [ROWS, PARTS], ids=["tools", "parts"])
def test_a_conversation_is_one_in_every_form(rows: list[dict[str, Any]], write: Write, tmp_path: Path) -> None:
    import datasets
    import pyarrow

    if pyarrow.array([{"b": 1, "a": 2}]).type.field(0).name != "b":
        pytest.skip("this pyarrow sorts the keys of objects, and their order belongs to a conversation")
    sources = [write("jsonl", rows)]
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(jsonl_bytes(rows)))
    # A JSON string of the list is the same tools.
    texts = [{**row, **({"tools": json.dumps(row["tools"])} if row.get("tools") else {})} for row in rows]
    (tmp_path / "strings.jsonl").write_bytes(jsonl_bytes(texts))
    write_parquet(tmp_path / "rows.parquet", rows)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    sources += [str(tmp_path / name) for name in ("packed.jsonl.gz", "strings.jsonl", "rows.parquet", "saved")]
    found = [list(Corpus.open(source).samples()) for source in sources]
    assert len({SampleScan(samples).finish().fingerprint for samples in found}) == 1
    assert len({tuple(sample.digest() for sample in samples) for samples in found}) == 1
    tokens = [ids_of(samples) for samples in found]
    assert all(one == tokens[0] for one in tokens)
    assert "null" not in chatter().decode(tokens[0][0]).replace("None", "")


def turned(value: Any) -> Any:
    """``value`` with the keys of all its objects the other way round."""
    if isinstance(value, list):
        return [turned(inner) for inner in value]
    return {key: turned(value[key]) for key in reversed(value)} if isinstance(value, dict) else value


CALLED = {"role": "assistant", "content": "", "tool_calls": [call("add", left=2, right=3)]}
ORDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tools": ({"tools": ROWS[0]["tools"]}, {"tools": turned(ROWS[0]["tools"])}),
    "tools as a string": ({"tools": ROWS[0]["tools"]}, {"tools": json.dumps(turned(ROWS[0]["tools"]))}),
    "documents": ({"documents": PARTS[0]["documents"]}, {"documents": turned(PARTS[0]["documents"])}),
    "calls": ({"messages": [CALLED]}, {"messages": [{**CALLED, "tool_calls": turned(CALLED["tool_calls"])}]}),
    "parts": (
        {"messages": PARTS[0]["messages"]},
        {"messages": [{**message, "content": turned(message["content"])} for message in PARTS[0]["messages"]]},
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_keys_that_a_template_prints_in_another_order_are_another_sample(name: str, write: Write) -> None:
    """The text differs, so the digest does."""
    turns = [{"role": "user", "content": "x"}]
    rows = [{"messages": turns, "id": "a", **row} for row in ORDERS[name]]
    first, second = Corpus.open(write("jsonl", rows)).samples()
    assert first.content == second.content, "but for the order"
    one, other = ids_of([first, second])
    assert one != other
    assert first.digest() != second.digest()


def test_keys_that_a_template_looks_up_may_stand_in_any_order(write: Write) -> None:
    row = {**ROWS[0], "documents": PARTS[0]["documents"], "id": "a", "domain": "d"}
    other = {key: row[key] for key in reversed(row)}
    other["messages"] = [{key: message[key] for key in reversed(message)} for message in row["messages"]]
    first, second = Corpus.open(write("jsonl", [row, other])).samples()
    assert ids_of([first]) == ids_of([second])
    assert first.canonical() == second.canonical()


def test_forms_that_give_all_rows_one_order_of_keys(write: Write) -> None:
    """Parquet and saved datasets have one schema: rows with another order in the file have another text, and digest."""
    turns = [{"role": "user", "content": "x"}]
    rows = [{"messages": turns, "tools": tools} for tools in (ROWS[0]["tools"], turned(ROWS[0]["tools"]))]
    found = [list(Corpus.open(write(form, rows)).samples()) for form in ("jsonl", "parquet", "dataset")]
    for samples in found[1:]:
        same_text = [one == other for one, other in zip(ids_of(found[0]), ids_of(samples), strict=True)]
        same_digest = [one.digest() == other.digest() for one, other in zip(found[0], samples, strict=True)]
        assert same_digest == same_text
        assert False in same_text
    assert len({SampleScan(samples).finish().fingerprint for samples in found}) > 1


def test_the_text_is_what_the_template_makes_of_messages_and_tools(write: Write) -> None:
    for rows in (ROWS, PARTS):
        samples = list(Corpus.open(write("jsonl", rows)).samples())
        for row, ids in zip(rows, ids_of(samples), strict=True):
            # The content that a message lacks is null to the template, as in Parquet.
            messages = [{"content": None, **message} for message in row["messages"]]
            text = chatter().apply_chat_template(
                messages, tools=row.get("tools"), documents=row.get("documents"), tokenize=False
            )
            assert ids == chatter()(text, add_special_tokens=False)["input_ids"]
            for given in ("tools", "documents"):
                assert not row.get(given) or json.dumps(row[given]) in text


NULLS: list[dict[str, Any]] = [
    {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"x": {"default": None, "enum": ["a", None]}}}}
        ],
    },
    {
        "messages": [
            {"role": "assistant", "content": "", "name": None, "tool_calls": [call("f", x=None, y=[{"z": None}])]}
        ]
    },
    {"messages": [{"role": "user", "content": "hi"}], "documents": [{"title": None, "text": "d"}]},
]


@pytest.mark.parametrize("row", NULLS, ids=["tools", "calls", "documents"])
def test_nulls_of_a_row_are_in_its_text(row: dict[str, Any], write: Write) -> None:
    """As apply_chat_template has it; with them, the sample is another one than without."""
    (sample,) = Corpus.open(write("jsonl", [row])).samples()
    text = chatter().apply_chat_template(
        row["messages"], tools=row.get("tools"), documents=row.get("documents"), tokenize=False
    )
    assert "null" in text
    assert ids_of([sample]) == [chatter()(text, add_special_tokens=False)["input_ids"]]
    (without,) = Corpus.open(write("jsonl", [json.loads(json.dumps(row).replace("null", '"-"'))])).samples()
    assert sample.digest() != without.digest()


def test_nulls_that_a_form_adds_are_in_no_text(write: Write, tmp_path: Path) -> None:
    """Parquet does not tell them from nulls of the data; in a JSON string it does."""
    tools = NULLS[0]["tools"]
    rows = [{"messages": NULLS[0]["messages"], "tools": value} for value in (tools, [{"name": "g", "other": 1}])]
    write_parquet(tmp_path / "rows.parquet", rows)
    found = list(map(chatter().decode, ids_of(list(Corpus.open(str(tmp_path / "rows.parquet")).samples()))))
    assert not any("null," in text or "null}" in text for text in found)
    strings = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    write_parquet(tmp_path / "strings.parquet", strings)
    kinds = [str(tmp_path / "strings.parquet"), write("jsonl", strings), write("jsonl", rows)]
    samples = [list(Corpus.open(kind).samples()) for kind in kinds]
    assert ids_of(samples[0]) == ids_of(samples[1]) == ids_of(samples[2])
    assert len({SampleScan(some).finish().fingerprint for some in samples}) == 1
    assert chatter().decode(ids_of(samples[0])[0]).count("null") == 2


def test_tools_are_part_of_the_sample(write: Write) -> None:
    turns = [{"role": "user", "content": "x"}]
    rows = [
        {"messages": turns, "id": "a", **beside}
        for beside in (
            {},
            {"tools": []},
            {"tools": [tool("f")]},
            {"tools": [tool("g")]},
            {"documents": [{"text": "d"}]},
        )
    ]
    samples = list(Corpus.open(write("jsonl", rows)).samples())
    assert len({sample.digest() for sample in samples}) == len(rows)
    assert samples[0].canonical() == b'{"content":{"messages":[{"content":"x","role":"user"}]},"domain":null,"id":"a"}'
    assert samples[2].preview().startswith('tools: [{"type":"function"')
    assert samples[2].preview().endswith("\nuser: x")
    assert [sample.texts() for sample in samples] == [["x"]] * len(rows)


def test_calls_are_part_of_the_text() -> None:
    fields = resolve(Fields(), ROWS[1], "line 1")
    sample = fields.sample(ROWS[1], source_row=0, file=0, offset=0)
    assert isinstance(sample.content, Messages)
    assert sample.content.messages[1] == {"role": "assistant", "content": None, **ROWS[1]["messages"][1]}
    assert "".join(sample.texts()) == (
        '2 + 3?{"tool_calls":[{"type":"function","function":{"name":"add","arguments":{"left":2,"right":3}}}]}'
    )


@pytest.mark.parametrize("tools", ["no JSON", "{}", {"type": "function"}, ["a"], 3, '["a"]'])
def test_other_tools_are_refused_by_line(tools: object, write: Write) -> None:
    turns = [{"role": "user", "content": "x"}]
    source = write("jsonl", [{"messages": turns}, {"messages": turns, "tools": tools}])
    with pytest.raises(CorpusError, match=r"line 2: field 'tools': expected a list of objects.*rename"):
        list(Corpus.open(source).samples())


@pytest.mark.parametrize(
    "message", [{"role": "user"}, {"role": "user", "text": "x"}, {"role": "a", "tool_calls": None}]
)
def test_a_message_that_says_nothing_is_refused(message: dict[str, Any], write: Write) -> None:
    with pytest.raises(CorpusError, match=r"line 1: field 'messages', message 1: expected an object with a 'role'"):
        list(Corpus.open(write("jsonl", [{"messages": [message]}])).samples())


def test_files_of_a_folder_with_and_without_tools(tmp_path: Path) -> None:
    plain = [{"messages": [{"role": "user", "content": "x"}], "other": 1}]
    write_parquet(tmp_path / "a.parquet", plain)
    write_parquet(tmp_path / "b.parquet", [{**plain[0], "tools": [tool("f", x="string")]}])
    first, second = Corpus.open(str(tmp_path)).samples()
    assert isinstance(first.content, Messages)
    assert isinstance(second.content, Messages)
    assert (first.content.tools, second.content.tools) == (None, [tool("f", x="string")])
