"""dattri-llm: its store of projected gradients, and EK-FAC."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from exchange import Job, Phases, folder_bytes, run

BATCH = 8
"""Rows at a time: its default."""
LAYERS = r"transformer\.h\.\d+\.(attn|mlp)\."


def start(job: Job) -> Any:
    import dattri_llm
    from transformers import AutoModelForCausalLM

    assert dattri_llm.EKFACAttributor
    return AutoModelForCausalLM.from_pretrained(job.checkpoint).eval()


def rows_of(job: Job, path: Path) -> Any:
    from batches import ByLength

    return ByLength(job.read(path), BATCH)


def loss(model: Any, batch: dict[str, Any]) -> Any:
    """Summed over rows and tokens, so that each gradient is that of one row alone."""
    import torch

    logits = model(**{**batch, "labels": None}).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def arguments(job: Job) -> Any:
    from dattri_llm import AttributionArguments

    return AttributionArguments(
        output_dir=str(job.work / "scores"), per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
        use_cpu=True, dataloader_pin_memory=False, max_grad_norm=None,
    )  # fmt: skip


def capture(job: Job, rows: Path, folder: Path, side: int) -> None:
    """The gradients of rows, projected to ``side`` × ``side`` numbers a layer, in a store on disk."""
    from dattri_llm import GradientStorageManager, HookManager, HookManagerConfig, OffloadCallback
    from torch.utils.data import DataLoader

    model = start(job)
    projection = {"style": "logra", "proj_dim": side, "proj_max_batch_size": BATCH, "proj_type": "normal"}
    hooks = HookManager(
        model,
        config=HookManagerConfig(
            linear_io=[LAYERS], capture_style="materialized", projection_kwargs={"__default__": projection}
        ),
        callbacks=[
            OffloadCallback(
                offload_interval=1, file_manager=GradientStorageManager(str(folder)), recording_type="per_sample"
            )
        ],
    )
    with hooks.collect():
        for batch in DataLoader(rows_of(job, rows), batch_size=BATCH):
            model.zero_grad(set_to_none=True)
            loss(model, batch).backward()
    hooks.remove()


def build_store(job: Job, *, side: int) -> None:
    capture(job, job.rows, job.work / "rows", side)
    job.keep(folder_bytes(job.work / "rows") / job.count(job.rows))


def query_store(job: Job, *, side: int, cosine: bool) -> None:
    from dattri_llm import TracInAttributor

    capture(job, job.val, job.work / "val", side)
    attributor = TracInAttributor(arguments(job))
    answer(job, attributor.attribute_from_cache(
        str(job.work / "rows"), str(job.work / "val"), normalized_grad=cosine
    ))  # fmt: skip


def answer(job: Job, score: Any) -> None:
    """Scores of rows by their hashes: equal rows have one, and share its score."""
    from dattri_llm.utils.hashing import hash_sample

    seen = ("input_ids", "attention_mask")  # what the model is given: see loss
    train, val = (
        [hash_sample({name: item[name] for name in seen}) for item in rows_of(job, path).items]
        for path in (job.rows, job.val)
    )
    matrix = score.query(train, val, trajectory="agnostic")
    matrix = rows_of(job, job.val).in_place(rows_of(job, job.rows).in_place(matrix, 0), 1)
    job.answer(matrix.T)


def ekfac(job: Job, val: Any, damping: dict[str, Any]) -> Any:
    """Live: the rows pass by for the fit, unless it is on disk, and again to be scored."""
    from dattri_llm import AttributionTask, EKFACAttributor, HookManagerConfig

    attributor = EKFACAttributor(arguments(job), task=AttributionTask(loss_func=loss, model=start(job)))
    return attributor.attribute(
        rows_of(job, job.rows), val, hook_config=HookManagerConfig(linear_io=[LAYERS]),
        fisher_dir=str(job.work / "fisher"), **damping,
    )  # fmt: skip


def build_ekfac(job: Job, *, damping: dict[str, Any]) -> None:
    """The fit. It has no command of its own: one val row is scored with it."""
    from torch.utils.data import Subset

    ekfac(job, Subset(rows_of(job, job.val), [0]), damping)
    job.keep(None)


def query_ekfac(job: Job, *, damping: dict[str, Any]) -> None:
    answer(job, ekfac(job, rows_of(job, job.val), damping))


RELATIVE = {"damping": 0.1, "relative_damping": True}
WAYS = {
    "store-16-dot": Phases(start, partial(build_store, side=16), partial(query_store, side=16, cosine=False)),
    "store-16-cosine": Phases(start, partial(build_store, side=16), partial(query_store, side=16, cosine=True)),
    "ekfac": Phases(start, partial(build_ekfac, damping={}), partial(query_ekfac, damping={})),
    "ekfac-relative": Phases(start, partial(build_ekfac, damping=RELATIVE), partial(query_ekfac, damping=RELATIVE)),
}

if __name__ == "__main__":
    run(WAYS)
