"""Which options of a training go together."""

from __future__ import annotations

from pathlib import Path

from ghoststore.errors import UsageError
from ghoststore.settings.shared import in_memory, is_stdin
from ghoststore.settings.train import TrainConfig, TrainOptions
from ghoststore.store import Store
from ghoststore.store.base.names import check_name
from ghoststore.store.base.object_path import location
from indexer.session.ranks import Ranks


def refuse_usage(options: TrainOptions, config: TrainConfig, ranks: Ranks) -> None:
    """UsageError for options that do not go together, or not with so many ranks."""
    if in_memory(options.checkpoint):
        raise UsageError(
            "a training goes on from a folder, where it also finds what it resumes: `model.save_pretrained(folder)`, "
            "and give `checkpoint` that folder"
        )
    models = (config.architecture, config.model_config, options.checkpoint)
    if sum(model is not None for model in models) != 1:
        raise UsageError(
            "give `architecture` or `model_config` to train from scratch, or `checkpoint` to go on from one"
        )
    if options.eval_only and (options.val_set is None or options.checkpoint is None):
        raise UsageError("`eval_only` needs `checkpoint` and `val_set`")
    if options.dry_run and options.eval_only:
        raise UsageError("`eval_only` writes nothing in any case: leave out `dry_run`")
    if options.dry_run and ranks.count > 1:
        raise UsageError(f"`dry_run` tries a training in one process, not in {ranks.count} ranks")
    if is_stdin(options.val_set) and ranks.count > 1:
        raise UsageError("`val_set=-` cannot be read by several ranks; save it to a file first")
    for name in ("max_samples", "max_val_samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"`{name}` must be at least 1, not {value}")
    if options.eval_only:
        if config.choosing.candidates is not None:
            raise UsageError("`candidates` belongs to a training: leave it out with `eval_only`")
        return
    if config.scoring.method == "GradDotProd" and (options.store is None or options.val_set is None):
        raise UsageError("`method=GradDotProd` needs `val_set` and `store`; `method=Regular` trains without scores")
    scoring = config.scoring
    if options.projection is not None and config.score != "sketched" and scoring.keep_gradients is None:
        without = f" without {' and '.join(config.against_sketched)}" if config.against_sketched else ""
        raise UsageError(
            f"projection options belong to `score=sketched`{without} and `keep_gradients`: give one of them, or leave "
            "the projection options out"
        )
    if config.architecture is None and config.dropout:
        raise UsageError("`dropout` belongs to `architecture`: a checkpoint has its own, and so has a configuration")
    if options.name is not None:
        if options.store is None:
            raise UsageError("`name` is the name of a run: it needs `store`")
        check_name(options.name)
    if options.store is not None:
        Store.refuse_others(location(options.store))
    if is_stdin(options.data) and ranks.count > 1:
        raise UsageError("`data=-` cannot be read by several ranks; tokenize it first")
    if is_stdin(options.data) and is_stdin(options.val_set):
        raise UsageError("`data` and `val_set` cannot both be standard input")
    if Path(options.output_dir).exists() and not Path(options.output_dir).is_dir():
        raise UsageError(f"`output_dir={options.output_dir}` is a file; give a folder")
    config.drawn(ranks.count)
