"""Exported rows as Arrow tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from ghoststore.store.manage.exported import Rows, Source, columns_of, dtype_of


class ArrowTables:
    """Makes tables of the rows of ``source``: its fields, ``norm`` with a number for each block, and ``vector``, with
    ``scale`` where it is exported as stored with scales.
    """

    def __init__(self, source: Source, *, vectors: bool = True) -> None:
        import pyarrow

        self._arrow = pyarrow
        groups = len(source.groups)
        fields = {name: getattr(pyarrow, kind)() for name, kind in source.fields.items()}
        if "norm" in fields:
            fields["norm"] = pyarrow.list_(pyarrow.float32(), groups)
        if vectors:
            fields["vector"] = pyarrow.list_(pyarrow.from_numpy_dtype(dtype_of(source)), columns_of(source))
            if source.stored and source.encoding.scaled:
                fields["scale"] = pyarrow.list_(pyarrow.float32(), groups)
        self.schema: Any = pyarrow.schema(fields)

    def of(self, rows: Rows) -> Any:
        """A table of ``rows``."""
        arrow = self._arrow
        values = {**rows.fields, "vector": rows.vectors, "scale": rows.scale}
        arrays = []
        for field in self.schema:
            column = values[field.name]
            if arrow.types.is_fixed_size_list(field.type):
                flat = arrow.array(np.ascontiguousarray(column).reshape(-1), type=field.type.value_type)
                arrays.append(arrow.FixedSizeListArray.from_arrays(flat, type=field.type))
            else:
                # NumPy's texts, and Python's objects: not every pyarrow reads the former.
                values_of_field = column.tolist() if column.dtype.kind in "OT" else column
                arrays.append(arrow.array(values_of_field, type=field.type))
        return arrow.Table.from_arrays(arrays, schema=self.schema)
