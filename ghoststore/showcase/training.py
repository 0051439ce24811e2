"""A training loop readable in one sitting: GPT-2, AdamW, warm-up and cosine, padded batches.

Shapes: B samples, T tokens of the longest sample in the batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ghoststore.checkpoint import quiet_transformers
from ghoststore.errors import CorpusError, UsageError

PEAK_LEARNING_RATE = 3e-3
WARMUP_SHARE = 0.05
WEIGHT_DECAY = 0.01
IGNORED = -100  # the label that the model's loss leaves out


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One finished step: ``step`` of ``steps`` (from 1) and the mean loss per token of its batch.

    ``tokens_per_second`` counts tokens without padding, since the first step began.
    """

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    learning_rate: float


def default_config(tokenizer: PreTrainedTokenizerFast, max_length: int) -> GPT2Config:
    """Four layers of width 128, four heads, no dropout: 0.94 million parameters at 1,024 tokens."""
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=max(128, max_length),
        n_layer=4,
        n_embd=128,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_model(
    rows: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    max_length: int,
    config: GPT2Config | None = None,
    device: str = "cpu",
    on_step: Callable[[StepReport], None] | None = None,
) -> GPT2LMHeadModel:
    """Train a new GPT-2 on the ``text`` of ``rows`` and return it in eval mode, on ``device``.

    Each sample is its text and the end-of-text token, cut at ``max_length`` tokens. Every epoch takes all
    rows once, in an order that follows from ``seed``, as do the initial weights; torch's own generators
    are left as they were. Labels are the input ids, -100 at padding: the model shifts them.
    Raises ``CorpusError`` for rows that cannot be trained on, ``UsageError`` for settings that do not fit.
    """
    config = config or default_config(tokenizer, max_length)
    _check_settings(config, tokenizer, steps=steps, batch_size=batch_size, max_length=max_length, device=device)
    samples = _tokenize(rows, tokenizer, max_length)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).to(device).train()
        model.loss_type = "ForCausalLM"  # what transformers takes anyway, after a warning
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY
        )
        batches = _batches(samples, batch_size, seed)
        began, tokens = time.perf_counter(), 0
        for step in range(1, steps + 1):
            batch = next(batches)
            input_ids_BT, labels_BT, mask_BT = (t.to(device) for t in _pad(batch, tokenizer.pad_token_id))
            learning_rate = _learning_rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            loss = model(input_ids=input_ids_BT, attention_mask=mask_BT, labels=labels_BT).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            tokens += sum(len(sample) for sample in batch)
            if on_step is not None:
                on_step(
                    StepReport(
                        step=step,
                        steps=steps,
                        loss=loss.item(),
                        tokens_per_second=tokens / (time.perf_counter() - began),
                        learning_rate=learning_rate,
                    )
                )
    return model.eval()


def save_checkpoint(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Write model and tokenizer into one folder that ``from_pretrained`` opens, made if missing."""
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_settings(
    config: GPT2Config,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    batch_size: int,
    max_length: int,
    device: str,
) -> None:
    if steps < 1 or batch_size < 1 or max_length < 2:
        raise UsageError(
            "steps and batch_size must be at least 1 and max_length at least 2; "
            f"found {steps}, {batch_size} and {max_length}"
        )
    if config.n_positions < max_length:
        raise UsageError(f"max_length {max_length} is more than the model's {config.n_positions} positions")
    if config.vocab_size < len(tokenizer):
        raise UsageError(f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {config.vocab_size}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device!r} asked for, but torch finds no CUDA device; use device='cpu'")


def _tokenize(
    rows: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[list[int]]:
    if not rows:
        raise CorpusError("no rows to train on; at least one is needed")
    samples: list[list[int]] = []
    for place, row in enumerate(rows):
        if not row.get("text"):
            raise CorpusError(f"row {place} (id {row.get('id')!r}) has no text to train on")
        samples.append((tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id])[:max_length])
    return samples


def _batches(samples: list[list[int]], batch_size: int, seed: int) -> Iterator[list[list[int]]]:
    """Batches without end; each epoch is a new permutation, whose last batch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(samples), generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            yield [samples[i] for i in order[start : start + batch_size]]


def _pad(batch: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, labels and attention mask (B, T), padded on the right; the end-of-text token counts."""
    lengths_B = torch.tensor([len(sample) for sample in batch])
    mask_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
    input_ids_BT = torch.full(mask_BT.shape, pad_id)
    input_ids_BT[mask_BT] = torch.tensor([token for sample in batch for token in sample])
    return input_ids_BT, input_ids_BT.masked_fill(~mask_BT, IGNORED), mask_BT.long()


def _learning_rate(step: int, steps: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to a tenth of it; steps count from 1."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step <= warmup:
        return PEAK_LEARNING_RATE * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return PEAK_LEARNING_RATE * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
