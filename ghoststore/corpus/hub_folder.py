"""Datasets in a folder as the hub has them: a card, data in subfolders, splits by the names of files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from ghoststore.errors import CorpusError
from ghoststore.store.base.object_path import at_once
from ghoststore.store.base.objects import side_by_side
from ghoststore.store.base.opening import open_regular

POINTER = b"version https://git-lfs.github.com/spec/"
"""The beginning of a file that Git LFS puts in the place of another one."""
LARGEST_POINTER = 1024


def is_hub_folder(folder: Path, has_files: bool) -> bool:
    """Whether a folder is a dataset of the hub: it has a card with metadata, or its data in a subfolder ``data``."""
    try:
        with open_regular(folder / "README.md") as file:
            has_card = file.read(4).startswith(b"---")
    except OSError:
        has_card = False
    return has_card or (not has_files and (folder / "data").is_dir())


def files_of_split(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of a split of a dataset in a folder, as ``datasets.load_dataset`` finds them: by its card, or by the
    names of files and folders.

    ``names`` are (), if it has one split alone, (split,) or (configuration, split). CorpusError, with the names that
    there are, for others, and for files outside the folder.
    """
    import datasets

    *config, split = names or (None,)
    try:
        configs = datasets.get_dataset_config_names(str(folder))
        if (config and config[0] not in configs) or (not config and len(configs) > 1):
            wrong = f"no configuration {config[0]!r};" if config else "which configuration?"
            raise CorpusError(f"{folder}: {wrong} it has {_choices(folder, (f'{name}:SPLIT' for name in configs))}")
        with tempfile.TemporaryDirectory(prefix="ghoststore-") as cache:
            builder = datasets.load_dataset_builder(str(folder), *config, cache_dir=cache)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CorpusError(f"{folder}: its data files are not found as `datasets` finds them: {error}") from error
    splits = {str(name): list(map(Path, files)) for name, files in (builder.config.data_files or {}).items()}
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        wrong = "which split?" if split is None else f"no split {split!r};"
        of = f"{config[0]}:" if config else ""
        raise CorpusError(f"{folder}: {wrong} it has {_choices(folder, (of + name for name in splits)) or 'none'}")
    for file in splits[split]:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise CorpusError(f"{folder}: its card names {file}, which is outside: nothing is read there")
    return splits[split]


def _choices(folder: Path, names: Iterable[str]) -> str:
    return ", ".join(f"{folder}:{name}" for name in names)


def refuse_pointers(files: Sequence[Path]) -> None:
    """CorpusError for a file whose data are not there: Git LFS has put a few lines in its place."""
    small = [path for path in files if path.stat().st_size <= LARGEST_POINTER]
    for path, is_pointer in zip(small, side_by_side(_is_pointer, small, at_once(files[0])), strict=True):
        if is_pointer:
            raise CorpusError(
                f"{path}: the data are not here, only what Git LFS put in their place: run `git lfs pull` there"
            )


def _is_pointer(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(len(POINTER)) == POINTER
