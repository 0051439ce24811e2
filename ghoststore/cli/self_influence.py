"""``ghoststore self-influence``."""

from __future__ import annotations

from ghoststore.cli import options
from ghoststore.cli.query import print_hits
from ghoststore.settings.question import SelfInfluenceOptions
from ghoststore.settings.shared import Printing, ResultFile


@options.command(
    SelfInfluenceOptions, Printing, ResultFile, first="store part top_k bottom_k layers exclude_layers damping out"
)
def command(keywords: options.Keywords, printing: Printing, file: ResultFile) -> None:
    """The training samples that most change their own loss: rare, noisy or mislabelled ones.

    The score of a row with gradient g is g·(H + λI)⁻¹·g, H the second moment of the part's rows. No model is loaded.

    \b
      ghoststore self-influence --store ./store --top-k 20
    """
    options.run("self_influence", keywords, printing, print_hits, file)
