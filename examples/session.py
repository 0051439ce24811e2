"""A session: texts, a model and a tokenizer in memory, questions one after another, and what answers can do.

python examples/session.py
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import ghoststore
from query.demo.tokenizer import train_tokenizer

facts = {
    "sleep": "the cat sleeps on the warm stone",
    "river": "the river runs to the sea",
    "sums": "two and two make four",
    "rain": "rain falls from clouds",
}
endings = ("today", "again", "at night", "in spring", "as ever")
rows = [
    {"id": f"{name}-{place}", "domain": name, "text": f"{fact} {ending}"}
    for name, fact in facts.items()
    for place, ending in enumerate(endings)
]
texts = [row["text"] for row in rows]

tokenizer = train_tokenizer(texts, 300)
torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=48, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for text in texts * 2:
    tokens = torch.tensor([tokenizer.encode(text)])
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

with tempfile.TemporaryDirectory() as folder:
    ghoststore.build(checkpoint=model, tokenizer=tokenizer, data=rows, store=folder, name="texts")
    with ghoststore.open(folder, checkpoint=model, tokenizer=tokenizer) as store:
        print(f"{len(store)} rows in part {store.name}")

        answer = store.query(["this river runs to the sea too"], top_k=3, bottom_k=1)
        unit = answer.settings["unit"]["name"]
        for hit in (*answer[0], *answer[0].bottom):
            print(f"  {hit.nats:+.3f} {unit}  {hit.text}")

        each = store.query([facts["sums"], facts["rain"]], each=True, top_k=1, where="domain <> 'river'")
        print(each.to_pandas()[["query", "nats", "id"]].to_string(index=False))

        vectors = store.vectors(where="domain = 'rain'")
        print(f"vectors of {len(vectors)} rows, {vectors.ids[0]} the first: {vectors.to_numpy().shape}")
