"""Rows of a training as its files say, and losses and gradients of single samples by plain autograd in float64: no
padding, no hook, the tokenizer's own tokens.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from ghoststore.corpus import Fields, open_corpus
from indexer.encode.tokens import Tokenizer
from indexer.training.validation import ValSet

if TYPE_CHECKING:
    from tests.support.trainings import Gym, Trained


@cache
def model_at(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def loss_of(model: Any, tokens: list[int], first_target: int) -> torch.Tensor:
    """Mean next-token loss over the targets of one sample."""
    logits = model(input_ids=torch.tensor([tokens])).logits[0]
    each = F.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")
    return each[first_target - 1 :].mean()


def gradient_of(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def tokens_of(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], int]:
    """(ids, first target) of a row of the corpus file."""
    if "prompt" in row:
        prompt = tokenizer(row["prompt"])["input_ids"]
        return prompt + tokenizer(row["completion"], add_special_tokens=False)["input_ids"], len(prompt)
    return tokenizer(row["text"])["input_ids"], 1


class Oracle:
    """The rows of a training, from the files that it was given."""

    def __init__(self, gym: Gym, trained: Trained, data: str, max_length: int) -> None:
        self.trained = trained
        self.tokenizer = AutoTokenizer.from_pretrained(gym.models["tiny"])
        rows = {row["id"]: row for row in map(json.loads, gym.data[data].read_text().splitlines())}
        self.rows: list[tuple[list[int], int]] = []
        columns = (trained.rows(column) for column in ("sample_id", "window_start", "n_tokens"))
        for name, start, length in zip(*columns, strict=True):
            tokens, first = tokens_of(self.tokenizer, rows[name])
            assert length == min(len(tokens) - start, max_length)
            self.rows.append((tokens[start : start + length], max(1, first - start)))
        val_rows = [json.loads(line) for line in gym.data[f"{data}-val"].read_text().splitlines()]
        self.val = [(*tokens_of(self.tokenizer, row), row["domain"]) for row in val_rows]
        self.val = [(tokens[:max_length], first, domain) for tokens, first, domain in self.val]
        self.val = [entry for entry in self.val if entry[1] < len(entry[0])]
        with open_corpus(str(gym.data[f"{data}-val"]), Fields()) as corpus:
            self.chooser = ValSet.read(corpus, Tokenizer(self.tokenizer), max_length, seed=0)
        assert len(self.chooser.rows) == len(self.val)

    def val_gradients(self, model: Any, places: list[int]) -> dict[str, dict[str, torch.Tensor]]:
        """Mean gradient of all chosen val samples (under ""), and of each domain's."""
        each = [(self.val[p][2], gradient_of(model, loss_of(model, *self.val[p][:2]))) for p in places]
        found = {}
        for group in ["", *{domain for domain, _ in each}]:
            some = [g for domain, g in each if group in ("", domain)]
            found[group] = {name: torch.stack([g[name] for g in some]).mean(0) for name in some[0]}
        return found
