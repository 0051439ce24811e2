"""The store on disk: parts of vectors and training runs, committed span by span. Format: ``docs/format.md``."""

from ghoststore.store.commits import Commit
from ghoststore.store.layout import FORMAT_VERSION, PartLayout
from ghoststore.store.manifest import Manifest
from ghoststore.store.part import Part
from ghoststore.store.run import RowTable, Run, RunLayout, RunWriter, create_run
from ghoststore.store.status import Status
from ghoststore.store.store import Store

__all__ = [
    "FORMAT_VERSION",
    "Commit",
    "Manifest",
    "Part",
    "PartLayout",
    "RowTable",
    "Run",
    "RunLayout",
    "RunWriter",
    "Status",
    "Store",
    "create_run",
]
