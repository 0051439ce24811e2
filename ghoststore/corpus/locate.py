"""Finding the files of a source: a file, a folder of files, a saved dataset, token shards, or a dataset of the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ghoststore.corpus.formats import FORMS, form_of
from ghoststore.corpus.formats.base import Form
from ghoststore.corpus.formats.dataset import DatasetForm
from ghoststore.errors import CorpusError, GhostStoreError, UsageError

SUPPORTED = f"supported: {', '.join(sorted(FORMS))}, a folder of such files, a save_to_disk folder, token shards"
NOT_DATA = {"", ".md", ".yaml", ".yml"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_SOURCE = re.compile(rf"(?P<name>{HUB_NAME.pattern}):(?P<split>[\w.+%:\[\]-]+)")


PIPED = "standard input is `-`: `… | ghoststore … -`"


def locate(source: str) -> tuple[Form, list[Path]]:
    """(form, files) of a source: see `Corpus.open`."""
    if source == "-":
        raise UsageError("standard input can be read only once: spool it to a file first (spool_stdin)")
    try:
        return _locate(source)
    except GhostStoreError:
        raise
    except OSError as error:  # such as a folder without access, or a name that is too long
        raise CorpusError(f"{source:.1000}: cannot be read: {error.strerror or error}") from error


def _locate(source: str) -> tuple[Form, list[Path]]:
    path = Path(source)
    if path.is_file():
        form = form_of(path)
        if form is None:
            raise CorpusError(f"{path}: unsupported form {path.suffix!r}; {SUPPORTED}; {PIPED}")
        return form, [path]
    if path.is_dir():
        return _locate_folder(path, split=None)
    if path.exists():
        raise CorpusError(f"{path}: expected a file or a folder, found a device, pipe or socket; {PIPED}")
    folder, _, split = source.rpartition(":")
    if folder and Path(folder).exists():
        if Path(folder).is_dir():
            return _locate_folder(Path(folder), split)
        raise CorpusError(f"{source}: a split is for a saved DatasetDict; {folder} is a file")
    hub = HUB_SOURCE.fullmatch(source)
    if hub and form_of(Path(hub["name"])) is None:
        return _locate_on_hub(source, hub["name"], hub["split"])
    hint = f"; for a dataset of the hub, add its split: {source}:train" if HUB_NAME.fullmatch(source) else ""
    if " " in source or "\n" in source:
        hint = "; a text in memory is given in a list, [text]"
    raise CorpusError(f"{source:.1000}: does not exist{hint}")


def absolute(source: str) -> str:
    """``source`` with its path made absolute, if it is a path. A split of a saved dataset keeps its ``:split``."""
    path, _, split = source.rpartition(":")
    if Path(source).exists():
        return str(Path(source).resolve())
    return f"{Path(path).resolve()}:{split}" if path and Path(path).exists() else source


def corpus_name(source: str) -> str:
    """A short name for the corpus ``source``, used in default names of parts and runs."""
    if source == "-":
        return "stdin"
    name = Path(source.rstrip("/")).name
    for suffix in (".gz", ".zst", ".jsonl", ".ndjson", ".parquet", ".csv", ".txt"):
        name = name.removesuffix(suffix)
    return name


def _locate_folder(folder: Path, split: str | None) -> tuple[Form, list[Path]]:
    """The form and the files of a folder: token shards, a saved dataset, or data files of one form."""
    if (folder / "shards.json").is_file():
        from ghoststore.tokens.form import ShardsForm
        from ghoststore.tokens.shards import TokenShards

        if split is not None:
            raise CorpusError(f"{folder}:{split}: a split is for a saved DatasetDict; {folder} holds token shards")
        return ShardsForm(TokenShards.open(folder, verify_on_read=True)), [folder]
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _locate_saved(folder, split)
    if split is not None:
        raise CorpusError(f"{folder}:{split}: a split is for a saved DatasetDict; {folder} is a plain folder")
    files = [f for f in folder.iterdir() if f.is_file() and not f.name.startswith(".")]
    files = sorted((f for f in files if f.suffix.lower() not in NOT_DATA), key=lambda f: f.name)
    forms: dict[str, Form] = {}
    for file in files:
        form = form_of(file)
        if form is None:
            raise CorpusError(f"{file}: unsupported form {file.suffix!r} in a folder of data; {SUPPORTED}")
        forms[form.name] = form
    if not forms:
        raise CorpusError(f"{folder}: no data files in this folder (subfolders are not read); {SUPPORTED}")
    if len(forms) > 1:
        raise CorpusError(f"{folder}: expected files of one form, found {', '.join(sorted(forms))}")
    return forms.popitem()[1], files


def _locate_saved(folder: Path, split: str | None) -> tuple[Form, list[Path]]:
    """A dataset that ``save_to_disk`` wrote, or one ``split`` of it."""
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise CorpusError(f"{folder}: cannot be read as a saved dataset: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        if split is not None:
            raise CorpusError(f"{folder}: is one Dataset and has no splits; name it without ':{split}'")
        return DatasetForm(loaded), [folder]
    if split is None or split not in loaded:
        wrong = "which split?" if split is None else f"no split {split!r};"
        choices = ", ".join(f"{folder}:{name}" for name in loaded)
        raise CorpusError(f"{folder}: {wrong} it has {choices}")
    return DatasetForm(loaded[split]), [folder / split]


def _locate_on_hub(source: str, name: str, split: str) -> tuple[Form, list[Path]]:
    import datasets

    missing = f"{source}: no such path exists"
    try:
        loaded: Any = datasets.load_dataset(name, split=split)
    except ConnectionError as error:
        raise CorpusError(f"{missing}, and the Hugging Face hub could not be reached: {error}") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CorpusError(f"{missing}, and the Hugging Face hub does not give it: {error}") from error
    cached = sorted({Path(entry["filename"]).parent for entry in loaded.cache_files})
    return DatasetForm(loaded), cached[:1] or [Path(source)]
