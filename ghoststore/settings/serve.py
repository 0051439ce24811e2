"""Options of the explorer."""

from dataclasses import field
from pathlib import Path

from ghoststore.settings.option import about, option, options
from ghoststore.settings.question import RebuiltOptions
from ghoststore.settings.shared import STORE


@options
class ServeOptions(RebuiltOptions):
    """Options of ``ghoststore serve``."""

    store: str | Path = field(kw_only=False, metadata=about(STORE, "Input"))
    port: int = option(0, "Port on 127.0.0.1 (0: one that is free).", "Advanced")
