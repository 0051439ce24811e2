"""Check: which hardware computes here, and does it suit the device and dtype options?"""

from __future__ import annotations

from typing import Any

import torch

from ghoststore.machine import CORES, available_memory, computes_bfloat16, processor, total_memory
from ghoststore.software import versions_of
from query.doctor.finding import Check, Finding, right
from query.doctor.subject import Subject


def examine(subject: Subject) -> Finding:
    """Describe the machine. Advises another device or dtype if this machine would be faster with it."""
    device, dtype = subject.models.device, subject.models.dtype
    cuda = device.startswith("cuda")
    bfloat16, total = computes_bfloat16(device), total_memory(device)
    details: dict[str, Any] = {
        "device": device,
        "name": torch.cuda.get_device_name(device) if cuda else processor(),
        "cores": CORES,
        "threads": torch.get_num_threads(),
        "bfloat16_in_hardware": bfloat16,
        "memory_bytes": total,
        "available_bytes": available_memory(device),
        "software": versions_of("ghoststore", "torch", "transformers", "numpy", "zarr"),
    }
    advice = []
    if not cuda and torch.cuda.is_available():
        advice.append("There is a CUDA device: `device=cuda` builds many times faster.")
    if dtype == "bfloat16" and not bfloat16:
        advice.append(f"{details['name']} has no instructions for bfloat16: float32 is faster here.")
    if dtype == "float16" and not cuda:
        advice.append("float16 on a CPU is slow and has a narrow range: use float32 or bfloat16.")
    if not cuda and torch.get_num_threads() < CORES:
        advice.append(f"torch uses {torch.get_num_threads()} of {CORES} cores: is OMP_NUM_THREADS meant to be set?")
    summary = (
        f"{details['name']}, {total / 2**30:.0f} GiB, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"bfloat16 {'in hardware' if bfloat16 else 'emulated'}"
    )
    return right(summary, *advice, **details)


CHECK = Check(name="machine", asks="What computes here?", run=examine)
