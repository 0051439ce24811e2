"""A head that is computed in one with the losses of its tokens, from its weight, without its module being called.

TRL adds one to every model that it trains: ``model(…, labels=labels, fused_lm_head=True)`` returns ``log_probs`` of the
targets and no logits. Here the gradient at the logits is computed once more, from what the backward pass brings to the
log-probabilities, so that the head is scored as if its module had run.

Legend: B samples, T positions of a row, L positions of the longest sample, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import CaptureError, UsageError
from indexer.dotprod.method import Method
from indexer.dotprod.open_batch import OpenBatch
from indexer.encode.losses import IGNORED
from indexer.encode.modes import autocast_dtype, outside_graphs, without_autocast

CHUNK_NUMBERS = 1 << 25
"""Logits in memory at a time."""
TOLERANCE, NARROW_TOLERANCE = 1e-3, 0.1
"""Largest difference of a log-probability from that of the head's formula, in float32 and in 16 bits."""


def token_log_probs(output: Any) -> Tensor | None:
    """(B, T - 1): the log-probabilities of the targets in the output of a fused head; None for any other output."""
    log_probs = getattr(output, "log_probs", None)
    mask = getattr(output, "label_mask", None)
    if not isinstance(log_probs, Tensor) or not isinstance(mask, Tensor) or log_probs.shape != mask.shape:
        return None
    return log_probs if log_probs.requires_grad and log_probs.dim() == 2 else None


def mean_loss(log_probs: Tensor, labels_BT: Tensor) -> Tensor:
    """The mean loss over the targets of ``labels_BT``."""
    return -log_probs.sum() / (labels_BT[:, 1:] != IGNORED).sum().clamp_min(1)


def common_factor(gradient_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """() of the gradient at the log-probabilities: what :func:`mean_loss` was multiplied by in the loss that went
    backward. UsageError if it is not the same for every target.
    """
    of_targets = gradient_BT[(labels_BT[:, 1:] != IGNORED).to(gradient_BT.device)].double()
    if not len(of_targets):
        return gradient_BT.new_zeros((), dtype=torch.float64)
    mean = of_targets.mean()
    if not bool(((of_targets - mean).abs() <= 1e-5 * mean.abs()).all()):
        raise UsageError(
            "the loss that went backward does not weigh all targets alike (that of DFT, of preferences, of rewards): "
            "no sample's own loss is known. Train on the next-token loss (SFTConfig: loss_type='nll')"
        )
    return -mean * len(of_targets)


class FusedHead:
    """Scores the head of ``model`` where it is fused with the loss."""

    def __init__(self, model: nn.Module, method: Method) -> None:
        self._model, self._method = model, method
        output_embeddings: Any = getattr(model, "get_output_embeddings", None)
        head = None if output_embeddings is None else output_embeddings()
        backbone = getattr(model, "base_model", None)
        names = [name for name, module in model.named_modules() if module is head and name in method.kinds]
        self._name = names[0] if names and backbone is not model and isinstance(backbone, nn.Module) else None
        self._backbone = backbone
        self.ran: set[str] = set()
        """The name of the head, if it was seen in the open batch."""
        self._open: OpenBatch | None = None
        self._hidden: Tensor | None = None
        self._handle: RemovableHandle | None = None
        """Of the hook that keeps it, during a forward pass."""
        self._dtype = torch.float32
        """In which the head computes: autocast may be open inside the model's forward pass alone."""

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedHead:
        """Return this object: a deep copy of the model copies its hooks, which must not act on the copy."""
        return self

    def attach(self) -> list[RemovableHandle]:
        """Put hooks on the model, and return them; none where no head is scored."""
        if self._name is None:
            return []
        return [
            outside_graphs(self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True)),
            outside_graphs(self._model.register_forward_hook(self._after_forward, with_kwargs=True)),
        ]

    def begin(self, open_batch: OpenBatch) -> None:
        """A train batch is open."""
        self._open, self.ran = open_batch, set()

    def end(self) -> None:
        """It is closed."""
        self._open = self._hidden = None
        self._stop_keeping()

    def _stop_keeping(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # In this pass alone: another's may be compiled, and a hook within would break its graph.
        if self._open is not None and module is self._model and kwargs.get("fused_lm_head"):
            assert isinstance(self._backbone, nn.Module)
            self._stop_keeping()
            self._handle = self._backbone.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._open is not None and module is self._backbone and torch.is_grad_enabled():
            hidden = getattr(output, "last_hidden_state", None)
            self._hidden = hidden.detach() if isinstance(hidden, Tensor) else None
            self._dtype = autocast_dtype(self._model) or (torch.float32 if self._hidden is None else self._hidden.dtype)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        self._stop_keeping()
        open_batch, hidden, self._hidden = self._open, self._hidden, None
        if open_batch is None or module is not self._model or open_batch.forwarded or not torch.is_grad_enabled():
            return
        log_probs, labels = token_log_probs(output), kwargs.get("labels")
        if not kwargs.get("fused_lm_head") or log_probs is None or not isinstance(labels, Tensor):
            return
        if hidden is None or hidden.shape[:2] != labels.shape:
            raise CaptureError(
                f"{type(module).__name__} returned log-probabilities of a fused head, but what went into the head is "
                "not known: leave the head out with `exclude_layers`"
            )
        assert self._name is not None
        vocabulary = len(self._model.get_parameter(f"{self._name}.weight"))
        self.ran.add(self._name)
        batch = _HeadBatch(open_batch, vocabulary, hidden, self._dtype, labels, log_probs)
        for _ in range(batch.chunks):
            self._method.called(self._name)
        log_probs.register_hook(lambda gradient: self._see(batch, gradient))  # type: ignore[no-untyped-call]

    def _see(self, batch: _HeadBatch, gradient: Tensor) -> None:
        # Before the loss is watched, its check runs backward to the log-probabilities, too.
        if batch.open_batch.closed or not batch.open_batch.forwarded:
            return
        assert self._name is not None
        head = self._model.get_submodule(self._name)
        see = batch.open_batch.in_time(self._method.see_train(self._name), by_sample=True)
        with torch.no_grad(), without_autocast(gradient.device.type):
            for x_BLH, dy_BLV in batch.pieces(head, gradient, _Transform.of(self._model)):
                see(self._method.to_keep(self._name, x_BLH, dy_BLV.dtype), dy_BLV)


class _Transform:
    """From the product with the head's weight to the logits, as the models of transformers compute them."""

    def __init__(self, scale: float, cap: float | None) -> None:
        self._scale, self._cap = scale, cap

    @classmethod
    def of(cls, model: Any) -> _Transform:
        """That of the configuration of ``model``."""
        config = model.config.get_text_config()
        factors = [getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
        scale = next((factor for factor in factors if factor is not None), None)
        divisor = getattr(config, "logits_scaling", None)
        if scale is None and divisor is not None:
            scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
        return cls(1.0 if scale is None else float(scale), getattr(config, "final_logit_softcapping", None))

    def logits(self, product: Tensor) -> Tensor:
        """The logits."""
        z = product * self._scale
        return z if self._cap is None else self._cap * torch.tanh(z / self._cap)

    def backward(self, product: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at the product, of that at the logits."""
        if self._cap is not None:
            gradient = gradient * (1 - torch.tanh(product * self._scale / self._cap).square())
        return gradient * self._scale


class _HeadBatch:
    """What went into a fused head in one forward pass, by sample."""

    def __init__(
        self,
        open_batch: OpenBatch,
        vocabulary: int,
        hidden_BTH: Tensor,
        dtype: torch.dtype,
        labels_BT: Tensor,
        log_probs_BT: Tensor,
    ) -> None:
        self.open_batch, self._dtype = open_batch, dtype
        targets_BT = torch.full_like(labels_BT, IGNORED)
        targets_BT[:, :-1] = labels_BT[:, 1:]
        self._target_BL = self._by_sample(targets_BT + 1) - 1  # -1 where a sample has ended
        self._x_BLH = self._by_sample(hidden_BTH)
        self._log_prob_BL = self._by_sample(F.pad(log_probs_BT.detach(), (0, 1)))
        self._step = max(1, CHUNK_NUMBERS // (vocabulary * len(self._x_BLH)))

    def _by_sample(self, x: Tensor) -> Tensor:
        segments = self.open_batch.segments
        return x if segments is None else segments.gather(x)

    @property
    def chunks(self) -> int:
        """Pieces of :meth:`pieces`."""
        return -(-self._x_BLH.shape[1] // self._step)

    def pieces(self, head: nn.Module, gradient_BT: Tensor, transform: _Transform) -> Iterator[tuple[Tensor, Tensor]]:
        """(input of the head (B, l, H), gradient at its output (B, l, V)), piece by piece of l positions.

        CaptureError where the log-probabilities are not those of the head's weight.
        """
        gradient_BL = self._by_sample(F.pad(gradient_BT.detach(), (0, 1)))
        weight, stored_bias = head.get_parameter("weight").to(self._dtype), head._parameters.get("bias")
        bias = None if stored_bias is None else stored_bias.to(self._dtype)
        narrow = self._dtype in (torch.float16, torch.bfloat16)
        for first in range(0, self._x_BLH.shape[1], self._step):
            part = slice(first, first + self._step)
            x, target = self._x_BLH[:, part], self._target_BL[:, part]
            product = F.linear(x.to(self._dtype), weight, bias).float()
            log_p = transform.logits(product).log_softmax(-1)
            index, is_target = target.clamp_min(0).unsqueeze(-1), target >= 0
            error = (log_p.gather(-1, index).squeeze(-1) - self._log_prob_BL[:, part])[is_target].abs()
            if not bool((error <= (NARROW_TOLERANCE if narrow else TOLERANCE) * log_p.abs().max()).all()):
                raise CaptureError(
                    "the log-probabilities of the fused head are not those of its weight: the model changes its "
                    "logits in a way that is not known. Leave the head out with `exclude_layers`"
                )
            share = (gradient_BL[:, part].float() * is_target).unsqueeze(-1)
            dy = -log_p.exp_().mul_(share)
            dy.scatter_add_(-1, index, share)
            yield x.to(self._dtype), transform.backward(product, dy).to(self._dtype)
