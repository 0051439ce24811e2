"""The exact score: each layer's factors against the val gradient, by the cheapest route for each parameter.

Legend: B samples, V val samples, G groups of val samples (one, or domains, or each val sample).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError, UsageError
from ghoststore.settings.train import Route as Route
from indexer.dotprod import routes
from indexer.dotprod.autograd_check import AutogradDots
from indexer.dotprod.ledger import Ledger, Scored, Tapped
from indexer.dotprod.low_rank import DIRECTIONS, LowRank, low_rank, low_rank_dots, low_rank_flops
from indexer.dotprod.metric import AdamMetric
from indexer.dotprod.scores import Scores, divide
from indexer.encode.tap import See
from indexer.layers import LayerType
from indexer.layers.factors import Factors, Outer, Vector

LARGEST_VAL_GRADIENTS = 1 << 28
"""Most numbers in the val gradients of one parameter; beyond that (many groups) it takes the Gram route."""

NEGLIGIBLE = 1e-2
"""A parameter whose gradient is a smaller share of the whole may be rounding noise (that of a key's bias is zero)."""


@dataclass(slots=True)
class ValPass:
    """What a val pass leaves for the scores."""

    group_V: Tensor
    """The group of each val sample."""
    groups: int
    scale: float = 1.0
    """The scale of the val loss. The factors are still multiplied by it; the gradients are divided already."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of parameters on the direct route, by name, (G, *shape): mean gradient of each group, at least float32."""
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    """Of parameters on the low-rank route, in the place of these, once the pass has ended."""
    factors: dict[str, list[tuple[Factors, int]]] = field(default_factory=dict)
    """Of parameters on the Gram route, by name: factors of each val batch, and the index of its first sample."""

    def sizes(self) -> Tensor:
        """(G,) float64: val samples in each group."""
        return torch.bincount(self.group_V, minlength=self.groups).double()

    def shares(self) -> Tensor:
        """(V, G): 1 / size of the group if the sample belongs to it, else 0."""
        member = torch.nn.functional.one_hot(self.group_V, self.groups).double()
        return member / member.sum(0)


class ExactMethod:
    """Exact scores of the parameters in ``ledger``.

    With ``check`` the first informative batch is compared with autograd.
    """

    needs_val = True
    projection = None

    def __init__(
        self,
        ledger: Ledger,
        *,
        route: Route = "auto",
        pairs: bool = False,
        metric: AdamMetric | None = None,
        check: bool = True,
    ) -> None:
        if route not in get_args(Route):
            raise UsageError(f"`route` {route!r} is unknown; known: {', '.join(get_args(Route))}")
        if metric is not None and (route == "gram" or pairs):
            raise UsageError(
                '`score_metric="adam"` multiplies the val gradient: `route="gram"`, which forms none, and `pairs`, '
                "which are plain products, do not go with it. Leave them out"
            )
        self.ledger = ledger
        self.route: Route = route
        self.wants_pairs = pairs
        self._metric = metric
        self.val: ValPass | None = None
        self.routes: dict[str, str] = {}
        """By parameter, chosen in the val pass."""
        self._cast: dict[tuple[str, torch.dtype], Tensor] = {}
        self._raw: dict[str, Tensor] = {}
        self._pairs: Tensor | None = None
        self._train_factors: dict[str, list[Factors]] = {}
        self._calls: dict[str, int] = {}
        self._unchecked = check
        self._dots: AutogradDots | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The scored parameters, by name."""
        return {name: scored.parameter for name, scored in self.ledger.parameters.items()}

    def attach(self, device: torch.device) -> None:
        """Do nothing: there are no matrices to move."""

    @property
    def kinds(self) -> dict[str, LayerType]:
        """The types of the modules to tap, by name."""
        return {name: tapped.kind for name, tapped in self.ledger.tapped.items()}

    @property
    def by_module(self) -> dict[str, list[nn.Parameter]]:
        """By module to tap, the scored parameters whose use in it the tap sees."""
        return self.ledger.by_module

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks that have scores of their own."""
        return self.ledger.blocks

    def to_keep(self, name: str, x: Any, dtype: torch.dtype) -> Any:
        """Keep the layer's input itself, in the dtype that the layer computed with."""
        return self.ledger.tapped[name].kind.held(x, dtype)

    # The val pass.

    def begin_val(self, group_V: Tensor, groups: int, device: torch.device) -> None:
        """Begin a val pass; drop the last one first, so that both are never in memory."""
        self.val, self._cast, self.routes = None, {}, {}
        self.val = ValPass(group_V.to(device), groups)
        if self._metric is None:
            return
        for name, scored in self.ledger.parameters.items():
            if groups * scored.parameter.numel() > LARGEST_VAL_GRADIENTS:
                raise UsageError(
                    f"{groups} val groups are too many for parameter {name!r} of {scored.parameter.numel()} numbers: "
                    '`score_metric="adam"` forms the val gradient of each group. Give fewer groups, or leave it out '
                    "with `exclude_layers`"
                )

    def see_val(self, name: str, first: int, tokens: int, interval: int, batches: int) -> See:
        """See :class:`indexer.dotprod.method.Method`."""
        tapped = self.ledger.tapped[name]

        def see(saved: Any, dy: Tensor) -> None:
            start = first
            for part, dy_part in tapped.kind.parts(saved, dy):
                for full, factors in self._factors(tapped, part, dy_part):
                    scored = self.ledger.parameters[full]
                    if full not in self.routes:
                        val_tokens = batches * dy.numel() // dy.shape[-1]
                        self.routes[full] = self._choose(scored, factors, val_tokens, tokens or val_tokens, interval)
                    self._add_val(scored, factors, start)
                start += len(dy_part)

        return see

    def _choose(self, scored: Scored, factors: Factors, val_tokens: int, tokens: int, interval: int) -> str:
        assert self.val is not None
        if self.route in ("direct", "gram"):
            return self.route
        if isinstance(factors, Vector):
            return "direct"
        shape, groups = scored.parameter.shape, self.val.groups
        if groups * shape.numel() > LARGEST_VAL_GRADIENTS:
            return "gram"  # with a metric refused by begin_val
        wide = min(shape) > DIRECTIONS
        if scored.is_lookup or self.route == "low-rank":
            return "low-rank" if wide and not scored.is_lookup else "direct"
        if self._metric is not None:
            return "direct"
        uses = scored.matrix_uses
        sizes = {"tokens": tokens, "val_tokens": val_tokens, "groups": groups, "interval": interval}
        batch = max(1, tokens // factors.columns.shape[1])
        flops = {
            "direct": uses * routes.direct_flops(shape, batch=batch, **sizes),
            "gram": uses * uses * routes.gram_flops(shape, tokens=tokens, val_tokens=val_tokens),
        }
        if wide:
            flops["low-rank"] = uses * low_rank_flops(shape, **sizes)
        return min(flops, key=lambda route: flops[route])

    def _add_val(self, scored: Scored, factors: Factors, first: int) -> None:
        assert self.val is not None
        name, parameter = scored.name, scored.parameter
        if self.routes[name] == "gram":
            self.val.factors.setdefault(name, []).append((factors, first))
            return
        into = self.val.gradients.get(name)
        if into is None:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            into = torch.zeros(self.val.groups, *parameter.shape, dtype=dtype, device=parameter.device)
            self.val.gradients[name] = into
        count = len(factors.values if isinstance(factors, Vector) else factors.columns)
        routes.add_gradients(factors, self.val.group_V[first : first + count], into)

    def end_val_batch(self) -> None:
        """Do nothing: the taps have added up the batch."""

    def end_val(self, scale: float) -> bool:
        """Divide by the sizes of the groups and the ``scale`` of the loss. Returns whether everything is finite."""
        assert self.val is not None
        sizes = self.val.sizes() * scale
        finite = True
        for gradient in self.val.gradients.values():
            divisor = sizes.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1))
            gradient.div_(divisor)
            finite &= bool(torch.isfinite(gradient).all())
        self.val.scale = scale
        for batches in self.val.factors.values():
            finite &= all(_finite(factors) for factors, _ in batches)
        return finite

    def checked_parameters(self) -> dict[str, nn.Parameter]:
        """Every scored parameter, until a train batch has been compared with autograd."""
        return self.parameters if self._unchecked else {}

    def check_val(self, expected: dict[str, Tensor], tolerance: float) -> None:
        """CaptureError naming the first parameter whose val gradient differs from autograd's."""
        self._dots = AutogradDots(expected)
        assert self.val is not None
        share = self.val.sizes() / len(self.val.group_V)
        floor = NEGLIGIBLE * float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
        for name, gradient in expected.items():
            groups = self.val.gradients.get(name)
            if self.routes.get(name) == "gram":
                mean = self._formed(name, gradient)
            elif groups is None:
                mean = torch.zeros_like(gradient)
            else:
                mean = torch.tensordot(share.to(groups.dtype), groups, dims=1).to(gradient.dtype)
            error, size = float((mean - gradient).norm()), float(gradient.norm())
            if not error <= tolerance * (size + floor):
                raise CaptureError(_mismatch(name, error / size if size else float("inf"), "val gradient"))

    def _formed(self, name: str, like: Tensor) -> Tensor:
        """The mean val gradient of a parameter on the Gram route, which needs none but for its check."""
        assert self.val is not None
        into_1 = torch.zeros(1, *like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        for factors, first in self.val.factors.get(name, []):
            count = len(factors.values if isinstance(factors, Vector) else factors.columns)
            routes.add_gradients(factors, torch.zeros_like(self.val.group_V[first : first + count]), into_1)
        return (into_1[0] / (self.val.scale * len(self.val.group_V))).to(like.dtype)

    def skip_check(self) -> None:
        """Compare nothing with autograd any more."""
        self._dots, self._unchecked = None, False

    def put_in_metric(self) -> bool:
        """See :class:`indexer.dotprod.method.Method`."""
        ready = self._metric is None or self._multiply(self._metric)
        self._shorten()
        return ready

    def _shorten(self) -> None:
        """Put the leading directions of the val gradients in their place, on the low-rank route."""
        assert self.val is not None
        names = [name for name, route in self.routes.items() if route == "low-rank"]
        share_G = self.val.sizes() / len(self.val.group_V)
        for name, short in zip(names, low_rank([self.val.gradients[name] for name in names]), strict=True):
            if short is None:
                self.routes[name] = "direct"
                continue
            self.val.low_rank[name] = short
            del self.val.gradients[name]
            if self._dots is not None:
                dense_GRC = short.dense()
                self._dots.expected[name] = torch.tensordot(share_G.to(dense_GRC.dtype), dense_GRC, dims=1)

    def _multiply(self, metric: AdamMetric) -> bool:
        """Multiply the val gradients by ``metric``; fill them with NaN, and return False, where it is not ready."""
        assert self.val is not None
        parameters = self.parameters
        ready = metric.ready(parameters)
        for name, gradient_G in self.val.gradients.items():
            gradients = [gradient_G] if self._dots is None else [gradient_G, self._dots.expected[name]]
            if ready:
                metric.multiply(name, parameters[name], gradients)
            else:
                for gradient in gradients:
                    gradient.fill_(torch.nan)
        return ready

    # A train batch.

    def begin_train(self, batch: int) -> None:
        """Begin a train batch of ``batch`` samples."""
        self._raw, self._train_factors, self._calls = {}, {}, {}
        self._pairs = None
        if self._dots is not None and batch:
            self._dots.attach(self.ledger)
        elif self._dots is not None:
            self._dots.detach()

    def awaiting_parameters(self) -> list[nn.Parameter]:
        """Every scored parameter, until a train batch has been compared with autograd."""
        return [] if self._dots is None else list(self.parameters.values())

    def called(self, name: str) -> None:
        """Count the uses of module ``name`` in the forward pass of the train batch."""
        for full in self.ledger.tapped[name].parameters.values():
            self._calls[full] = self._calls.get(full, 0) + 1

    def see_train(self, name: str) -> See:
        """See :class:`indexer.dotprod.method.Method`."""
        return partial(self._see_train, self.ledger.tapped[name])

    def _see_train(self, tapped: Tapped, saved: Any, dy: Tensor) -> None:
        scores: dict[str, list[Tensor]] = {}
        # Pairs need the factors of all samples at once.
        for part, dy_part in [(saved, dy)] if self.wants_pairs else tapped.kind.parts(saved, dy):
            for full, factors in self._factors(tapped, part, dy_part):
                score_BG = self._against_val(full, factors)
                if score_BG is not None:
                    scores.setdefault(full, []).append(score_BG)
                if self.wants_pairs:
                    uses = self._train_factors.setdefault(full, [])
                    uses.append(factors)
                    if len(uses) == self._calls[full]:
                        self._add_pairs(full)
        for full, parts in scores.items():
            score_BG = parts[0] if len(parts) == 1 else torch.cat(parts)
            earlier_BG = self._raw.get(full)
            self._raw[full] = score_BG if earlier_BG is None else earlier_BG + score_BG

    def _add_pairs(self, full: str) -> None:
        uses = self._train_factors.pop(full)
        pairs = routes.pairs(uses, self.ledger.parameters[full].parameter.shape).double()
        self._pairs = pairs if self._pairs is None else self._pairs + pairs

    def _against_val(self, full: str, factors: Factors) -> Tensor | None:
        """(B, G) float64: raw scores from one use of a parameter; None if the val loss does not depend on it."""
        assert self.val is not None
        if self.routes.get(full) == "gram":
            dots_BV: Tensor | None = None
            count = len(self.val.group_V)
            for val_factors, first in self.val.factors.get(full, []):
                dots = routes.gram(factors, val_factors).double()
                if dots_BV is None:
                    dots_BV = dots.new_zeros(len(dots), count)
                dots_BV[:, first : first + dots.shape[1]] += dots
            return None if dots_BV is None else (dots_BV / self.val.scale) @ self.val.shares()
        if full in self.val.low_rank:
            assert isinstance(factors, Outer), "the factors of a parameter are of one kind"
            return low_rank_dots(factors, self.val.low_rank[full]).double()
        if full not in self.val.gradients:
            return None
        return routes.direct(factors, self._val_gradient(full, factors)).double()

    def _val_gradient(self, full: str, factors: Factors) -> Tensor:
        """The val gradient in the dtype in which the factors are multiplied; it is cast once for each val pass."""
        assert self.val is not None
        gradient = self.val.gradients[full]
        if isinstance(factors, Vector) or factors.is_lookup or self.val.groups > 1:
            return gradient
        key = (full, routes.product_dtype(factors.rows.dtype))
        if key not in self._cast:
            self._cast[key] = gradient.to(key[1])
        return self._cast[key]

    def scores(self, scale_B: Tensor, share_G: Tensor | None, tolerance: float) -> Scores:
        """See :class:`indexer.dotprod.method.Method`."""
        assert share_G is not None
        if self.wants_pairs:
            for full in list(self._train_factors):  # some uses had no backward pass
                self._add_pairs(full)
        if self._dots is not None and self._dots.is_informative():
            self.check_train(self._raw, self._dots.dots(), tolerance)
            self._dots.detach()
            self._dots, self._unchecked = None, False
        zero_BG = torch.zeros(len(scale_B), len(share_G), dtype=torch.float64, device=scale_B.device)
        # All parameters at once: on a GPU each small operation takes as long as a layer's matrix product.
        scores_PBG = divide(torch.stack([self._raw.get(name, zero_BG) for name in self.ledger.parameters]), scale_B)
        groups = scores_PBG.sum(0)
        parameters = dict(zip(self.ledger.parameters, (scores_PBG @ share_G).unbind(), strict=True))
        blocks: dict[str, Tensor] = {}
        for name, scored in self.ledger.parameters.items():
            block = scored.block
            blocks[block] = blocks[block] + parameters[name] if block in blocks else parameters[name]
        pairs = None if self._pairs is None else divide(divide(self._pairs, scale_B).t(), scale_B).t()
        return Scores(total=groups @ share_G, groups=groups, parameters=parameters, blocks=blocks, pairs=pairs)

    def check_train(self, raw: dict[str, Tensor], expected: dict[str, tuple[float, float]], tolerance: float) -> None:
        """CaptureError naming the first parameter whose raw scores do not add up to autograd's product.

        ``expected`` is (⟨gradient, val gradient⟩, product of their norms) by parameter.
        """
        assert self.val is not None
        share = self.val.sizes() / len(self.val.group_V)
        floor = NEGLIGIBLE * sum(scale for _, scale in expected.values())
        for name, (dot, scale) in expected.items():
            total = float((raw[name] @ share).sum()) if name in raw else 0.0
            if not abs(total - dot) <= tolerance * (scale + floor):
                raise CaptureError(_mismatch(name, abs(total - dot) / scale if scale else float("inf"), "score"))

    def _factors(self, tapped: Tapped, saved: Any, dy: Tensor) -> list[tuple[str, Factors]]:
        factors = tapped.kind.factors(tapped.module, saved, dy)
        return [(full, factors[key]) for key, full in tapped.parameters.items()]


def _finite(factors: Factors) -> bool:
    if isinstance(factors, Vector):
        return bool(torch.isfinite(factors.values).all())
    finite_rows = factors.is_lookup or bool(torch.isfinite(factors.rows).all())  # rows of a lookup are indexes
    return finite_rows and bool(torch.isfinite(factors.columns).all())


def _mismatch(name: str, error: float, what: str) -> str:
    return (
        f"parameter {name!r}: its {what} differs from autograd's by {error:.2g} of its size. It is used where no tap "
        "sees it (a functional call on the weight, a module that was replaced after attaching, a graph that "
        "torch.compile made before attaching: torch._dynamo.reset(), and run the batch anew), a hook of the parameter "
        "changes its gradient, or a second term went backward beside the watched loss (a penalty on the weights: leave "
        "that to the optimizer's weight_decay). Leave it out with `exclude_layers`; `check=False` trusts the taps"
    )
