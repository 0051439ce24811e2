"""Parts of chosen vectors, written as a build writes them, without a model: clusters, unusable rows, gaps."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from ghoststore.store import Part, PartLayout, Status, Store
from ghoststore.store.part.part import create_part
from ghoststore.store.part.sealing import seal_vectors
from ghoststore.store.spans.writer import BackgroundWriter, SpanData

ROWS, DIMENSION, SPAN_ROWS = 400, 96, 50
SECTIONS: dict[str, Any] = {
    "checkpoint": {},
    "tokenizer": {},
    "corpus": {
        "fingerprint": "sha256:c",
        "samples": 400,
        "max_samples": None,
        "domains": ["sky", "earth"],
        "repeated_ids": None,
        "fields": {},
    },
    "tokens": {"max_length": 16, "overlong": "truncate"},
    "loss": {"definition": "", "reduction": "mean"},
    "projection": {
        "layers": ["mlp"],
        "exclude_layers": [],
        "include_embeddings": False,
        "kind": "gaussian",
        "seed": 0,
        "rank_total": None,
        "rank_min": None,
        "compress": None,
        "compress_by": "layer",
        "precondition": "none",
        "damping": None,
        "calibration": None,
        "calibration_samples": None,
        "optimizer_state": None,
        "kronecker_dimension": DIMENSION,
        "hash": None,
    },
    "layers": [],
    "batching": {"batch_tokens": 2048, "padding": True},
    "dtype": {"model": "float32"},
    "source": {"checkpoint": "model", "tokenizer": None, "data": "data", "form": "jsonl", "optimizer_state": None},
    "software": {},
    "compute": {"attn_implementation": None, "gradient_checkpointing": False},
    "coverage": {"share": 1.0},
}
"""Of a manifest: what every part has, and no test reads."""
UNUSABLE = (0, 7, 120, 399)
ZERO = 13


def clustered(rows: int = ROWS, dimension: int = DIMENSION, clusters: int = 8, seed: int = 0) -> np.ndarray:
    """(rows, dimension) float32 around a few centres, with lengths that differ a hundredfold."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, dimension))
    vectors = centres[rng.integers(0, clusters, rows)] + rng.standard_normal((rows, dimension))
    return (vectors * np.exp(rng.uniform(-2.3, 2.3, (rows, 1)))).astype(np.float32)


def make_part(
    store: Path,
    vectors: np.ndarray,
    *,
    name: str = "part",
    dtype: str = "float32",
    unusable: Collection[int] = UNUSABLE,
    spans: Collection[int] | None = None,
    chunk_rows: int = SPAN_ROWS // 2,
) -> Part:
    """A part with these rows, of two domains; ``spans`` are committed, by default all. Called again, others are."""
    rows, dimension = vectors.shape
    layout = PartLayout(
        rows=rows,
        dimension=dimension,
        groups=2,
        dtype=dtype,
        span_rows=SPAN_ROWS,
        chunk_rows=chunk_rows,
        store_text=False,
    )
    half = dimension // 2
    storage = {
        "rows": rows,
        "dimension": dimension,
        "dtype": dtype,
        "span_rows": layout.span_rows,
        "store_text": False,
        "chunk_rows": layout.chunk_rows,
        "groups": [["a", 0, half], ["b", half, dimension]],
    }
    manifest = {**SECTIONS, "storage": storage}
    part = create_part(Store.create(store).part_path(name), manifest, np.zeros((1, 5), dtype=np.int64))
    with BackgroundWriter(part) as writer:
        for span in range(layout.spans) if spans is None else spans:
            start, stop = layout.span_of(span)
            arrays = {
                spec.name: np.zeros(stop - start, dtype=object if spec.dtype is str else spec.dtype)
                for spec in layout.arrays()
            }
            arrays["sample_id"] = np.array([f"row-{row}" for row in range(start, stop)], dtype=object)
            arrays["source_row"] = np.arange(start, stop)
            arrays["domain"] = (np.arange(start, stop) % 2).astype(np.int16)
            arrays["status"][[row - start for row in unusable if start <= row < stop]] = Status.EMPTY
            seal_vectors(arrays, vectors[start:stop].copy(), part)
            writer.put(SpanData(span, arrays))
    return Part(part.path)
