"""Versions of what computes and writes, for manifests."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version


def versions_of(*packages: str) -> dict[str, str]:
    """The version of Python and of each package; "not installed" for one that is not."""
    return {"python": platform.python_version()} | {package: _version(package) for package in packages}


@cache  # to parse what a package says of itself takes milliseconds, and each build, training and query asks
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
