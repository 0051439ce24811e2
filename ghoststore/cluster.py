"""Ray clusters: joining one, or starting one on this machine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ghoststore.errors import UsageError


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Any]:
    """The module ``ray``, connected while the block runs.

    ``address`` is that of a cluster. None: the one that this process has joined, that of RAY_ADDRESS, the one that runs
    on this machine, or else a new one of this machine alone, which ends with the block.

    UsageError if Ray is not installed or the cluster cannot be joined.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    try:
        import ray
    except ImportError:
        raise UsageError("`engine=ray` needs Ray: pip install 'ghoststore[ray]'") from None
    if ray.is_initialized():
        if address is not None and address != ray.get_runtime_context().gcs_address:
            raise UsageError(
                f"`ray_address={address}`: this process has joined another cluster, "
                f"{ray.get_runtime_context().gcs_address}; leave that (`ray.shutdown()`), or give no address"
            )
        yield ray
        return
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"`ray_address={address}`: no Ray cluster can be joined there: {error!s:.300}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def runtime_environment() -> dict[str, Any]:
    """What Ray's workers on this machine are given, so that they import what this process imports."""
    return {
        "env_vars": {
            "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),
            "TOKENIZERS_PARALLELISM": "false",
        }
    }
