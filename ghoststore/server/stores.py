"""The stores of one server, by name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from ghoststore.errors import UsageError
from ghoststore.settings.option import refuse_remote
from ghoststore.settings.serve import ExplorerOptions, ServeOptions, Stores

NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", re.DOTALL)
"""``name=path``. A path that has this form is written ``./name=path``."""
OF_ONE = ("checkpoint", "base", "tokenizer", "data")
"""Options that name what one store was made from."""


def served_stores(options: ExplorerOptions) -> dict[str, ServeOptions]:
    """The options of each store, by its name. UsageError as :func:`stores_of`, and for what only one store can have."""
    named = stores_of(options.store)
    if len(named) > 1 and (given := [name for name in OF_ONE if getattr(options, name) is not None]):
        raise UsageError(f"`{given[0]}` is that of one store, and these are {len(named)}: serve that one alone")
    shared = {spec.name: getattr(options, spec.name) for spec in fields(ServeOptions) if spec.name != "store"}
    return {name: ServeOptions(store=path, **shared) for name, path in named.items()}


def stores_of(given: Stores) -> dict[str, str | Path]:
    """The path of each store by its name: the given one, or the name of its folder. UsageError if two have one name."""
    entries = list(given.items()) if isinstance(given, Mapping) else [_entry(word) for word in _list(given)]
    named: dict[str, str | Path] = {}
    for name, path in entries:
        refuse_remote("store", path)
        if name in named:
            raise UsageError(
                f"two stores are called {name!r}, {named[name]} and {path}: name one, `store=other={path}`, or in "
                "Python give a dict of names and paths"
            )
        if not NAMED.fullmatch(f"{name}=x"):
            raise UsageError(
                f"{name!r:.80} is no name of a store: letters, digits, '.', '_' and '-', `store=name={path}`"
            )
        named[name] = path if isinstance(path, str) else Path(path)
    if not named:
        raise UsageError("`store` is empty: give at least one")
    return named


def _list(given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str | os.PathLike[str]]:
    return list(given) if isinstance(given, list | tuple) else [given]  # type: ignore[list-item]


def _entry(word: str | os.PathLike[str]) -> tuple[str, str | Path]:
    if not isinstance(word, str | os.PathLike):
        raise UsageError(f"`store` is a path, a list of them, or a dict of names and paths, not {word!r:.80}")
    match = NAMED.fullmatch(word) if isinstance(word, str) else None
    if match is not None:
        return match[1], match[2]
    path = word if isinstance(word, str) else Path(word)
    folder = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(os.path.abspath(path)).name).lstrip("._-")
    return folder or "store", path
