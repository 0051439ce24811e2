"""One step from a checkpoint on a few samples, the val losses after it, and the weights put back.

The step goes along the gradient of the samples' mean loss. It is ``length`` × ‖θ‖ long, whatever the size of the
gradient, so that samples are compared by direction, as rankings compare them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from indexer.encode.losses import next_token_losses
from indexer.training.data import TrainingRows
from indexer.training.validation import ValSet

STEP_LENGTH = 1e-3
"""Of a step, as a share of the length of all weights."""


class Patch:
    """Single steps of one model; after each its weights are put back."""

    def __init__(self, model: Any, rows: TrainingRows, val: ValSet, *, length: float = STEP_LENGTH) -> None:
        self.model, self.val, self.length = model.eval(), val, length
        self._rows = rows
        self._row_of = {int(sample): row for row, sample in reversed(list(enumerate(rows.sample)))}
        self._parameters = [p.requires_grad_(True) for p in model.parameters()]

    @property
    def samples(self) -> int:
        """Samples of the corpus."""
        return len(self._rows.shards.length)

    def usable(self, sample: int) -> bool:
        """Whether a sample has a row with a target."""
        row = self._row_of.get(sample)
        return row is not None and bool(self._rows.first_target[row] < self._rows.length[row])

    def losses_after(self, samples: Sequence[int], val_rows: Sequence[int]) -> NDArray[np.float64]:
        """(val_rows,): their losses after one step on ``samples``, which all are :meth:`usable`.

        UsageError if their gradient is zero or not finite.
        """
        places = np.array([self._row_of[sample] for sample in samples])
        batch = self._rows.batch(places).to(str(self._parameters[0].device))
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        losses_B, _ = next_token_losses(logits, batch.labels)
        gradients = torch.autograd.grad(losses_B.mean(), self._parameters, allow_unused=True)
        size = torch.stack([g.norm() for g in gradients if g is not None]).norm()
        if not bool(torch.isfinite(size)) or float(size) == 0:
            raise UsageError(f"the gradient of samples {list(samples)[:4]} … is zero or not finite")
        with torch.no_grad():
            before = [p.clone() for p in self._parameters]
            weights = torch.stack([p.norm() for p in before]).norm()
            try:
                for parameter, gradient in zip(self._parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter.sub_(gradient * (self.length * weights / size))
                return self.val.losses(self.model, val_rows)
            finally:
                for parameter, weights_before in zip(self._parameters, before, strict=True):
                    parameter.copy_(weights_before)
