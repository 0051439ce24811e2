"""A folder of inner products of exact gradients, block by block, so that an interrupted computation can continue.

A block covers a range of val samples and a range of rows. It is a .npz file, and a .json record with its checksum,
which is written last: a block without its record does not exist.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ghoststore.errors import CorruptError, MismatchError
from ghoststore.store.base.disk import exclusive, replace, storage_errors, sweep
from ghoststore.store.base.manifest import Kind, Manifest, refuse_differences
from ghoststore.store.base.records import json_digest, read_record, write_record
from query.exact.products import SHARES, Products, Share

MANIFEST = "manifest.json"
KIND = Kind(
    name="folder of exact products",
    made="computed",
    identity=("version", "part", "val", "grid"),
    description=(),
    parameter="out",
)
VERSION = 1
ARRAYS = ("dots_QR", "val_Q", "row_R")


@dataclass(frozen=True, slots=True)
class Block:
    """The pairs of the val samples ``vals`` and the rows ``rows``."""

    vals: slice
    rows: slice

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"vals-{self.vals.start:05d}-rows-{self.rows.start:08d}.npz"


def grid(vals: int, vals_at_once: int, rows: int, rows_at_once: int) -> list[Block]:
    """All blocks. Those of the same val samples follow each other."""
    return [
        Block(slice(val, min(val + vals_at_once, vals)), slice(row, min(row + rows_at_once, rows)))
        for val in range(0, vals, vals_at_once)
        for row in range(0, rows, rows_at_once)
    ]


class BlockFiles:
    """The blocks in ``folder``, which is made if it does not exist. ``identity`` is everything that the numbers depend
    on, in the sections of `KIND`.

    MismatchError if the folder has another identity, CorruptError if its manifest is damaged.
    """

    def __init__(self, folder: Path, identity: Manifest) -> None:
        self.folder = folder
        identity = {"version": VERSION, **identity}
        self._digest = json_digest(identity)
        path = folder / MANIFEST
        with storage_errors(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                refuse_differences(_record(path), identity, str(folder), KIND)
            except FileNotFoundError:
                write_record(path, identity)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock of the folder while blocks are written. BusyError if another process writes."""
        with exclusive(self.folder, f"the folder {self.folder}", "out"):
            sweep(self.folder)
            yield

    def write(self, block: Block, products: dict[Share, Products]) -> None:
        """Write ``products``. Equal numbers give equal bytes."""
        file = io.BytesIO()
        arrays = {_key(share, name): getattr(products[share], name) for share in SHARES for name in ARRAYS}
        np.savez(file, allow_pickle=False, **arrays)
        data = file.getvalue()
        path = self.folder / block.name
        with storage_errors(str(path)):
            replace(path, data)
            write_record(path.with_suffix(".json"), {"of": self._digest, "sha256": hashlib.sha256(data).hexdigest()})

    def read(self, block: Block) -> dict[Share, Products] | None:
        """The products of ``block``, or None if it was not written.

        CorruptError if the file is damaged, MismatchError if it belongs to another identity.
        """
        path = self.folder / block.name
        try:
            record, data = _record(path.with_suffix(".json")), path.read_bytes()
        except FileNotFoundError:
            return None
        if record.get("of") != self._digest:
            raise MismatchError(
                f"{path} is of another evaluation (other data, model or settings); remove it, or give `out` another "
                "folder"
            )
        if record.get("sha256") != hashlib.sha256(data).hexdigest():
            raise CorruptError(f"{path} is damaged (its checksum does not hold); remove it, and it is computed anew")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {share: Products(*(arrays[_key(share, name)] for name in ARRAYS)) for share in SHARES}


def _key(share: Share, name: str) -> str:
    return f"{share}_{name}"


def _record(path: Path) -> dict[str, Any]:
    try:
        return read_record(path)
    except CorruptError as error:
        raise CorruptError(f"{error}; remove it, and it is made anew") from error
