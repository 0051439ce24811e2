"""Score each training sample of an MLP at each step; print the inner products of every parameter.

python examples/ghost_mlp.py
"""

import torch
from torch import nn

from ghoststore import GradDotProdEngine

torch.manual_seed(0)
x_train, x_val = torch.randn(256, 10), torch.randn(256, 10)
direction = torch.randn(10)
y_train, y_val = (x_train @ direction > 0).long(), (x_val @ direction > 0).long()
y_train[:20] = 1 - y_train[:20]  # twenty samples are labelled wrongly

model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)


def losses_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """One loss a sample."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


engine = GradDotProdEngine(model, (x_val, y_val), val_losses=losses_of, optimizer=optimizer).attach()
value = torch.zeros(len(x_train))
for step in range(10):
    engine.prepare(len(x_train))
    loss = losses_of(model, (x_train, y_train)).mean()
    engine.watch(loss, batch=(x_train, y_train))  # the mean of losses_of, which the first step checks
    loss.backward()
    scores = engine.collect()
    optimizer.step()
    optimizer.zero_grad()
    value += optimizer.param_groups[0]["lr"] * scores.total.float()
    print(f"step {step}  loss {loss.item():.4f}")
    for name, dots in scores.parameters.items():
        print(f"  {name:10} {' '.join(f'{dot:+.4f}' for dot in dots[:6].tolist())} …")

print(
    f"mean cumulative score: {value[:20].mean():+.4f} of the wrongly labelled, {value[20:].mean():+.4f} of the others"
)
