"""The manager's loop: scores of every step, committed to a store.

python examples/manager_loop.py --method GradDotProd    # or GradProjLora, Regular
"""

import argparse
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ghoststore import GhostConfig, GhostEngineManager, Store

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--method", choices=["GradDotProd", "GradProjLora", "Regular"], default="GradDotProd")
parser.add_argument("--max-steps", type=int, default=12)
parser.add_argument("--batch-size", type=int, default=4)
args = parser.parse_args()

torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
X = torch.randint(0, 50, (24, 16))
X_val = X[:2].clone()

with tempfile.TemporaryDirectory() as folder:
    config = GhostConfig(
        method=args.method,
        store=f"{folder}/store",
        name="example",
        samples=len(X),
        max_steps=args.max_steps,
        batch_size=args.batch_size,
        dot_prod_save_interval=5,
    )
    manager = GhostEngineManager(config, model, optimizer, val_data=(X_val, X_val))
    for iteration in range(args.max_steps):
        batch_idx = torch.randperm(len(X))[: args.batch_size]
        X_train = Y_train = X[batch_idx]
        manager.attach_train_batch(X_train, Y_train, iteration, batch_idx)
        X_forward, Y_forward = manager.prepare_forward_input(X_train, Y_train)
        loss = model(input_ids=X_forward, labels=Y_forward).loss
        loss.backward()
        manager.prepare_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        manager.aggregate_and_log()
        manager.clear_gradients()
        optimizer.zero_grad(set_to_none=True)
        if manager.should_save_metrics(iteration):
            manager.save_metrics(iteration)
    manager.cleanup()
    print(f"method {manager.get_method()}, {args.max_steps} steps, last loss {loss.item():.3f}")
    if manager.is_active():
        run = Store.open(f"{folder}/store").run("example")
        print(f"steps in the store: {run.steps}")
        print(f"samples of step 0: {run.read('sample', 0, 1)[0, 0].tolist()}")
        print(f"their scores: {run.read('score', 0, 1)[0, 0].tolist()}")
