"""Bergson: an index of projected gradients, TrackStar, EK-FAC, and EK-FAC refined by conjugate gradients.

Its command line, with its defaults and those of its examples. The pipelines take up steps that are done (``resume``),
so what does not depend on the question is done first.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from exchange import Job, Phases, run

TOKENS = 1024
"""Of a batch: Bergson allows at most the model's positions."""
DAMPING = "--hessian_pipeline_cfg.inversion_cfg.damping_factor"
CG = ("--solver", "cg", "--num_steps", "10", "--astra.batch_size", "64", DAMPING, "10.0")
"""The damping of its comparison on WikiText, which takes 20 steps on 256 documents: minutes a val row."""


def bergson(*words: object) -> None:
    """``bergson WORDS``, in this environment."""
    code = subprocess.run([sys.executable, "-m", "bergson", *map(str, words)], check=False).returncode
    if code:
        raise SystemExit(f"bergson {words[0]} ended by {signal.Signals(-code).name if code < 0 else code}")


def of(job: Job, rows: Path, flag: str = "--dataset") -> tuple[object, ...]:
    """The options that name the model and one set of rows."""
    return "--model", job.checkpoint, flag, rows, "--token_batch_size", TOKENS


def start(job: Job) -> None:
    import bergson.cli.commands  # noqa: F401
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(job.checkpoint)


def build_index(job: Job, *, side: int) -> None:
    """An index on disk, ``side`` × ``side`` numbers a layer."""
    index = job.work / "index"
    bergson("build", index, *of(job, job.rows), "--projection_dim", side)
    job.keep((index / "gradients.bin").stat().st_size / job.count(job.rows))


def query_index(job: Job, *, side: int, cosine: bool) -> None:
    """The products of a second index, of the val rows, with the first."""
    import torch
    from bergson import Attributor
    from bergson.data import load_module_gradients

    bergson("build", job.work / "val", *of(job, job.val), "--projection_dim", side)
    attributor = Attributor(job.work / "index", device="cpu", unit_norm=cosine)
    val = load_module_gradients(job.work / "val")
    values, places = attributor.search({name: torch.from_numpy(val[name].copy()) for name in val}, k=None)
    job.answer(torch.zeros_like(values).scatter_(1, places, values))


def scores_of(job: Job, folder: Path) -> None:
    from bergson.data import load_scores

    job.answer(load_scores(folder)[:].T)


def build_trackstar(job: Job, *, side: int) -> None:
    """The second moment of the rows' gradients."""
    bergson("hessian", job.work / "value_hessian", *of(job, job.rows), "--projection_dim", side,
            "--method", "autocorrelation")  # fmt: skip
    job.keep(None)


def query_trackstar(job: Job, *, side: int) -> None:
    bergson("trackstar", job.work, *of(job, job.rows, "--data.dataset"), "--projection_dim", side,
            "--resume", "--query.dataset", job.val)  # fmt: skip
    scores_of(job, job.work / "scores")


def build_ekfac(job: Job) -> None:
    """The factors, their eigenvectors and the corrected eigenvalues."""
    bergson("hessian", job.work / "hessian" / "kfac", *of(job, job.rows), "--method", "kfac", "--ev_correction")
    job.keep(None)


def query_ekfac(job: Job, *, options: tuple[str, ...]) -> None:
    bergson(*pipeline_of(job, options))
    scores_of(job, job.work / "scores")


def pipeline_of(job: Job, options: tuple[str, ...]) -> tuple[object, ...]:
    return ("ekfac", job.work, *of(job, job.rows, "--data.dataset"), "--method", "kfac", "--hessian_cfg.ev_correction",
            "--resume", "--query.dataset", job.val, *options)  # fmt: skip


def query_ekfac_copied(job: Job, *, options: tuple[str, ...]) -> None:
    """As :func:`query_ekfac`, but CG gets gradients in memory.

    As released it updates, in place, what it has mapped from a file for reading, and on a CPU that kills the process.
    """
    import numpy as np
    from bergson.__main__ import main
    from bergson.hessians import astra

    mapped = astra.load_gradients
    astra.load_gradients = lambda folder: np.array(mapped(folder))
    sys.argv = ["bergson", *map(str, pipeline_of(job, options))]
    main()
    scores_of(job, job.work / "scores")


WAYS = {
    "index-16-cosine": Phases(start, partial(build_index, side=16), partial(query_index, side=16, cosine=True)),
    "index-16-dot": Phases(start, partial(build_index, side=16), partial(query_index, side=16, cosine=False)),
    "trackstar-16": Phases(start, partial(build_trackstar, side=16), partial(query_trackstar, side=16)),
    "trackstar-32": Phases(start, partial(build_trackstar, side=32), partial(query_trackstar, side=32)),
    "ekfac": Phases(start, build_ekfac, partial(query_ekfac, options=(DAMPING, "0.1"))),
    "ekfac-0.001": Phases(start, build_ekfac, partial(query_ekfac, options=(DAMPING, "0.001"))),
    "ekfac-cg": Phases(start, build_ekfac, partial(query_ekfac, options=CG)),
    "ekfac-cg-copied": Phases(start, build_ekfac, partial(query_ekfac_copied, options=CG)),
}

if __name__ == "__main__":
    run(WAYS)
