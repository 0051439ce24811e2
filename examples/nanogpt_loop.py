"""A loop in the manner of nanoGPT, with its kind of model and memory-mapped tokens, and five lines added.

python examples/nanogpt_loop.py
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ghoststore import GradDotProdEngine

VOCABULARY, BLOCK, WIDTH = 50, 16, 32


class LayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = LayerNorm(WIDTH), LayerNorm(WIDTH)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.c_fc, self.out = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).flatten(-2))
        return x + self.out(F.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.h, self.ln_f = nn.ModuleList([Block(), Block()]), LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def write(path: Path, noise: int) -> np.memmap:
    """Tokens as nanoGPT's `prepare.py` writes them: 2,000 that count upwards, and then noise."""
    generator = np.random.default_rng(0)
    tokens = np.concatenate([np.arange(2000) % VOCABULARY, generator.integers(0, VOCABULARY, noise)])
    tokens.astype(np.uint16).tofile(path)
    return np.memmap(path, dtype=np.uint16, mode="r")


def blocks(data: np.memmap, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.stack([torch.from_numpy(data[i : i + BLOCK + 1].astype(np.int64)) for i in starts.tolist()])
    return tokens[:, :-1], tokens[:, 1:]


torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())
data, val = write(folder / "train.bin", 2000), write(folder / "val.bin", 0)
model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

engine = GradDotProdEngine(model, blocks(val, torch.arange(0, 400, 50)), optimizer=optimizer).attach()  # 1
value: dict[bool, list[float]] = {True: [], False: []}
for step in range(30):
    starts = torch.randint(len(data) - BLOCK, (8,))
    x, y = blocks(data, starts)
    engine.prepare(len(x))  # 2
    logits, loss = model(x, y)
    engine.watch(loss, batch=(x, y))  # 3
    loss.backward()
    scores = engine.collect().total  # 4
    optimizer.step()
    optimizer.zero_grad()
    for start, score in zip(starts.tolist(), scores.tolist(), strict=True):
        value[start < 2000].append(score)  # 5
    print(f"step {step:2}  loss {loss.item():.3f}  scores {' '.join(f'{s:+.2f}' for s in scores.tolist())}")
means = {counts: sum(scores) / len(scores) for counts, scores in value.items()}
print(f"mean score of blocks that count: {means[True]:+.4f}, of noise: {means[False]:+.4f}")
