"""A checkpoint of a training, with the projection of the gradients that its run keeps: what they are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ghoststore.checkpoint.adapter import IN_PEFT, has_adapter
from ghoststore.checkpoint.config_identity import config_differences
from ghoststore.checkpoint.load import find_checkpoint, find_tokenizer, load_model, load_tokenizer, resolve_device
from ghoststore.checkpoint.tokenizer_identity import tokenizer_identity
from ghoststore.corpus import Sample
from ghoststore.errors import MismatchError
from ghoststore.progress import Progress, Task
from ghoststore.settings.shared import FLOATS, TokenizerSource
from ghoststore.settings.shared import Checkpoint as CheckpointSource
from ghoststore.store import Run
from ghoststore.store.base.manifest import difference_lines, differences
from ghoststore.store.base.records import reading
from indexer.encode.encoder import RowEncoder, encode_rows
from indexer.encode.modes import forward_options
from indexer.encode.tokens import Row, Tokenizer, TokenSettings, embedding_rows, longest_row, rows_of
from indexer.projection.stored import projection_of_run
from query.ask.encoder import PartEncoder

BATCH_TOKENS = 4096


class _InPeft(nn.Module):
    """A model with an adapter, whose layers have the paths of the PeftModel in which it was trained."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def forward(self, **given: Any) -> Any:
        model: Any = self.base_model.model
        return model(**forward_options(model), **given)


def _was_in_peft(run: Run) -> bool:
    """Whether the layers whose gradients ``run`` keeps are those of a PeftModel."""
    described = run.manifest["scoring"].get("gradients")
    with reading(run.path / "zarr.json", "does not describe a projection"):
        return described is None or all(layer["name"].startswith(IN_PEFT) for layer in described["layers"])


class RunEncoder(PartEncoder):
    """Val sets to the vectors that ``run`` keeps, at the weights of ``checkpoint``. Rows are cut as val rows of a
    training are.

    MismatchError for a model of another configuration, another tokenizer or other layers than the run's. Which of the
    weights of that training they are, nothing tells: that is the choice of who asks.
    """

    def __init__(
        self,
        run: Run,
        *,
        checkpoint: CheckpointSource,
        base: str | Path | None,
        tokenizer: TokenizerSource | None,
        device: str,
        progress: Progress,
    ) -> None:
        self._progress = progress
        manifest, found = run.manifest, find_checkpoint(checkpoint, base=base, progress=progress)
        folder = found.tokenizer_folder if tokenizer is None else find_tokenizer(tokenizer, progress)
        loaded = load_tokenizer(folder)
        with reading(run.path / "zarr.json", "does not say how its model was trained"):
            dtype, max_length = (
                manifest["training"].get("model_dtype", "float32"),
                manifest["training"].get("max_length"),
            )
            if dtype not in FLOATS or not isinstance(max_length, int | None):
                raise ValueError(f"model_dtype {dtype!r:.40}, max_length {max_length!r:.40}")
        self.model = load_model(
            found,
            dtype=dtype,
            device=resolve_device(device, checkpoint),
            attn_implementation=manifest["compute"].get("attn_implementation"),
        )
        stored_config, stored_tokenizer = manifest["model"].get("config"), dict(manifest["tokenizer"])
        date = stored_tokenizer.pop("template_date", None)
        different = []
        if stored_config is not None:
            different += config_differences(stored_config, self.model.config, training=True)
        if stored_tokenizer.get("fingerprint") is not None:
            different += differences(stored_tokenizer, tokenizer_identity(loaded), "tokenizer")
        if different:
            raise MismatchError(
                f"run {run.name!r} is of another model or tokenizer than {found.where} and {folder}:\n"
                f"{difference_lines(different, 'found')}\n"
                "Give `checkpoint` a checkpoint of that training"
            )
        self._tokenizer = Tokenizer(
            loaded,
            vocabulary=embedding_rows(self.model),
            of_part=True,
            template_date=date,
            note=progress.note,
            takes_ids=tokenizer is not None,
        )
        self._settings = TokenSettings(
            max_length=max_length or longest_row(self.model, None),
            template_date=self._tokenizer.template_date,
        )
        model = _InPeft(self.model) if has_adapter(self.model) and _was_in_peft(run) else self.model
        projection = projection_of_run(run, model)
        self.plan, self._encoder = projection.plan, RowEncoder(model, projection)

    @property
    def max_length(self) -> int:
        """See :attr:`PartEncoder.max_length`."""
        return self._settings.max_length

    def rows(self, samples: Iterable[Sample]) -> Iterator[Row]:
        """The rows of ``samples``, in order; see :meth:`PartEncoder.rows`."""
        rows = rows_of(samples, self._tokenizer, self._settings)
        return iter(list(rows)) if self._tokenizer.exceeds else rows

    def vectors(self, rows: Sequence[Row], task: Task | None = None) -> Tensor:
        """(rows, D) float32 on the CPU; zeros without a usable status."""
        if task is None:
            with closing(self._progress.task("gradients", len(rows))) as task:
                return self.vectors(rows, task)
        with self._encoder:
            return encode_rows(self._encoder, rows, BATCH_TOKENS, task).vectors
