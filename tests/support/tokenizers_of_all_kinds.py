"""Small tokenizers of every kind that the tokenizers library has, learned from a few sentences."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "the old song of the river is sung by the old man: one two three 42",
    "a cat and a dog saw the moon over the red stone, é ü ß 日本 ﬁne",
    "The answer to the question is the answer, and  that is all.  ",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]
AROUND = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
ONLY_END = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])


def byte_level(
    *, trim: bool | None = None, prefix: bool = False, regex: bool = True, template: Any = None, normalizer: Any = None
) -> Tokenizer:
    """As GPT-2; ``trim`` None is without a post-processor of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    if normalizer is not None:
        bpe.normalizer = normalizer
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _learn(bpe, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL))
    steps = [step for step in (None if trim is None else processors.ByteLevel(trim_offsets=trim), template) if step]
    if steps:
        bpe.post_processor = processors.Sequence(steps)
    return bpe


def metaspace(scheme: str, template: Any = AROUND) -> Tokenizer:
    """As Llama: spaces are a letter, one more may be put before the text; bytes for what is unknown."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    bpe.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme), decoders.Fuse()]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    _learn(bpe, trainers.BpeTrainer(vocab_size=420, special_tokens=[*SPECIAL, *bytes_]))
    bpe.post_processor = template
    return bpe


def sentencepiece() -> Tokenizer:
    """As SentencePiece models come out of a conversion: the space is put before the text by a normalizer."""
    bpe = metaspace("never")
    bpe.pre_tokenizer = None
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return bpe


def unigram() -> Tokenizer:
    """As T5: runs of spaces are one, compatible letters are replaced."""
    found = Tokenizer(models.Unigram())
    found.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    found.decoder = decoders.Metaspace(prepend_scheme="always")
    _learn(found, trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>"))
    found.post_processor = ONLY_END
    return found


def word_piece() -> Tokenizer:
    """As BERT, uncased: spaces and accents are no token's."""
    found = Tokenizer(models.WordPiece(unk_token="<unk>"))
    found.normalizer = normalizers.BertNormalizer()
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    _learn(found, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    found.post_processor = AROUND
    return found


def _learn(tokenizer: Tokenizer, trainer: Any) -> None:
    trainer.show_progress = False
    tokenizer.train_from_iterator(SENTENCES, trainer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, around": lambda: byte_level(trim=False, template=AROUND),
    "byte-level, trimmed": lambda: byte_level(trim=True, template=AROUND),
    "byte-level, trimmed, whole lines": lambda: byte_level(trim=True, regex=False, template=ONLY_END),
    "byte-level, prefix": lambda: byte_level(trim=True, prefix=True, template=ONLY_END),
    "byte-level, composed": lambda: byte_level(normalizer=normalizers.NFC(), template=AROUND),
    "byte-level, NFKC": lambda: byte_level(normalizer=normalizers.NFKC(), template=ONLY_END),
    "byte-level, lower": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "byte-level, replaced": lambda: byte_level(normalizer=normalizers.Replace("The", "zzzzz")),
    "byte-level, shortened": lambda: byte_level(normalizer=normalizers.Replace("answer", "x")),
    "byte-level, no accents": lambda: byte_level(
        normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "metaspace never": lambda: metaspace("never"),
    "metaspace, end alone": lambda: metaspace("first", ONLY_END),
    "sentencepiece": sentencepiece,
    "unigram": unigram,
    "word piece": word_piece,
}
LOSSLESS = [
    "byte-level",
    "byte-level, around",
    "byte-level, trimmed",
    "byte-level, trimmed, whole lines",
    "metaspace first",
    "metaspace always",
    "metaspace never",
    "metaspace, end alone",
    "sentencepiece",
]
"""Kinds that give every character of a text back."""


@cache
def tokenizer_of(kind: str) -> Any:
    """A tokenizer of ``kind`` as transformers wraps it, with added tokens that take the spaces before or after them."""
    fast = KINDS[kind]()
    fast.add_tokens([AddedToken("<sep>"), AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
