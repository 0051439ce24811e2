"""dattri: LoGra (block-projected influence functions) and EK-FAC."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from exchange import Job, Phases, run

BATCH = 4
"""Rows at a time, as in its example of GPT-2."""


def with_linears(model: Any) -> Any:
    """GPT-2's layers as ``nn.Linear``: dattri sees no others."""
    import torch
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = torch.nn.Linear(*module.weight.shape)
            linear.load_state_dict({"weight": module.weight.data.t(), "bias": module.bias.data})
            model.set_submodule(name, linear)
    return model


def start(job: Job) -> Any:
    import dattri.algorithm
    from transformers import AutoModelForCausalLM

    assert dattri.algorithm.LoGraAttributor
    return with_linears(AutoModelForCausalLM.from_pretrained(job.checkpoint).eval())


def loss(model: Any, batch: dict[str, Any], device: str) -> Any:
    return model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss


def build_logra(job: Job, *, numbers: int, damping: float | None) -> None:
    """All of it: what is cached serves the process that cached it. The question's seconds are told apart."""
    from batches import ByLength
    from dattri.algorithm import LoGraAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader

    model = start(job)
    task = AttributionTask(
        model=model, loss_func=loss, checkpoints=str(job.checkpoint),
        checkpoints_load_func=lambda model, checkpoint: model,
    )  # fmt: skip
    attributor = LoGraAttributor(task=task, hessian="eFIM", damping=damping, device="cpu", proj_dim=numbers,
                                 offload="cpu")  # fmt: skip
    rows, val = (ByLength(job.read(path), BATCH) for path in (job.rows, job.val))
    loader = DataLoader(rows, batch_size=BATCH)
    attributor.cache(loader)
    job.keep(4.0 * sum(attributor.layer_dims))
    built = time.process_time()
    scores = attributor.attribute(loader, DataLoader(val, batch_size=BATCH))
    job.answer(val.in_place(rows.in_place(scores, 0), 1).T)
    job.seconds(build=built, query=time.process_time() - built)


def nothing(job: Job) -> None:
    """Done by ``build``."""


WAYS = {
    "logra-256": Phases(start, partial(build_logra, numbers=256, damping=None), nothing),
    "logra-4096": Phases(start, partial(build_logra, numbers=4096, damping=1.0), nothing),
}

if __name__ == "__main__":
    run(WAYS)
