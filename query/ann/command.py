"""``ghoststore.index``: build a FAISS index of a part and measure its recall.

The defaults for each size of part come from ``benchmarks/index.py``; see ``docs/approximate-index.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ghoststore.errors import CorruptError, MismatchError, UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.store import Dimension, IndexOptions
from ghoststore.store import Part, Store
from ghoststore.store.base.names import check_name, safe_name
from ghoststore.store.base.own import is_own_digest
from ghoststore.store.base.writable import check_writable
from ghoststore.store.part.index_manifest import IndexManifest
from ghoststore.store.part.indexes import (
    check_coverage,
    damage_of,
    index_folder,
    index_names,
    read_manifest,
)
from ghoststore.store.part.metric import metric_for
from ghoststore.store.part.part import OF_UNION
from query.ann.build import Plan, build_index
from query.ann.engine import check_device, load_faiss
from query.search.part_score import Metric
from query.search.parts import named_parts, part_names

FRONT_DIMENSION = 1024
FRONT_FROM = 2 * FRONT_DIMENSION
"""Vectors with more numbers than this are sketched to ``FRONT_DIMENSION`` before they go into FAISS."""
ONE_BIT_FROM = 256
"""Numbers of a vector from which one bit for each is enough to rank rows; shorter vectors take eight bits."""
LISTS_FROM = 250_000
"""Rows from which inverted lists pay off. Fewer rows are scanned whole in a few milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexReport:
    """What ``ghoststore.index`` returns."""

    store: str
    part: str
    name: str
    built: bool
    """False if an intact, current index with these settings existed already."""
    manifest: IndexManifest
    """The settings, the size and the measured recall of the index."""

    def to_json(self) -> dict[str, Any]:
        """The document that ``ghoststore index --json`` prints."""
        head = {"store": self.store, "part": self.part, "name": self.name, "built": self.built}
        return head | self.manifest.to_json()


@takes(IndexOptions)
def index(options: IndexOptions) -> IndexReport:
    """Build a FAISS index of the committed rows of a part, or of several that are ranked as one, unless a current one
    with these settings exists.

    ``factory`` is a FAISS factory string; the default depends on the number of rows and on the dimension. Vectors of
    more than 2,048 numbers are first sketched to 1,024; ``dimension`` gives another number, or ``none`` for no sketch.
    The search is tuned until its recall at 10, measured against exact search, reaches ``target_recall``. If no setting
    reaches it, the best one is kept and a note says so. A stale or damaged index of that name is built again;
    ``rebuild`` builds any index again. Queries that have the old index open go on with it.

    Raises UsageError for a factory string that FAISS rejects, an impossible dimension, a part without usable rows, if
    FAISS (or a FAISS for that ``device``) is not installed, and if an index of that name has other settings;
    CorruptError for damaged rows; BusyError while another process builds the index; StorageError if the disk refuses.
    """
    progress = options.progress or Silent()
    if not 0 < options.target_recall <= 1:
        raise UsageError(f"`target_recall` must be above 0 and at most 1, not {options.target_recall}")
    load_faiss()
    check_device(options.device)
    part = _part(options, progress)
    metric = metric_for(options.metric, [part])
    plan = _plan(part, options.factory, metric, options.name, options.dimension, options.target_recall, options.device)
    manifest = None if options.rebuild else existing(part, plan, progress)
    built = manifest is None
    if manifest is None:
        part.caches.mkdir(parents=True, exist_ok=True)
        check_writable(part.caches)
        manifest = build_index(part, plan, progress)
    if not manifest.reached:
        progress.note(
            f"index {plan.name!r} finds {manifest.recall_at_10:.3f} of the exact ten best; {options.target_recall} "
            "were asked for. Try a larger code (SQ8, SQfp16), or `dimension=none`"
        )
    return IndexReport(store=str(options.store), part=part.name, name=plan.name, built=built, manifest=manifest)


def _part(options: IndexOptions, progress: Progress) -> Part:
    """The part to index, or the union of several. UsageError for several that are summed."""
    names = part_names(options.part)
    if len(names) == 1:
        return Store.open(options.store).part(names[0])
    part, *others = named_parts(options.store, options.part, progress)
    if others:
        shown = ", ".join(repr(part.name) for part in (part, *others))
        raise UsageError(
            f"an index is of one part, or of parts that are ranked as one; {shown} are summed. Index each of them"
        )
    return part


def _plan(
    part: Part, factory: str | None, metric: Metric, name: str | None, dimension: Dimension, target: float, device: str
) -> Plan:
    front_dimension = choose_dimension(dimension, part.layout.dimension)
    if factory is None:
        factory = choose_factory(int(part.usable().sum()), front_dimension, device)
    dimension_label = [] if dimension == "auto" else [str(dimension)]
    chosen = safe_name(metric, factory, *dimension_label) if name is None else name.removesuffix(part.tag)
    if OF_UNION.fullmatch(chosen):
        raise UsageError(f"`name={chosen}`: names of indexes over several parts end like this; give another")
    return Plan(
        name=check_name(chosen + part.tag, "index"),
        factory=factory,
        metric=metric,
        front_dimension=front_dimension,
        target_recall=target,
        device=device,
    )


def existing(part: Part, plan: Plan, progress: Progress) -> IndexManifest | None:
    """The manifest of the index that ``plan`` describes, if that exists, is intact and is current; else None.

    A note says why an index must be built again. UsageError if one of that name has other settings.
    """
    if plan.name not in index_names(part):
        return None
    try:
        manifest = read_manifest(part, plan.name)
        for setting in ("factory", "metric", "front_dimension", "target_recall"):
            wanted, stored = getattr(plan, setting), getattr(manifest, setting)
            if wanted != stored:
                raise UsageError(
                    f"index {plan.name!r} of part {part.name!r} has {setting} {stored!r}, not {wanted!r}: give "
                    "`rebuild` to replace it, or another `name`"
                )
        check_coverage(part, plan.name, manifest)
        for path, problem in damage_of(index_folder(part, plan.name), manifest):
            raise CorruptError(f"{path}: {problem}")
        if not is_own_digest(manifest.digest):
            raise MismatchError(f"index {plan.name!r} of part {part.name!r} was built elsewhere")
    except (MismatchError, CorruptError) as error:
        progress.note(f"{error}: building it again")
        return None
    progress.note(f"index {plan.name!r} is there and current; `rebuild` builds it again")
    return manifest


def choose_dimension(wanted: Dimension, dimension: int) -> int:
    """How many numbers a vector of ``dimension`` numbers has in FAISS. UsageError for an impossible ``wanted``."""
    if wanted == "none":
        return dimension
    if wanted == "auto":
        return FRONT_DIMENSION if dimension > FRONT_FROM else dimension
    if not isinstance(wanted, int) or not 0 < wanted <= dimension:
        raise UsageError(f"`dimension={wanted}`: give 1 to {dimension:,} (the part's vectors), none or auto")
    return wanted


def choose_factory(rows: int, dimension: int, device: str) -> str:
    """The default FAISS factory string for ``rows`` rows of ``dimension`` numbers."""
    lists = 1 << round(math.log2(4 * math.sqrt(max(rows, 1))))
    if device != "cpu":  # the GPU has no one-bit index
        return f"IVF{lists},SQ8" if rows >= LISTS_FROM else "Flat"
    code = "RaBitQ" if dimension >= ONE_BIT_FROM else "SQ8"
    return f"IVF{lists},{code}" if rows >= LISTS_FROM else code
