"""Writes the frozen store of format 1 that all later versions must open: ``python make_format1.py FOLDER``.

``FOLDER`` gets a tiny GPT-2 with its tokenizer, a corpus and a val set, token shards of the corpus, a store with two
parts and a training run, and ``expected.json``: what ``tests/store/test_format1.py`` reads out of it again. It is run
once, when the format is frozen, and stays to say what the frozen files are of. The same bytes come out each time on one
machine: its clocks are counters, and everything is made under one path, which the manifests name.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import ghoststore
from tests.support.frozen import decoded, digest

MADE = Path(tempfile.gettempdir()) / "ghoststore-format1"
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sun",
    "moon",
    "river",
    "stone",
    "bird",
    "tree",
    "old",
    "new",
    "runs",
    "sees",
    "over",
]


class Clock(threading.local):
    """Seconds are stored, too: each thread has a clock of its own, which goes on by 1/64 s when it is looked at."""

    looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return self.looks / 64


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of two domains, of 3 to 9 words."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(count)]
    return [{"id": f"row-{i}", "text": text, "domain": ("sky", "earth")[i % 2]} for i, text in enumerate(texts)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_model(folder: Path) -> None:
    """A GPT-2 of a few thousand weights, whose tokens are words."""
    vocabulary = {word: number for number, word in enumerate(["<end>", "<unknown>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unknown>")
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=16,
        n_embd=8,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make(folder: Path) -> None:
    """Everything but ``expected.json``."""
    rows = make_rows(12, seed=1)
    rows[5]["text"] = ""  # keeps its place, and has no vector
    rows[7]["id"] = "row-6"  # ids are not unique
    write_jsonl(folder / "corpus.jsonl", rows)
    write_jsonl(folder / "val.jsonl", make_rows(3, seed=2))
    save_model(folder / "model")
    given: dict[str, Any] = {"checkpoint": folder / "model", "data": folder / "corpus.jsonl", "device": "cpu"}
    store = folder / "store"
    plain = ghoststore.ProjectionConfig(rank_total=16, precondition="none")
    ghoststore.build(
        **given, store=store, name="plain", projection=plain, proj_dtype="float32", span_rows=5, store_text=True
    )
    # The default projection, learned from the corpus; codes of 8 bits; long samples cut into windows.
    learned = ghoststore.ProjectionConfig(compress=16)
    ghoststore.build(
        **given, store=store, name="learned", projection=learned, proj_dtype="int8", max_length=6, overlong="window"
    )
    ghoststore.tokenize(
        data=folder / "corpus.jsonl", tokenizer=folder / "model", out=folder / "shards", shard_samples=5, workers=1
    )
    ghoststore.train(
        data=folder / "shards",
        val_set=folder / "val.jsonl",
        store=store,
        name="run",
        output_dir=folder / "checkpoints",
        checkpoint=folder / "model",
        device="cpu",
        batch_size=3,
        max_steps=5,
        dot_prod_save_interval=2,
    )
    shutil.rmtree(folder / "checkpoints")


def expected(folder: Path) -> dict[str, Any]:
    """What the test reads again."""
    store = ghoststore.Store.open(folder / "store")
    shards = ghoststore.TokenShards.open(folder / "shards")
    run = store.run("run")
    top = ghoststore.scores(store=folder / "store", weight="learning-rate", top_k=12).hits
    return {
        "parts": {
            name: {
                "rows": store.part(name).rows,
                "vectors": digest(decoded(store.part(name))),
                "hits": [
                    [hit.id, hit.source_row, hit.score]
                    for hit in ghoststore.query(
                        store=folder / "store", part=name, val_set=folder / "val.jsonl", device="cpu", top_k=12
                    )
                    .results[0]
                    .hits
                ],
            }
            for name in store.part_names()
        },
        "run": {
            "steps": run.steps,
            "score": digest(run.read_committed("score")),
            "sample_id": run.rows.read("sample_id", 0, len(run.rows)).tolist(),
            "top": [[hit.id, hit.value] for hit in top],
        },
        "shards": [shards.tokens_of(sample).tolist() for sample in range(shards.samples)],
    }


def main(out: Path) -> None:
    time.perf_counter = Clock()
    MADE.mkdir()
    try:
        make(MADE)
        (MADE / "expected.json").write_text(json.dumps(expected(MADE), indent=1) + "\n")
        shutil.copytree(MADE, out)
    finally:
        shutil.rmtree(MADE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
