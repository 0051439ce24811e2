"""What a model cannot do with positions that have one row for each sample.

An index of positions runs once for all samples. The hooks repeat its output, so that each sample has a gradient of its
own. A model that counts the axes of that output fails then with an error of its own, which does not say why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from ghoststore.errors import GhostStoreError
from indexer.encode.sample_axis import no_positions


class Expanded:
    """The layers whose outputs were repeated for each sample in the open batch."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Expanded:
        """A copy of the model knows of no batch."""
        return Expanded()

    @contextmanager
    def named(self, model: nn.Module) -> Iterator[None]:
        """While open, an error of the forward pass of ``model`` names these layers, if there are any."""
        if "forward" in vars(model):  # somebody's own
            yield
            return
        model.forward = partial(_forward, self, model)
        try:
            yield
        finally:
            vars(model).pop("forward", None)


def _forward(expanded: Expanded, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward: Callable[..., Any] = type(model).forward
    try:
        return forward(model, *args, **kwargs)
    except GhostStoreError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as problem:
        if not expanded.names:
            raise
        raise no_positions(expanded.names, problem) from problem
