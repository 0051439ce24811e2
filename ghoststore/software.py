"""Versions of software, for manifests."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

NOT_INSTALLED = "not installed"


THAT_MATTER = ("torch", "transformers", "zarr", "numpy")
"""Packages whose versions can change what a command computes or writes."""
IF_THERE = ("faiss-cpu", "faiss-gpu")


def versions_that_matter(own: str) -> list[str]:
    """Lines for a report of what somebody saw: ghoststore's ``own`` version first, then what it stands on."""
    found = {"ghoststore": own, **versions_of(*THAT_MATTER, *IF_THERE)}
    return [f"{name} {of}" for name, of in found.items() if name not in IF_THERE or of != NOT_INSTALLED]


def versions_of(*packages: str) -> dict[str, str]:
    """The versions of Python and of each package, or "not installed"."""
    return {"python": platform.python_version()} | {package: _version(package) for package in packages}


@cache  # to parse what a package says of itself takes milliseconds, and each build, training and query asks
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED
