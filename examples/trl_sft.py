"""TRL's SFTTrainer with live scores: one callback. Packed rows are scored sample by sample. Needs TRL (`.[trl]`).

python examples/trl_sft.py
python examples/trl_sft.py --packing
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from ghoststore import GhostStoreCallback, Store

parser = argparse.ArgumentParser()
parser.add_argument("--packing", action="store_true", help="several samples in each row")
packing = parser.parse_args().packing

torch.manual_seed(0)
words = [
    "the",
    "a",
    "river",
    "old",
    "moon",
    "song",
    "runs",
    "sings",
    "sleeps",
    "to",
    "sea",
    "under",
    "hill",
    "near",
    "house",
    "and",
]
vocabulary = {word: number for number, word in enumerate([*words, "<pad>", "<eos>"])}
made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
)
texts = [" ".join(words[int(i)] for i in torch.randint(0, len(words), (4 + n % 9,))) for n in range(32)]
val = tokenizer(["the old river runs to the sea"], return_tensors="pt")["input_ids"]

with tempfile.TemporaryDirectory() as folder:
    callback = GhostStoreCallback(store=f"{folder}/store", val_data={"input_ids": val, "labels": val})
    arguments = SFTConfig(
        output_dir=f"{folder}/out",
        max_steps=6,
        per_device_train_batch_size=4,
        packing=packing,
        max_length=32,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    run = Store.open(f"{folder}/store").run()
    sample, score = run.read("sample", 5, 6)[0, 0], run.read("score", 5, 6)[0, 0]
    sample, score = sample[sample >= 0], score[sample >= 0]
    scored = int((run.read("sample", 0, 6) >= 0).sum())
    print(f"steps in the store: {run.steps}; samples scored: {scored}; the best of the last step:")
    names = run.rows.read_rows("sample_id", sample)  # row of trainer.train_dataset, and place in a packed row
    for name, value in sorted(zip(names, score, strict=True), key=lambda pair: -pair[1])[:3]:
        row, _, place = str(name).partition(":")
        prepared = trainer.train_dataset[int(row)]
        lengths = prepared.get("seq_lengths") or [len(prepared["input_ids"])]
        start = sum(lengths[: int(place or 0)])
        print(f"{value:+.3f}  {tokenizer.decode(prepared['input_ids'][start : start + lengths[int(place or 0)]])}")
