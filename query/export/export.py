"""``ghoststore.export``: writes the rows of a part or a run for other tools."""

from __future__ import annotations

from ghoststore.settings.keywords import takes
from ghoststore.settings.store import ExportOptions
from ghoststore.store.manage.export import ExportReport, export_vectors


@takes(ExportOptions)
def export(options: ExportOptions) -> ExportReport:
    """Write the vectors of a part, or of a ``run`` that keeps gradients, to a new file; or its rows for other tools.

    They are decoded to float32, with id, domain, source row, loss, tokens and norms of each row. A ``.parquet`` file
    holds all in one table; beside a ``.safetensors`` or ``.npy`` file of vectors, a ``.rows.jsonl`` file has the rest.
    For a run each row is a sample of a step, with ``step``, ``rank``, ``place``, score, loss and learning rate. Where
    a step chose among candidates, ``weight`` says how each counted: 0, it was not trained on. Rows without a vector are
    left out, unless ``unusable``, and so are those that do not match ``where``, an SQL condition on the columns that
    ``ghoststore.query`` lists. Fields that the part keeps are written with the others.

    ``dtype="stored"`` writes the numbers as stored: bfloat16 as such in safetensors and as its bits (uint16) elsewhere,
    codes of int8 and onebit with the ``scale`` of each row and block (not to ``.npy``, which cannot hold it). Some
    thousand rows are in memory at a time. Files appear whole or not at all.

    ``format="datasets"`` writes a part to a folder that ``datasets.load_from_disk`` opens: the same columns, and the
    ``text`` of each row, from the store or the corpus (``data``). ``format="embedding-atlas"`` writes a ``.parquet``
    file for that program: the columns but the vectors, ``text``, a place ``x``, ``y`` on a map of the vectors, and the
    ``neighbors`` nearest rows by cosine; ``max_rows`` takes a random sample by ``seed``.

    UsageError for an unknown form, a file that exists, and more rows than a map takes; CorruptError if what is read is
    damaged, StorageError if the disk refuses.
    """
    # Imported where they are used: a table of vectors needs no torch.
    if options.format == "embedding-atlas":
        from query.export.atlas import export_atlas

        return export_atlas(options)
    if options.format == "datasets":
        from query.export.dataset import export_dataset

        return export_dataset(options)
    return export_vectors(options)
