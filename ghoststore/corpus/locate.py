"""Finding the files of a source: files, folders, patterns, saved datasets, token shards, or a dataset of the hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ghoststore.corpus.formats import FORMS, form_of
from ghoststore.corpus.formats.base import Form
from ghoststore.corpus.formats.dataset import DatasetForm
from ghoststore.corpus.formats.json_document import JsonForm
from ghoststore.corpus.formats.megatron import MegatronForm
from ghoststore.corpus.formats.token_stream import TokenStreamForm
from ghoststore.corpus.hub_folder import files_of_split, is_hub_folder, refuse_pointers
from ghoststore.errors import CorpusError, GhostStoreError, UsageError
from ghoststore.settings.option import in_objects
from ghoststore.store.base.object_path import ObjectPath, location
from ghoststore.store.base.object_patterns import matching

SUPPORTED = (
    f"supported: {', '.join(sorted(FORMS))}, .bin (token ids), a folder of such files, a save_to_disk folder, token "
    "shards"
)
NOT_DATA = {"", ".md", ".yaml", ".yml", ".py", ".idx"}
INFOS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
"""JSON files that say what a dataset is, and are none of its data."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_SOURCE = re.compile(rf"(?P<name>{HUB_NAME.pattern})(?::(?P<config>[\w.+-]+))?:(?P<split>[\w.+%:\[\]-]+)")
BARE_NAME = re.compile(r"[A-Za-z0-9][\w-]*(?::[\w+%:\[\]-]+)?")
"""A name without its owner, as the hub had them once: ``wikitext:train``."""
BETWEEN = "\n"
"""Stands between the paths of a source that is several."""


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
    if in_objects(source) and BETWEEN not in source:
        return _locate_object(source)
    path = Path(source)
    if path.is_file():
        if path.suffix == ".idx" and path.with_suffix(".bin").is_file():
            path = path.with_suffix(".bin")
        form = _form(path)
        if form is None:
            raise CorpusError(f"{path}: unsupported form {path.suffix!r}; {SUPPORTED}; {PIPED}")
        refuse_pointers([path])
        return form, [path]
    if path.is_dir():
        return _locate_folder(path, ())
    if path.exists():
        raise CorpusError(f"{path}: expected a file or a folder, found a device, pipe or socket; {PIPED}")
    if BETWEEN in source and any(in_objects(piece) or os.path.exists(piece) for piece in source.split(BETWEEN)):
        return _locate_several(source.split(BETWEEN))
    if within := _within(source):
        return _locate_folder(*within) if within[0].is_dir() else _locate_key(source, *within)
    if matching := _matching(source):
        return _one_form(source, matching)
    if hub := named_on_hub(source):
        return _locate_on_hub(source, *hub)
    hint = f"; for a dataset of the hub, add its split: {source}:train" if HUB_NAME.fullmatch(source) else ""
    if BARE_NAME.fullmatch(source):
        hint = "; a dataset of the hub is named with its owner and its split: org/name:split, or org/name:config:split"
    if " " in source or "\n" in source:
        hint = "; a text in memory is given in a list, [text]"
    if glob.has_magic(source):
        raise CorpusError(f"{source:.1000}: no file has such a name{hint}")
    raise CorpusError(f"{source:.1000}: does not exist{hint}")


def _locate_object(source: str) -> tuple[Form, list[Path]]:
    """The files of an address in object storage: those that its copy on a disk would have, in the same order."""
    path = _object(source)
    if path.is_file():
        if path.suffix == ".idx" and (ids := path.with_suffix(".bin").looked_up()).is_file():
            path = ids
        form = _form(path)
        if form is None:
            raise CorpusError(f"{path}: unsupported form {path.suffix!r}; {SUPPORTED}")
        refuse_pointers([path])
        return form, [path]
    if matched := _matching(source):
        return _one_form(source, matched)
    if path.is_dir():
        return _locate_folder(path, ())
    if within := _within(source):
        return _locate_folder(*within) if within[0].is_dir() else _locate_key(source, *within)
    if glob.has_magic(source):
        raise CorpusError(f"{source:.1000}: no object has such a name")
    raise CorpusError(f"{source:.1000}: there is no such object, and no folder of objects")


def _object(source: str) -> ObjectPath:
    """The place of an address, with what is there."""
    place = location(source, "corpus")
    assert isinstance(place, ObjectPath)
    return place if glob.has_magic(source) else place.looked_up()


def _form(path: Path) -> Form | None:
    """The form of a file by its suffix; of a .bin by whether an index lies beside it."""
    if path.suffix == ".bin":
        return MegatronForm() if path.with_suffix(".idx").is_file() else TokenStreamForm()
    return form_of(path)


def _within(source: str) -> tuple[Path, tuple[str, ...]] | None:
    """(path, names) of a ``path:split`` or ``path:config:split`` whose path exists."""
    for count in (1, 2):
        path, *names = source.rsplit(":", count)
        if not path or len(names) < count or not all(names):
            continue
        if not in_objects(source):
            if os.path.exists(path):
                return Path(path), tuple(names)
        elif in_objects(path) and (place := _object(path)).exists():
            return place, tuple(names)
    return None


def _matching(source: str) -> list[Path]:
    """The files whose names match a pattern, sorted; none of a source that is no pattern, or that none matches."""
    if not glob.has_magic(source):
        return []
    if in_objects(source):
        return [path for path in matching(_object(source)) if _may_hold_data(path)]
    return [path for path in map(Path, sorted(glob.glob(source, recursive=True))) if _may_hold_data(path)]


def absolute(source: str) -> str:
    """``source`` with its paths made absolute, if it is made of paths. A split of a folder keeps its ``:split``."""
    if BETWEEN in source and not os.path.exists(source):
        return BETWEEN.join(map(absolute, source.split(BETWEEN)))
    if in_objects(source):
        return str(location(source, "corpus"))
    if os.path.exists(source):
        return str(Path(source).resolve())
    if within := _within(source):
        return ":".join([str(within[0].resolve()), *within[1]])
    return os.path.abspath(source) if _matching(source) else source


def exists(source: str) -> bool:
    """Whether the files of a source, which is recorded in a manifest, are there."""
    return all(
        (_object(piece).exists() if in_objects(piece) else os.path.exists(piece))
        or bool(_within(piece) or _matching(piece))
        for piece in source.split(BETWEEN)
    )


def corpus_name(source: str) -> str:
    """A short name for the corpus ``source``, used in default names of parts and runs."""
    if source == "-":
        return "stdin"
    path = Path(source.split(BETWEEN)[0].rstrip("/"))
    name = path.name
    for suffix in (".gz", ".zst", ".jsonl", ".ndjson", ".parquet", ".csv", ".txt", ".bin", *FORMS):
        name = name.removesuffix(suffix)
    return re.sub(r"[*?\[\]]+", "", name).strip("-_.") or path.parent.name if glob.has_magic(name) else name


def _locate_several(sources: Sequence[str]) -> tuple[Form, list[Path]]:
    """The files of several sources, in their order."""
    found: dict[Path, str] = {}
    first: Form | None = None
    for source in sources:
        form, files = _locate(source)
        if first is None:
            first = form
        if isinstance(form, DatasetForm) or form.name == "token-shards":
            raise CorpusError(f"{source}: one of several sources has to be a file, a folder of files or a pattern")
        if form != first:
            raise CorpusError(f"{source}: expected files of one form, found {form.name} after {first.name}")
        for file in files:
            if file.resolve() in found:
                raise CorpusError(f"{file}: is given twice, by {found[file.resolve()]} and by {source}")
            found[file.resolve()] = source
    assert first is not None
    return first, list(found)


def _locate_key(source: str, path: Path, names: Sequence[str]) -> tuple[Form, list[Path]]:
    """The rows under a key of a JSON document."""
    form = form_of(path)
    if not isinstance(form, JsonForm) or len(names) > 1:
        raise CorpusError(
            f"{source}: a split is for a saved DatasetDict, or a folder with files of splits; {path} is a file"
        )
    refuse_pointers([path])
    return JsonForm(form.name, key=names[0]), [path]


def _may_hold_data(file: Path) -> bool:
    return (
        file.suffix.lower() not in NOT_DATA
        and file.name not in INFOS
        and not file.name.startswith(".")
        and file.is_file()
    )


def _one_form(source: object, files: Iterable[Path]) -> tuple[Form, list[Path]]:
    """(form, files) of files that have one form."""
    files = list(files)
    forms: dict[str, Form] = {}
    for file in files:
        form = _form(file)
        if form is None:
            raise CorpusError(f"{file}: unsupported form {file.suffix!r} in a folder of data; {SUPPORTED}")
        forms[form.name] = form
    if len(forms) > 1:
        raise CorpusError(f"{source}: expected files of one form, found {', '.join(sorted(forms))}")
    refuse_pointers(files)
    return forms.popitem()[1], files


def _locate_folder(folder: Path, names: Sequence[str]) -> tuple[Form, list[Path]]:
    """The form and the files of a folder: token shards, a saved dataset, a dataset as the hub has it, or data files of
    one form. ``names`` are its split, if one is given, or its configuration and its split.
    """
    source = ":".join([str(folder), *names])
    if isinstance(folder, ObjectPath):
        _refuse_prepared(folder, source, names)
    if (folder / "shards.json").is_file():
        from ghoststore.tokens.form import ShardsForm
        from ghoststore.tokens.shards import TokenShards

        if names:
            raise CorpusError(f"{source}: a split is for a saved DatasetDict; {folder} holds token shards")
        return ShardsForm(TokenShards.open(folder, verify_on_read=True)), [folder]
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _locate_saved(folder, ":".join(names) or None)
    files = sorted(filter(_may_hold_data, folder.iterdir()), key=lambda file: file.name)
    if names or is_hub_folder(folder, bool(files)):
        return _one_form(source, files_of_split(folder, names))
    if not files:
        raise CorpusError(f"{folder}: no data files in this folder (subfolders are not read); {SUPPORTED}")
    return _one_form(folder, files)


def _refuse_prepared(folder: ObjectPath, source: str, names: Sequence[str]) -> None:
    """CorpusError for a folder in object storage that only a library, or a memory map, can read."""
    listed = sorted(folder.iterdir(), key=lambda path: path.name)
    present = {path.name for path in listed}
    files = sorted(path.suffix for path in listed if _may_hold_data(path))
    pattern = f"{folder}/*{files[0]}" if files else f"{folder}/data/*.parquet"
    if "shards.json" in present:
        raise CorpusError(
            f"{source}: token shards are mapped into memory, which is not done in object storage: copy the folder to "
            "a local disk, or give the corpus that they were made of"
        )
    if present & {"dataset_dict.json", "state.json"}:
        inner = "" if "state.json" in present else "SPLIT/"
        raise CorpusError(
            f"{source}: a dataset that save_to_disk wrote is mapped into memory, which is not done in object storage: "
            f"give its files, `{folder}/{inner}*.arrow`, which have the same rows"
        )
    if names or is_hub_folder(folder, bool(files)):
        raise CorpusError(
            f"{source}: which files a split has is not looked up in object storage: give them by a pattern, such as "
            f"`{pattern}`"
        )


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


def named_on_hub(source: str) -> tuple[str, str | None, str] | None:
    """(name, configuration, split) of the dataset of the hub that ``source`` names; None for what names no such
    dataset, and for paths.
    """
    hub = HUB_SOURCE.fullmatch(source)
    if not hub or form_of(Path(hub["name"])) is not None or os.path.exists(source) or _within(source):
        return None
    return None if _matching(source) else (hub["name"], hub["config"], hub["split"])


def _locate_on_hub(source: str, name: str, config: str | None, split: str) -> tuple[Form, list[Path]]:
    loaded = load_from_hub(source, name, config, split)
    cached = sorted({Path(entry["filename"]).parent for entry in loaded.cache_files})
    return DatasetForm(loaded), cached[:1] or [Path(source)]


def load_from_hub(source: str, name: str, config: str | None, split: str, *, streaming: bool = False) -> Any:
    """A split of a dataset of the hub; with ``streaming`` as a `datasets.IterableDataset`. CorpusError, which calls it
    ``source``, if the hub does not give it.
    """
    import datasets

    missing = f"{source}: no such path exists"
    how: dict[str, bool] = {"streaming": True} if streaming else {}
    try:
        return datasets.load_dataset(name, *([] if config is None else [config]), split=split, **how)
    except ConnectionError as error:
        raise CorpusError(f"{missing}, and the Hugging Face hub could not be reached: {error}") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        advice = f". Name one so: {name}:CONFIG:{split}" if "Config name is missing" in str(error) else ""
        raise CorpusError(f"{missing}, and the Hugging Face hub does not give it: {error}{advice}") from error
