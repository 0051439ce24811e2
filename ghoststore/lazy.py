"""The table of public names, and their import on first use."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

FACE = {
    "load_nanogpt": "ghoststore.checkpoint.nanogpt",
    "Corpus": "ghoststore.corpus",
    "Fields": "ghoststore.settings.fields",
    "Part": "ghoststore.store",
    "Run": "ghoststore.store",
    "Status": "ghoststore.store",
    "Store": "ghoststore.store",
    "TokenShards": "ghoststore.tokens.shards",
    "info": "ghoststore.store.info",
    "verify": "ghoststore.store.verify",
    "repair": "indexer.build.repair",
    "gc": "ghoststore.store.manage.gc",
    "remove": "ghoststore.store.manage.remove",
    "rename": "ghoststore.store.manage.rename",
    "copy": "ghoststore.store.manage.copy",
    "export": "query.export.export",
    "BuildReport": "indexer.build.report",
    "build": "indexer.build.build",
    "GradDotProdEngine": "indexer.dotprod",
    "Scores": "indexer.dotprod",
    "packed_samples": "indexer.dotprod.segments",
    "TrainConfig": "ghoststore.settings.train",
    "TrainReport": "indexer.training.train",
    "train": "indexer.training.train",
    "Candidates": "indexer.session.policies",
    "Choosing": "indexer.session.choosing",
    "GhostConfig": "indexer.integrations.config",
    "GhostEngineManager": "indexer.integrations.manager",
    "GhostStoreCallback": "indexer.integrations.callback",
    "GradProjLoraEngine": "indexer.encode.engine",
    "next_token_losses": "indexer.encode.losses",
    "ProjectionConfig": "ghoststore.settings.projection",
    "TokenizeReport": "indexer.tokenize.tokenize",
    "tokenize": "indexer.tokenize.tokenize",
    "demo": "query.demo.demo",
    "doctor": "query.doctor",
    "DoctorReport": "query.doctor",
    "index": "query.ann.command",
    "IndexReport": "query.ann.command",
    "evaluate": "query.evaluate.evaluate",
    "fidelity": "query.fidelity.fidelity",
    "FidelityReport": "query.fidelity.fidelity",
    "full_gradients": "query.exact.full_gradients",
    "FullGradientsReport": "query.exact.full_gradients",
    "ErrorCurve": "query.fidelity.plot_error",
    "plot_error": "query.fidelity.plot_error",
    "open": "query.answer.session",
    "query": "query.answer.query",
    "self_influence": "query.answer.self_influence",
    "QueryResult": "query.answer.results",
    "Session": "query.answer.session",
    "serve": "ghoststore.server.serve",
    "Explorer": "ghoststore.server.serve",
    "ScoresResult": "query.training_scores.results",
    "scores": "query.training_scores.scores",
    "select": "query.select.select",
    "SelectReport": "query.select.report",
    "watch": "query.training_scores.watch",
}
"""By public name, the module that defines it."""

PACKAGES = ("indexer", "query")
"""Packages beside ``ghoststore`` that a user's own files could shadow."""

process_is_ours = False
"""Set by the command line, whose process ends with the command: nothing looks through what was imported ever again. In
a process of the user's this would keep what else is there, and is garbage later.
"""


def load(name: str) -> Any:
    """The public object ``name``. AttributeError if there is none, ImportError if its package is shadowed."""
    if name not in FACE:
        raise AttributeError(f"module 'ghoststore' has no attribute {name!r}")
    refuse_shadows()
    with importing():
        return getattr(importlib.import_module(FACE[name]), name)


@contextmanager
def importing() -> Iterator[None]:
    """While open, nothing looks for garbage: what an import makes stays. torch and transformers make so much that
    looking through it again and again takes a quarter of a short command's time.
    """
    enabled, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if process_is_ours and len(sys.modules) > modules:
            gc.freeze()
        if enabled:
            gc.enable()


@cache
def refuse_shadows() -> None:
    """ImportError if a user's ``query.py`` or ``indexer.py`` hides the package of that name."""
    import importlib.util  # here, because `--help` must not pay for it

    home = Path(__file__).resolve().parent.parent
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ImportError(f"package {package!r} of ghoststore is not in {home}; install ghoststore again")
        origin = Path(spec.origin).resolve()
        if origin != home / package / "__init__.py":
            raise ImportError(
                f"{origin} hides ghoststore's own package {package!r} ({home / package}): rename that file or folder, "
                "or run from another directory"
            )
