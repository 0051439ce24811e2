"""Project the gradients of a small language model into a store, and ask it for similar samples.

python examples/ghost_gradproj_lm.py --proj-layers attn.c_attn,mlp.c_fc
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import ghoststore
from query.demo.tokenizer import train_tokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--proj-layers", default="mlp,attn")
parser.add_argument("--proj-rank-total", type=int, default=256)
args = parser.parse_args()

facts = [
    "the cat sleeps on the warm stone",
    "the river runs to the sea",
    "two and two make four",
    "rain falls from clouds",
]
texts = [f"{fact} {ending}" for fact in facts for ending in ("today", "again", "at night", "in spring", "as ever")]

with tempfile.TemporaryDirectory() as folder:
    root = Path(folder)
    tokenizer = train_tokenizer(texts, 300)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=48, n_layer=2, n_head=2))
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    for name, rows in (("train", texts), ("val", [facts[1]])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))

    report = ghoststore.build(
        checkpoint=root / "model",
        data=root / "train.jsonl",
        store=root / "store",
        projection=ghoststore.ProjectionConfig(
            layers=tuple(args.proj_layers.split(",")), rank_total=args.proj_rank_total
        ),
    )
    print(f"{report.rows} samples, {report.layers} layers, {report.dimension} numbers each")
    result = ghoststore.query(store=root / "store", val_set=root / "val.jsonl", metric="cosine", top_k=5)
    print(f"nearest to {facts[1]!r}:")
    for hit in result.results[0].hits:
        print(f"  {hit.rank}. cosine {hit.score:.3f}  {hit.text}")
