"""The store on disk: parts of vectors and training runs, committed span by span. Format: ``docs/format.md``."""

from ghoststore.store.base.manifest import Manifest
from ghoststore.store.base.names import FORMAT_VERSION
from ghoststore.store.part.layout import PartLayout
from ghoststore.store.part.part import Part
from ghoststore.store.part.status import Status
from ghoststore.store.run.run import RowTable, Run, RunLayout, RunWriter, create_run
from ghoststore.store.spans.commits import Commit
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
