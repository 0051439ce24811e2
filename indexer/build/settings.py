"""What a build is asked for: the keywords of ``ghoststore.build``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ghoststore.corpus import Fields
from ghoststore.settings.projection import ProjectionConfig
from indexer.encode.losses import Reduction
from indexer.encode.tokens import Overlong


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """The keywords of :func:`ghoststore.build`, whose docstring says what they mean."""

    checkpoint: str | Path
    data: str | Path
    store: str | Path
    name: str | None
    tokenizer: str | Path | None
    projection: ProjectionConfig | None
    fields: Fields | None
    proj_dtype: str
    loss_reduction: Reduction
    max_length: int | None
    overlong: Overlong
    max_samples: int | None
    batch_tokens: int | None
    span_rows: int | None
    store_text: bool
    device: str
    model_dtype: str
    attn_implementation: str | None
    gradient_checkpointing: bool
    optimizer_state: str | Path | None
    dry_run: bool
