"""transformers' Trainer with live scores: one callback. Needs accelerate, as the Trainer does.

python examples/trainer_callback.py
"""

import tempfile

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from ghoststore import GhostStoreCallback, Store

torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
)
tokens = torch.randint(0, 50, (32, 16)).tolist()
dataset = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
val = torch.tensor(tokens[:4])

with tempfile.TemporaryDirectory() as folder:
    callback = GhostStoreCallback(store=f"{folder}/store", val_data={"input_ids": val, "labels": val})
    arguments = TrainingArguments(
        output_dir=f"{folder}/out",
        max_steps=12,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        report_to=[],
        save_strategy="no",
        logging_steps=4,
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[callback]).train()
    run = Store.open(f"{folder}/store").run()
    print(f"steps in the store: {run.steps}; scores of the last: {run.read('score', 11, 12)[0, 0].round(3).tolist()}")
