"""What a build is asked for: the keywords of ``ghoststore.build``, checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ghoststore.corpus import Fields
from ghoststore.errors import UsageError
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
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    fields: Fields = field(default_factory=Fields)
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

    def __post_init__(self) -> None:
        for option, value in (("--batch-tokens", self.batch_tokens), ("--max-samples", self.max_samples)):
            if value is not None and value < 1:
                raise UsageError(f"{option} must be at least 1, not {value}")
        if self.dry_run and self.stdin:
            raise UsageError("--dry-run cannot read standard input: the corpus would be used up; give a file")

    @property
    def stdin(self) -> bool:
        """Whether the corpus comes on standard input, which cannot be read again."""
        return str(self.data) == "-"
