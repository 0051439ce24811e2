"""Models that bitsandbytes has in 8 or 4 bits: they are widened when they are loaded, and their layers are ordinary.

Of 4 bits that changes nothing, because bitsandbytes multiplies by the widened numbers, too. With 8 bits it also rounds
the activations, by scales that depend on what else is in the batch; the widened model does not.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ghoststore.checkpoint.bounds import CONFIG, read_object
from ghoststore.errors import CheckpointError


def bits_of(folder: Path) -> int | None:
    """8 or 4 if the model in ``folder`` is quantised by bitsandbytes, by its configuration; else None."""
    settings = read_object(folder / CONFIG).get("quantization_config")
    if not isinstance(settings, dict) or not str(settings.get("quant_method", "bitsandbytes")).startswith("bitsandb"):
        return None
    return next((bits for bits in (8, 4) if settings.get(f"load_in_{bits}bit") is True), None)


def refuse_unreadable(folder: Path) -> None:
    """CheckpointError if the model in ``folder`` is quantised by bitsandbytes, and that is not installed."""
    bits = bits_of(folder)
    if bits is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise CheckpointError(
            f"checkpoint {folder} is quantised to {bits} bits by bitsandbytes, which reads it: pip install "
            "'ghoststore[bitsandbytes]'; or give the model that it was quantised from"
        )


def widened(model: Any, dtype: Any) -> Any:
    """A quantised ``model`` of transformers, with ordinary layers in ``dtype``."""
    import torch

    return model.dequantize(torch.float32).to(dtype)
