"""Project the per-sample gradients of an MLP: three modes.

python examples/ghost_gradproj_mlp.py --mode project --proj-rank-total 64
python examples/ghost_gradproj_mlp.py --mode non_interf    # the side branches change nothing
python examples/ghost_gradproj_mlp.py --mode naive_check   # the vectors are what plain autograd gives
"""

import argparse

import torch
from torch import nn

from ghoststore import GradProjLoraEngine, ProjectionConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--mode", choices=["project", "non_interf", "naive_check"], default="project")
parser.add_argument("--proj-rank-total", type=int, default=64)
parser.add_argument("--proj-seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(0)
x, y = torch.randn(32, 20), torch.randint(0, 4, (32,))
model = nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 4)).eval()
config = ProjectionConfig(layers=("all",), rank_total=args.proj_rank_total, seed=args.proj_seed)


def losses_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One loss a sample."""
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def vectors() -> torch.Tensor:
    """(samples, D)."""
    with GradProjLoraEngine(model, config) as engine:
        engine.prepare(len(x))
        return engine.collect(losses_of(x, y))


if args.mode == "project":
    found = vectors()
    print(f"{len(found)} samples, {found.shape[1]} numbers each; first norms: {found.norm(dim=1)[:5].tolist()}")
    cosine = nn.functional.cosine_similarity(found[:1], found)
    print(f"samples whose gradients are most like that of sample 0: {cosine.argsort(descending=True)[1:4].tolist()}")
elif args.mode == "non_interf":
    before = losses_of(x, y)
    with GradProjLoraEngine(model, config) as engine:
        engine.prepare(len(x))
        during = losses_of(x, y)
        engine.collect(during)
    print(f"outputs bit-identical with the engine: {torch.equal(before, during.detach())}")
    print(f"every parameter trainable again: {all(p.requires_grad for p in model.parameters())}")
else:
    found, engine = vectors(), GradProjLoraEngine(model, config)
    errors = []
    for i in range(len(x)):
        pieces = []
        gradients = torch.autograd.grad(losses_of(x[i : i + 1], y[i : i + 1]).sum(), list(model.parameters()))
        pairs = zip(gradients[::2], gradients[1::2], strict=True)
        for layer, (weight, bias) in zip(engine.projection.plan.layers, pairs, strict=True):
            p_in, p_out = engine.projection.sides[layer.block.name]
            pieces.append((p_out @ torch.cat([weight, bias[:, None]], dim=1) @ p_in.T).flatten())
        naive = torch.cat(pieces)
        errors.append(float((found[i] - naive).norm() / naive.norm()))
    print(f"largest relative difference from batch-of-one autograd: {max(errors):.1e}")
