"""A training loop of accelerate with five lines added: mixed precision and accumulation work as they are.

python examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
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
rows = [{"place": place, "input_ids": ids} for place, ids in enumerate(train)]

accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=4, shuffle=True))

engine = GradDotProdEngine(model, (val, val), optimizer=optimizer).attach()  # 1
value = torch.zeros(len(train))
for epoch in range(3):
    for batch in loader:
        with accelerator.accumulate(model):
            ids = batch["input_ids"]
            engine.prepare(len(ids))  # 2
            loss = model(input_ids=ids, labels=ids).loss
            engine.watch(loss, labels=ids)  # 3
            accelerator.backward(loss)
            scores = engine.collect()  # 4
            optimizer.step()
            optimizer.zero_grad()
            value[batch["place"]] += scores.total.float()  # 5
    print(f"epoch {epoch}  loss {loss.item():.3f}")
print(f"mean score of rows that count: {value[:20].mean():+.4f}, of noise: {value[20:].mean():+.4f}")
