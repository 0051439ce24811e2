"""Samples to tokens: texts, prompts with completions, conversations, and samples without anything."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ghoststore.corpus import Content, Messages, PromptCompletion, Sample
from ghoststore.errors import CorpusError
from ghoststore.store.part.status import Status
from indexer.encode.tokens import SAMPLES_AT_ONCE, Row, Tokenizer, TokenSettings, rows_of

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS = ["<s>", "<u>", "<user>", "<bot>", *NUMBERS]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"


@cache
def words(*, begins: bool = False) -> Any:
    """A token a word, an id by its place in WORDS; ``begins``: a text is begun with <s>."""
    fast = FastTokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<u>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<u>", bos_token="<s>")


def sample(place: int, content: Content | None) -> Sample:
    return Sample(place, f"id{place}", None, content, -1, 0)


def rows(tokenizer: Any, *contents: Content | None, max_length: int = 16) -> list[Row]:
    samples = [sample(place, content) for place, content in enumerate(contents)]
    return list(rows_of(samples, Tokenizer(tokenizer), TokenSettings(max_length=max_length)))


def texts(row: Row) -> tuple[list[str], list[str]]:
    """The words before the first target, and the targets."""
    found = [WORDS[token] for token in row.tokens]
    return found[: row.first_target], found[row.first_target :]


def test_a_text_is_predicted_from_its_second_token_on() -> None:
    (row,) = rows(words(), "one two three")
    assert texts(row) == (["one"], ["two", "three"])
    (row,) = rows(words(begins=True), "one two three")
    assert texts(row) == (["<s>"], ["one", "two", "three"])


def test_a_prompt_is_no_target() -> None:
    pair = PromptCompletion("one two three", " four five")
    (row,) = rows(words(), pair)
    assert texts(row) == (["one", "two", "three"], ["four", "five"])
    (row,) = rows(words(begins=True), pair)
    assert texts(row) == (["<s>", "one", "two", "three"], ["four", "five"])


def test_an_empty_prompt_and_an_empty_completion() -> None:
    row, none, both = rows(
        words(begins=True), PromptCompletion("", "one two"), PromptCompletion("one two", ""), PromptCompletion("", "")
    )
    assert texts(row) == (["<s>"], ["one", "two"])
    assert none.status is Status.NO_TARGETS
    assert both.status is Status.EMPTY
    row, none = rows(words(), PromptCompletion("", "one two"), PromptCompletion("one two", ""))
    assert texts(row) == (["one"], ["two"])
    assert none.status is Status.NO_TARGETS


def test_a_prompt_that_fills_the_row_leaves_no_target() -> None:
    (row,) = rows(words(), PromptCompletion("one two three four", " five"), max_length=4)
    assert row.status is Status.NO_TARGETS


@pytest.mark.parametrize("begins", [False, True])
def test_samples_without_anything_keep_their_place(begins: bool) -> None:
    found = rows(words(begins=begins), "one two", None, "", "one two three", None)
    assert [row.status for row in found] == [Status.OK, Status.EMPTY, Status.EMPTY, Status.OK, Status.EMPTY]
    assert [row.sample.source_row for row in found] == [0, 1, 2, 3, 4]
    assert [len(row.tokens) == 0 for row in found] == [False, True, True, False, True]
    found = rows(words(begins=begins), None, PromptCompletion("one", " two"), None)
    assert [row.status for row in found] == [Status.EMPTY, Status.OK, Status.EMPTY]


def test_one_token_is_too_short() -> None:
    assert rows(words(), "one")[0].status is Status.TOO_SHORT
    assert rows(words(), "   ")[0].status is Status.EMPTY


CONVERSATION = Messages([{"role": "user", "content": "one two"}, {"role": "bot", "content": "three"}])


def test_a_conversation_without_a_template_is_an_error_that_names_the_sample() -> None:
    with pytest.raises(CorpusError, match=r"'id1' is a list of messages.*chat template"):
        rows(words(), None, CONVERSATION)


def test_a_conversation_goes_through_the_template() -> None:
    tokenizer = words(begins=True)
    tokenizer.chat_template = TEMPLATE
    try:
        row, nothing = rows(tokenizer, CONVERSATION, None)
    finally:
        tokenizer.chat_template = None
    # The template writes its own special tokens: none is added.
    assert texts(row) == (["<user>"], ["one", "two", "<bot>", "three"])
    assert nothing.status is Status.EMPTY


@pytest.mark.parametrize("template", ["{{ raise_exception('no bots') }}", "{{ messages[0].content + 1 }}", "{% if %}"])
def test_a_template_that_refuses_names_the_sample(template: str) -> None:
    tokenizer = words()
    tokenizer.chat_template = template
    try:
        with pytest.raises(CorpusError, match="'id0': the chat template refuses"):
            rows(tokenizer, CONVERSATION)
    finally:
        tokenizer.chat_template = None


def test_order_and_tokens_do_not_depend_on_how_many_are_tokenized_at_once() -> None:
    contents = [" ".join(WORDS[4 + i % 10] for i in range(n % 13)) for n in range(2 * SAMPLES_AT_ONCE + 3)]
    together = rows(words(), *contents)
    assert [row.sample.source_row for row in together] == list(range(len(contents)))
    for row, content in zip(together, contents, strict=True):
        assert [WORDS[token] for token in row.tokens] == content.split()
