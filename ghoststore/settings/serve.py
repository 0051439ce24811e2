"""Options of the explorer."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path

from ghoststore.settings.option import about, option, options
from ghoststore.settings.question import RebuiltOptions
from ghoststore.settings.shared import STORE

Stores = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]
"""One store, several, or several by name."""


@options
class ServeOptions(RebuiltOptions):
    """Options of one store that is served."""

    store: str | Path = field(kw_only=False, metadata=about(STORE, "Input"))


@options
class ExplorerOptions(RebuiltOptions):
    """Options of ``ghoststore serve``."""

    store: Stores = field(
        kw_only=False,
        metadata=about(
            f"{STORE} Repeated: several, each called as its folder, or as NAME=STORE says.",
            "Input",
            repeated=True,
            metavar="STORE",
        ),
    )
    port: int = option(0, "Port on 127.0.0.1 (0: one that is free).", "Advanced")
