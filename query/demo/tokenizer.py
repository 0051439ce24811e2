"""A byte-level BPE tokenizer, trained on given texts."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ghoststore.errors import UsageError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte, and END_OF_TEXT


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A tokenizer of at most ``vocab_size`` tokens that can encode any text and adds no special tokens to it.

    ``<|endoftext|>`` is id 0 and serves as end, begin, padding and unknown token. ``save_pretrained`` and
    ``AutoTokenizer.from_pretrained`` give the same tokenizer back. Few texts give fewer tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(f"`vocab_size` must be at least {SMALLEST_VOCABULARY}, not {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        # Not GPT2TokenizerFast(vocab_file=…): transformers 5 ignores the files and gives one token.
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
