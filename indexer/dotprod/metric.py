"""The metric of the optimizer: a step of Adam along ∇ℓ_i changes L_val by −η⟨∇ℓ_i, P ∇L_val⟩ to first order.

P = 1/(√v̂ + ε), element by element, v̂ Adam's second moment with its bias correction (Kingma, Ba 2015, algorithm 1).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ghoststore.errors import UsageError
from indexer.layers.base import at_least_float

KNOWN = (torch.optim.Adam, torch.optim.AdamW)


class AdamMetric:
    """The metric of torch's Adam or AdamW: plain, foreach or fused, with or without amsgrad.

    UsageError for another optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is None:
            raise UsageError(
                '`score_metric="adam"` takes the second moments of the optimizer: give `optimizer=optimizer`'
            )
        if type(optimizer) not in KNOWN:
            raise UsageError(
                f'`score_metric="adam"` knows torch.optim.Adam and AdamW, not {type(optimizer).__name__}: train with '
                'one of them, or give `score_metric="sgd"`'
            )
        self._optimizer = optimizer
        self._warned: set[str] = set()

    def ready(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether the optimizer has made its first step. UsageError for a parameter that it does not have."""
        optimized = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        for name, parameter in parameters.items():
            if id(parameter) not in optimized:
                raise UsageError(
                    f'parameter {name!r} is not in the optimizer, so `score_metric="adam"` has no second moment of it: '
                    "give it to the optimizer, or leave it out with `exclude_layers`"
                )
        return any(self._optimizer.state.get(parameter) for parameter in parameters.values())

    def multiply(self, name: str, parameter: nn.Parameter, gradients: Iterable[Tensor]) -> None:
        """Multiply ``gradients``, each (…, *shape of the parameter), by the present P, in place.

        A parameter without a second moment, where others have theirs, never had a gradient, so no step moved it: its
        P is zero, with a RuntimeWarning.
        """
        state = self._optimizer.state.get(parameter)
        scale = self._scale(parameter, state) if state else torch.zeros((), device=parameter.device)
        for gradient in gradients:
            if not state and name not in self._warned and bool(gradient.any()):
                self._warned.add(name)
                warnings.warn(
                    f"parameter {name!r} never had a gradient, so Adam has no second moment of it: it counts as zero "
                    "in the scores until it has one",
                    RuntimeWarning,
                    stacklevel=2,
                )
            gradient.mul_(scale)

    def _scale(self, parameter: nn.Parameter, state: Mapping[str, Any]) -> Tensor:
        """1/(√v̂ + ε), at least float32, as torch's step divides."""
        group = next(group for group in self._optimizer.param_groups if any(p is parameter for p in group["params"]))
        v = at_least_float(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].detach())
        correction = 1.0 - float(group["betas"][1]) ** float(state["step"])
        root: Tensor = v.sqrt() / correction**0.5
        return root.add_(float(group["eps"])).reciprocal_()
