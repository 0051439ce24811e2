"""Do training-time scores predict what leaving one block out of its step does? (TSLOO, as dattri-llm's report has it.)

512 blocks of 128 tokens, 16 steps of 32, one pass. 50 times one block is left out of its step and the rest of the
training is made anew; how the loss of each val sample changes is compared with the block's score against it.

Legend: V val samples, B blocks of a step, N blocks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import Results, Table, folders, machine_facts, read_texts
from numpy.typing import NDArray
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from ghoststore import GradDotProdEngine, ProjectionConfig
from indexer.encode.losses import next_token_losses
from query.common.rank_correlation import spearman
from query.demo.tokenizer import train_tokenizer

VOCABULARY, LENGTH, BLOCKS, STEPS, REMOVED, VAL = 2048, 128, 512, 16, 50, 40
SIZE = BLOCKS // STEPS


@dataclass(frozen=True, slots=True)
class Trained:
    """Weights and the optimizer's state before every step, and the val losses at the end."""

    states: list[tuple[dict[str, Tensor], dict[str, Any]]]
    losses_V: NDArray[np.float64]


class Bench:
    """The blocks, the val samples and the model that training begins with."""

    def __init__(self, data: Path, val_set: Path, warmup: int, optimizer: str, rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        tokenizer = train_tokenizer(read_texts(data), VOCABULARY)
        stream = [token for text in read_texts(data) for token in tokenizer(text, verbose=False)["input_ids"]]
        blocks = torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)
        blocks = blocks[torch.randperm(len(blocks))]
        self.warm_NT, self.blocks_NT = blocks[BLOCKS:], blocks[:BLOCKS]
        texts = [json.loads(line)["text"] for line in val_set.read_text().splitlines()]
        rows = [tokenizer(text, verbose=False)["input_ids"][:LENGTH] for text in texts[:: max(1, len(texts) // VAL)]]
        rows = [row for row in rows if len(row) > 1][:VAL]
        self.val_VT = torch.zeros(len(rows), LENGTH, dtype=torch.int64)
        self.labels_VT = torch.full((len(rows), LENGTH), -100)
        for place, row in enumerate(rows):
            self.val_VT[place, : len(row)] = self.labels_VT[place, : len(row)] = torch.tensor(row)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=LENGTH, n_layer=3, n_embd=96, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config)
        self.optimizer, self.rate = optimizer, rate
        self._warm(warmup)
        self.first = {name: value.clone() for name, value in self.model.state_dict().items()}

    def _warm(self, steps: int) -> None:
        """Some steps on other blocks."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        for step in range(steps):
            places = torch.arange(step * SIZE, (step + 1) * SIZE) % len(self.warm_NT)
            self._loss(self.warm_NT[places], torch.ones(SIZE)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._moments = _copied(optimizer.state_dict())

    def _loss(self, ids_BT: Tensor, weights_B: Tensor) -> Tensor:
        """Σ w·ℓ ÷ B: what is left out of a step changes nothing else of it."""
        logits = self.model(input_ids=ids_BT).logits
        losses_B, _ = next_token_losses(logits, ids_BT)
        return (losses_B * weights_B).sum() / len(weights_B)

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Of the training that is looked at: AdamW goes on with the moments of the steps before."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.model.parameters(), lr=self.rate)
        optimizer = torch.optim.AdamW(self.model.parameters())
        optimizer.load_state_dict(_copied(self._moments))
        optimizer.param_groups[0]["lr"] = self.rate
        return optimizer

    def val_losses(self) -> NDArray[np.float64]:
        """(V,)."""
        with torch.no_grad():
            losses_V, _ = next_token_losses(self.model(input_ids=self.val_VT).logits, self.labels_VT)
        return losses_V.double().numpy()

    def train(self, removed: int | None = None, base: Trained | None = None) -> Trained:
        """The training, or the part of it that is another without block ``removed``."""
        optimizer, states, start = self.new_optimizer(), [], 0
        if base is None or removed is None:
            self.model.load_state_dict(self.first)
        else:
            start = removed // SIZE
            weights, state = base.states[start]
            self.model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        for step in range(start, STEPS):
            if removed is None:
                weights = {name: value.clone() for name, value in self.model.state_dict().items()}
                states.append((weights, _copied(optimizer.state_dict())))
            weights_B = torch.ones(SIZE)
            if removed is not None and removed // SIZE == step:
                weights_B[removed % SIZE] = 0.0
            self._loss(self.blocks_NT[step * SIZE : (step + 1) * SIZE], weights_B).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return Trained(states, self.val_losses())

    def scores(self, **options: Any) -> NDArray[np.float64]:
        """(V, N): of the training by one kind of engine, not weighted."""
        self.model.load_state_dict(self.first)
        optimizer = self.new_optimizer()
        val = {"input_ids": self.val_VT, "labels": self.labels_VT}
        columns = []
        with GradDotProdEngine(self.model, val, optimizer=optimizer, groups="each", **options) as engine:
            for step in range(STEPS):
                ids_BT = self.blocks_NT[step * SIZE : (step + 1) * SIZE]
                engine.prepare(SIZE, tokens=ids_BT.numel())
                loss = self._loss(ids_BT, torch.ones(SIZE))
                engine.watch(loss, labels=ids_BT)
                loss.backward()
                columns.append(engine.collect().groups.t().numpy())
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return np.concatenate(columns, axis=1)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    moments = {key: {name: value.clone() for name, value in of.items()} for key, of in state["state"].items()}
    return {"state": moments, "param_groups": state["param_groups"]}


def weighted(scores_VN: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    """Scores by step and val sample, each divided by their mean size there for ``unit``."""
    if kind == "plain":
        return np.nan_to_num(scores_VN)
    steps = scores_VN.reshape(len(scores_VN), STEPS, SIZE)
    return np.nan_to_num(steps / np.abs(steps).mean(2, keepdims=True)).reshape(scores_VN.shape)


KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, val gradient every 4": {"val_refresh_interval": 4},
    "exact, val gradient every 16": {"val_refresh_interval": 16},
    "exact, linears of the blocks": {"score_layers": "blocks"},
    "the same in Adam's metric": {"score_layers": "blocks", "score_metric": "adam"},
    "sketched, 64 a layer": {"projection": ProjectionConfig()},
    "sketched, 1,024 a layer": {"projection": ProjectionConfig(rank_total=1024)},
}


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="jsonl of text.")
@click.option("--val-set", type=click.Path(exists=True, path_type=Path), required=True, help="The same.")
@click.option("--warmup", type=int, default=150, show_default=True, help="Steps before, on other blocks.")
@folders
def main(data: Path, val_set: Path, warmup: int, scratch: Path | None, out: Path) -> None:
    """Correlate scores with what leaving out one block at a time does."""
    rows, numbers = [], {}
    for optimizer, rate in (("sgd", 1e-2), ("adamw", 1e-4), ("adamw", 1e-3)):
        bench = Bench(data, val_set, warmup, optimizer, rate, seed=0)
        base = bench.train()
        removed = np.sort(np.random.default_rng(0).permutation(BLOCKS)[:REMOVED])
        changes_VR = np.stack([bench.train(int(block), base).losses_V - base.losses_V for block in removed], axis=1)
        for label, options in KINDS.items():
            if options.get("score_metric") == "adam" and optimizer == "sgd":
                continue
            scores_VN = bench.scores(**options)
            row = {"optimizer": f"{optimizer}, {rate:g}", "score": label}
            for kind in ("plain", "unit"):
                each_V = spearman(weighted(scores_VN, kind)[:, removed], changes_VR)
                error = each_V.std(ddof=1) / np.sqrt(len(each_V))
                row[kind] = f"{each_V.mean():.3f} ± {error:.3f}"
                numbers[f"{optimizer}|{rate:g}|{label}|{kind}"] = each_V.tolist()
            rows.append(row)
            click.echo(str(row), err=True)
    results = Results(
        name="leave-one-out",
        title="Training-time scores and what leaving out one block does",
        settings={"blocks": BLOCKS, "tokens": LENGTH, "steps": STEPS, "removed": REMOVED, "warmup": warmup},
        facts=machine_facts(),
    )
    note = (
        "Spearman's correlation, over the blocks that were left out one at a time, of a block's score and of how much "
        "the val loss rose without it; mean and standard error over val samples. `plain`: the scores as they are (the "
        "learning rate is constant). `unit`: each step's by their mean size."
    )
    results.add(Table("TSLOO", rows, note), correlations=numbers)
    results.write(out)


if __name__ == "__main__":
    main()
