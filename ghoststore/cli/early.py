"""What a command refuses before torch is imported, which takes seconds: options of a wrong type or form, a query that
asks for nothing, and what is not there. The words are those of the library, whose own functions say them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from ghoststore.lazy import refuse_shadows
from ghoststore.progress import Progress
from ghoststore.settings.keywords import takes
from ghoststore.settings.option import in_objects, options_of
from ghoststore.settings.question import RerankOptions
from ghoststore.settings.shared import in_memory, is_stdin

ASKED = ("val_set", "minus")
"""Options whose value is a corpus that is asked for, wherever they are."""


def refuse_early(name: str, kind: type, keywords: Mapping[str, Any], progress: Progress) -> None:
    """Raise what the public function ``name``, whose options are ``kind``, would raise of ``keywords`` at once.

    A corpus behind stored rows, and what `repair` computes with, may be gone: the functions say what they make of it.
    """
    refuse_shadows()
    options = takes(kind)(lambda options: options)(**keywords)
    specs = {spec.name: (spec, option) for spec, option in options_of(kind)}
    reads = name != "build" and "store" in specs and specs["store"][1].section == "Input"
    if reads and getattr(options, "server", None) is None:
        _refuse_missing_store(options.store)
    if isinstance(options, RerankOptions):
        options.refuse_contradictions()
    if name == "repair":
        return
    needed = ("data",) if "data" in specs and specs["data"][0].default is MISSING else ()
    for corpus in (*needed, *ASKED):
        _refuse_missing_corpus(getattr(options, corpus, None))
    if name != "train":  # where it is the folder of a training that goes on
        _refuse_missing_checkpoint(getattr(options, "checkpoint", None), progress)


def _missing(place: object) -> bool:
    """Whether ``place`` names something of this machine that is not there."""
    return isinstance(place, str | Path) and bool(str(place)) and not in_objects(place) and not os.path.lexists(place)


def _refuse_missing_store(store: str | Path) -> None:
    if _missing(store):
        from ghoststore.store import Store

        Store.open(store)


def _refuse_missing_corpus(data: Any) -> None:
    if data is None or is_stdin(data) or in_memory(data):
        return
    from ghoststore.corpus.locate import BETWEEN, locate, named_on_hub
    from ghoststore.corpus.memory import source_of

    source = source_of(data)
    if isinstance(source, str) and any(map(_missing, source.split(BETWEEN))) and named_on_hub(source) is None:
        locate(source)


def _refuse_missing_checkpoint(checkpoint: Any, progress: Progress) -> None:
    if not isinstance(checkpoint, str | Path) or in_objects(checkpoint):
        return
    from ghoststore.checkpoint.bounds import ADAPTER_CONFIG, CONFIG
    from ghoststore.checkpoint.find import locate, whole_model

    if _missing(checkpoint):
        locate(checkpoint, progress)  # where its files are that the hub has, of an adapter, too
    elif os.path.isdir(checkpoint) and not any(Path(checkpoint, name).exists() for name in (CONFIG, ADAPTER_CONFIG)):
        whole_model(Path(checkpoint))
