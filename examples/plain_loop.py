"""A plain training loop of a language model with five lines added.

python examples/plain_loop.py
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ghoststore import GradDotProdEngine

torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
train = torch.arange(40)[:, None] + torch.arange(16)  # rows count upwards …
train[20:] = torch.randint(0, 50, (20, 16))  # … except for the second half, which is noise
train %= 50
val = (torch.arange(8)[:, None] * 5 + torch.arange(16)) % 50

engine = GradDotProdEngine(model, (val, val), optimizer=optimizer).attach()  # 1
value = torch.zeros(len(train))
for step in range(20):
    rows = torch.randperm(len(train))[:8]
    batch = train[rows]
    engine.prepare(len(batch))  # 2
    loss = model(input_ids=batch, labels=batch).loss
    engine.watch(loss, labels=batch)  # 3
    loss.backward()
    scores = engine.collect()  # 4
    optimizer.step()
    optimizer.zero_grad()
    value[rows] += optimizer.param_groups[0]["lr"] * scores.total.float()  # 5
    print(f"step {step:2}  loss {loss.item():.3f}  scores {' '.join(f'{s:+.2f}' for s in scores.total.tolist())}")
print(f"mean value of rows that count: {value[:20].mean():+.4f}, of noise: {value[20:].mean():+.4f}")
