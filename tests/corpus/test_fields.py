"""Which field is which, and what a row becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ghoststore.corpus import Corpus, Fields, Messages, PromptCompletion, ResolvedFields, Sample
from ghoststore.corpus.fields import resolve
from ghoststore.errors import CorpusError, UsageError
from tests.support.corpora import FORMS, Write

WHERE = "data.jsonl, line 1"


@pytest.mark.parametrize(
    ("fields", "row", "expected"),
    [
        ({}, ["text", "prompt", "completion", "messages"], {"kind": "text", "text": "text"}),
        (
            {},
            ["prompt", "completion", "messages", "id"],
            {"kind": "prompt-completion", "prompt": "prompt", "completion": "completion", "id": "id"},
        ),
        ({}, ["messages", "domain"], {"kind": "messages", "messages": "messages", "domain": "domain"}),
        ({"text": "body"}, ["text", "body"], {"kind": "text", "text": "body"}),
        (
            {"prompt": "q", "completion": "a", "id": "key", "domain": "source"},
            ["text", "q", "a", "key", "id", "source"],
            {"kind": "prompt-completion", "prompt": "q", "completion": "a", "id": "key", "domain": "source"},
        ),
        ({"text": ""}, ["text", ""], {"kind": "text", "text": ""}),
        ({"id": "key"}, ["text", "key"], {"kind": "text", "text": "text", "id": "key"}),
    ],
)
def test_resolution(fields: dict[str, str], row: list[str], expected: dict[str, Any]) -> None:
    resolved = resolve(Fields(**fields), dict.fromkeys(row), WHERE)
    assert resolved == ResolvedFields(**expected)
    assert ResolvedFields.from_json(json.loads(json.dumps(resolved.to_json()))) == resolved


@pytest.mark.parametrize("role", ["text", "messages", "id", "domain"])
def test_given_field_must_exist(role: str) -> None:
    with pytest.raises(CorpusError, match=rf"{WHERE}: no field 'body' \(from `fields.{role}`\).*'text', 'x'"):
        resolve(Fields(**{role: "body"}), {"text": "", "x": 1}, WHERE)


@pytest.mark.parametrize("row", [{"body": ""}, {"prompt": ""}, {}])
def test_no_content_field(row: dict[str, object]) -> None:
    with pytest.raises(CorpusError) as caught:
        resolve(Fields(), row, WHERE)
    for part in (WHERE, "`fields.text`", "`fields.prompt`", "`fields.completion`", "`fields.messages`", *row):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "p"},
        {"completion": "c"},
        {"text": "t", "messages": "m"},
        {"text": "t", "prompt": "p", "completion": "c"},
        {"messages": "m", "prompt": "p", "completion": "c"},
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="`fields"):
        Fields(**fields)


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"kind": "text"},
        {**ResolvedFields(kind="text", text="t").to_json(), "kind": "code"},
        {**ResolvedFields(kind="text", text="t").to_json(), "text": None},
        {**ResolvedFields(kind="text", text="t").to_json(), "messages": "m"},
        {**ResolvedFields(kind="text", text="t").to_json(), "id": 3},
    ],
)
def test_manifest_with_other_fields_is_refused(value: Any) -> None:
    with pytest.raises(UsageError):
        ResolvedFields.from_json(value)


def sample_of(row: dict[str, object], **fields: str) -> Sample:
    return resolve(Fields(**fields), row, WHERE).sample(row, source_row=7, file=0, offset=-1)


def test_ids_and_domains() -> None:
    assert sample_of({"text": "t", "id": 12345678901234567890}).id == "12345678901234567890"
    assert sample_of({"text": "t", "id": "a"}).id == "a"
    assert sample_of({"text": "t"}).id == "7"
    assert sample_of({"text": "t", "domain": None}).domain is None
    assert sample_of({"text": "t", "domain": ""}).domain == ""
    assert sample_of({"text": "t", "domain": 3}).domain == "3"


def test_content_and_previews() -> None:
    pair = sample_of({"prompt": "1+1=", "completion": "2"})
    assert pair.content == PromptCompletion("1+1=", "2")
    assert pair.preview() == "1+1=2"
    turns: list[dict[str, object]] = [
        {"role": "user", "content": "hi", "extra": [1]},
        {"role": "assistant", "content": None},
    ]
    chat = sample_of({"messages": turns})
    assert chat.content == Messages(turns)
    assert chat.preview() == 'user: hi {"extra":[1]}\nassistant: '
    assert sample_of({"text": "whole"}).preview() == "whole"
    assert sample_of({"text": None}).preview() == ""


@pytest.mark.parametrize("row", [{"text": None}, {"prompt": None, "completion": "x"}, {"messages": None}])
def test_null_content_keeps_its_row(row: dict[str, object]) -> None:
    assert sample_of(row).content is None


def test_canonical_bytes_are_fixed() -> None:
    sample = sample_of({"domain": "d", "text": "ü", "id": 1, "other": 2})
    assert sample.canonical() == '{"content":"ü","domain":"d","id":"1"}'.encode()
    pair = sample_of({"prompt": "p", "completion": "c"})
    assert pair.canonical() == b'{"content":{"completion":"c","prompt":"p"},"domain":null,"id":"7"}'
    chat = sample_of({"messages": [{"role": "u", "content": "x"}]})
    assert chat.canonical() == b'{"content":{"messages":[{"content":"x","role":"u"}]},"domain":null,"id":"7"}'
    assert sample.digest() != pair.digest()
    assert 0 <= sample.digest() < 1 << 64


@pytest.mark.parametrize("form", [form for form in FORMS if "csv" not in form and form != "tsv"])
def test_structured_content_in_every_form(form: str, write: Write) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    chats = list(Corpus.open(write(form, [{"messages": turns, "id": i} for i in range(4)])).samples())
    assert [chat.content for chat in chats] == [Messages(turns)] * 4
    assert [chat.id for chat in chats] == list("0123")


@pytest.mark.parametrize("form", FORMS)
def test_prompts_in_every_form(form: str, write: Write) -> None:
    rows = [{"q": f"{i}?", "a": f"{i}!"} for i in range(4)]
    corpus = Corpus.open(write(form, rows), Fields(prompt="q", completion="a"))
    assert [s.content for s in corpus.samples()] == [PromptCompletion(r["q"], r["a"]) for r in rows]


def test_import_is_light() -> None:
    import subprocess
    import sys

    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow'}"
    code = f"import sys, ghoststore.corpus; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
