"""A prompt and its completion have the tokens of their whole text, and the completion is learnt whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from ghoststore.corpus import Messages, PromptCompletion, Sample
from ghoststore.errors import UsageError
from ghoststore.store.part.status import Status
from indexer.encode.tokens import Row, Tokenizer, TokenSettings, rows_of
from tests.support.tokenizers_of_all_kinds import KINDS, LOSSLESS, tokenizer_of

OUTER = {"<s>", "</s>"}
BYTE_LEVEL = "byte-level"


def row_of(tokenizer: Any, prompt: str, completion: str) -> Row:
    sample = Sample(0, "id", None, PromptCompletion(prompt, completion), -1, 0)
    (row,) = rows_of([sample], Tokenizer(tokenizer), TokenSettings(max_length=10_000))
    return row


def tokens(tokenizer: Any, row: Row) -> tuple[list[str], list[str]]:
    """The tokens before the first target, and the targets."""
    found = tokenizer.convert_ids_to_tokens(row.tokens.tolist())
    return found[: row.first_target], found[row.first_target :]


@pytest.mark.parametrize(
    ("kind", "prompt", "completion", "targets"),  # the targets' tokens, joined
    [
        ("metaspace first", "The old song:", " 42", "▁42</s>"),
        ("metaspace always", "The old song:", " 42", "▁42</s>"),
        ("metaspace, end alone", "the old", " song", "▁song</s>"),
        ("sentencepiece", "the old", " song", "▁song</s>"),
        ("byte-level, around", "the old", " song", "Ġsong</s>"),
        ("byte-level", "the old", " song", "Ġsong"),
        ("unigram", "the old", " 42", "▁42</s>"),
        ("word piece", "the old", " song", "song</s>"),
        # A token that spans the boundary counts to the completion.
        ("byte-level, trimmed", "the old ", "song", "Ġsong</s>"),
        ("word piece", "the old so", "ng", "song</s>"),
        ("metaspace never", "the so", "ng", "▁song</s>"),
        # A token that ends in spaces, which a post-processor leaves out of its offsets.
        ("byte-level, trimmed, whole lines", "The answer to the", " ", "toĠtheĠ</s>"),
        # Normalizers: letters replaced, removed, made of several.
        ("byte-level, replaced", "one Th", "e", "zzzzz"),
        ("byte-level, composed", "the e", "\u0301!", "ĠÃ©!</s>"),
        ("byte-level, no accents", "é", "x", "x"),
        ("byte-level, NFKC", "ﬁ", "ne", "ne</s>"),
        ("unigram", "the  ", "  ﬁ", "▁fi</s>"),
        # Tokens that take the spaces beside them.
        ("metaspace first", "one ", "<left>two", "<left>two</s>"),
        ("metaspace first", "one<right>", " two", "<right>two</s>"),
        ("metaspace always", "one<sep>", "two", "▁two</s>"),
        ("byte-level", "one<sep>", "two", "two"),
        # A character of several tokens.
        ("byte-level", "ü", "日!", "æĹ¥!"),
        ("metaspace never", "林", "東", "<0xE6><0x9D><0xB1></s>"),
    ],
)
def test_targets_are_the_tokens_of_the_completion(kind: str, prompt: str, completion: str, targets: str) -> None:
    tokenizer = tokenizer_of(kind)
    row = row_of(tokenizer, prompt, completion)
    assert row.tokens.tolist() == tokenizer(prompt + completion)["input_ids"]
    assert "".join(tokens(tokenizer, row)[1]) == targets
    assert row.status is Status.OK


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_on_one_side(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    nothing, both = row_of(tokenizer, "the old song", ""), row_of(tokenizer, "", "")
    assert nothing.status is Status.NO_TARGETS
    assert nothing.tokens.tolist() == tokenizer("the old song")["input_ids"]
    assert (both.status, len(both.tokens)) == (Status.EMPTY, 0)
    row = row_of(tokenizer, "", "the old song")
    before, _ = tokens(tokenizer, row)
    assert row.tokens.tolist() == tokenizer("the old song")["input_ids"]
    # The first token of all is never predicted; after one that the template put there, everything is.
    assert len(before) == 1
    assert before[0] == "<s>" or "<s>" not in tokens(tokenizer, row)[1]


def test_a_completion_that_leaves_no_token_leaves_no_target() -> None:
    """Spaces are no token's of BERT: the end that its template adds is not learnt alone."""
    assert row_of(tokenizer_of("word piece"), "the old song", "  ").status is Status.NO_TARGETS


PIECES = st.sampled_from(
    [
        " ",
        "  ",
        "the",
        " old",
        "song",
        "The",
        "answer",
        ".",
        "\n",
        "é",
        "e\u0301",
        "ß",
        "日",
        "本語",
        "ﬁ",
        "½",
        "İ",
        "42",
        "\u200b",
        "🎻",
        "!",
        "x y",
        "\t",
    ]
)
TEXTS = st.lists(PIECES, max_size=6).map("".join) | st.text(
    st.characters(exclude_categories=["Cs", "Mn", "Cc"]), max_size=8
)
MARKED = st.lists(PIECES | st.sampled_from(["<sep>", "<left>", "<right>"]), max_size=6).map("".join)
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.thin(6)
@pytest.mark.parametrize("kind", KINDS)
@given(prompt=TEXTS | MARKED, completion=TEXTS | MARKED)
@SETTINGS
def test_tokens_are_those_of_the_whole_text(kind: str, prompt: str, completion: str) -> None:
    tokenizer = tokenizer_of(kind)
    row = row_of(tokenizer, prompt, completion)
    whole = tokenizer(prompt + completion)["input_ids"]
    assert row.tokens.tolist() == (whole if prompt + completion else [])
    before, targets = tokens(tokenizer, row)
    if row.status is Status.OK:
        assert "</s>" not in before
        assert "<s>" not in targets


@pytest.mark.thin(4)
@pytest.mark.parametrize("kind", LOSSLESS)
@given(prompt=TEXTS, completion=TEXTS)
@SETTINGS
def test_every_byte_of_the_completion_is_learnt_and_no_token_of_the_prompt(
    kind: str, prompt: str, completion: str
) -> None:
    """Bytes of tokens, counted: the first target is the first token that reaches beyond the bytes of the prompt."""
    prompt, completion = prompt.replace("▁", "_"), completion.replace("▁", "_")
    tokenizer = tokenizer_of(kind)
    row = row_of(tokenizer, prompt, completion)
    pieces = [bytes_of(kind, token) for token in tokenizer.convert_ids_to_tokens(row.tokens.tolist())]
    prefix = sum(map(len, pieces)) - len((prompt + completion).encode())
    assert prefix in (0, 1) or not row.tokens.size
    assert b"".join(pieces)[max(prefix, 0) :].decode() == (prompt + completion if row.tokens.size else "")
    if not completion:
        assert row.status in (Status.NO_TARGETS, Status.EMPTY, Status.TOO_SHORT)
        return
    reached, expected = -prefix, 0
    for place, piece in enumerate(pieces):
        reached += len(piece)
        if piece and (reached > len(prompt.encode()) or not prompt):
            expected = place
            break
    assert row.first_target == max(1, expected)


def bytes_of(kind: str, token: str) -> bytes:
    """The bytes of the text that ``token`` stands for; none for a token of the template."""
    if token in OUTER:
        return b""
    if kind.startswith(BYTE_LEVEL):
        return bytes(ALPHABET[letter] for letter in token)
    if token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others are counted up from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


ALPHABET = _alphabet()


def test_a_tokenizer_without_offsets_is_refused_for_prompts_alone() -> None:
    tokenizer = Tokenizer(ByT5Tokenizer())
    pair = Sample(3, "id3", None, PromptCompletion("a", "b"), -1, 0)
    for refused in (lambda: tokenizer.encode([pair]), lambda: tokenizer.check(pair)):
        with pytest.raises(UsageError, match=r"prompts with completions.*ByT5Tokenizer.*tokenizer\.json"):
            refused()
    text = Sample(0, "id0", None, "ab", -1, 0)
    tokenizer.check(text)
    ((ids, first),) = tokenizer.encode([text])
    assert (ids.tolist(), first) == (ByT5Tokenizer()("ab")["input_ids"], 1)


@pytest.mark.parametrize("kind", ["metaspace first", "byte-level, around", "unigram"])
def test_turns_are_one_text_to_which_nothing_is_added(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    turns: list[dict[str, object]] = [{"role": "user", "content": "the old"}, {"role": "bot", "content": " song"}]
    try:
        ((ids, first),) = Tokenizer(tokenizer).encode([Sample(0, "0", None, Messages(turns), -1, 0)])
        direct = tokenizer.apply_chat_template(turns, return_dict=False)
    finally:
        tokenizer.chat_template = None
    assert ids.tolist() == tokenizer("<s>user: the old</s>bot:  song</s>", add_special_tokens=False)["input_ids"]
    assert (ids.tolist(), first) == (direct, 1)
