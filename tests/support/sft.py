"""TRL's SFTTrainer on small texts: what its tests share. Import it after ``pytest.importorskip("trl")``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tests.support.models import VOCABULARY, Example

TEMPLATE = (
    "{% for turn in messages %}{% if turn['role'] == 'assistant' %}w1 {% generation %}{{ turn['content'] }} w2"
    "{% endgeneration %}{% else %}w3 {{ turn['content'] }} w4 {% endif %} {% endfor %}"
)
"""A chat: w3 and w4 around what the user says, w1 before the assistant's turn and w2 after it."""


def tokenizer() -> Any:
    """Words w0 to w98, one token each."""
    words = {**{f"w{i}": i for i in range(VOCABULARY - 2)}, "<pad>": VOCABULARY - 2, "<eos>": VOCABULARY - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "w0"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **tokens)


def _texts(lengths: Sequence[int], seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(5, VOCABULARY - 2, (length,), generator=generator).tolist() for length in lengths)
    return [" ".join(f"w{token}" for token in tokens) for tokens in draws]


LENGTHS = (5, 9, 7, 12, 6, 8, 11, 4, 10, 5, 7, 9, 3, 14)
TEXTS = _texts(LENGTHS, 0)


def texts(**columns: Any) -> Dataset:
    return Dataset.from_dict({"text": TEXTS, **columns})


def completions() -> Dataset:
    return Dataset.from_dict({"prompt": [f"{text} " for text in _texts((3, 5, 2, 7) * 3, 1)], "completion": TEXTS[:12]})


def chats() -> Dataset:
    turns = zip(_texts((3, 5, 2, 6) * 3, 2), TEXTS, strict=False)
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
            for asked, answer in turns
        ]
    )


def config(folder: Path, **settings: Any) -> SFTConfig:
    given: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 50,
        "max_length": 32,
        "seed": 3,
    }
    return SFTConfig(output_dir=str(folder / "out"), **{**given, **settings})


def trainer_of(folder: Path, model: Any, rows: Dataset, callbacks: list[Any], **settings: Any) -> Any:
    own = {key: settings.pop(key) for key in ("peft_config",) if key in settings}
    torch.manual_seed(0)
    return SFTTrainer(
        model=model,
        args=config(folder, **settings),
        train_dataset=rows,
        processing_class=tokenizer(),
        callbacks=callbacks,
        **own,
    )


def samples_of(dataset: Dataset) -> list[Example]:
    """The samples that a trainer's prepared dataset holds, those of packed rows one after another."""
    found = []
    for row in dataset.with_format(None):
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        lengths = row.get("seq_lengths") or [len(ids)]
        found += list(zip(ids.split(lengths), labels.split(lengths), strict=True))
    return found
