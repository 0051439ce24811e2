"""Facts about this machine: processor, memory, and support for bfloat16."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Cores that this process may use."""

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def processor() -> str:
    """The name of the CPU, or "unknown"."""
    return _cpu_facts().get("model name") or platform.processor() or "unknown"


def computes_bfloat16(device: str = "cpu") -> bool:
    """Whether ``device`` has instructions for bfloat16. Without them it is emulated and slow."""
    if device.startswith("cuda"):
        import torch

        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    facts = _cpu_facts()
    return not _BFLOAT16_FLAGS.isdisjoint(f"{facts.get('flags', '')} {facts.get('Features', '')}".split())


def total_memory(device: str = "cpu") -> int:
    """Bytes of memory of ``device``."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory(device: str = "cpu") -> int | None:
    """Bytes of ``device`` that are free for new work; None if the system does not say."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _cpu_facts() -> dict[str, str]:
    """The entries of the first processor in ``/proc/cpuinfo``; empty if there is no such file."""
    facts: dict[str, str] = {}
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return facts


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
