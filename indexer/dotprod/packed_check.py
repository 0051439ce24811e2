"""Checks that packed rows keep their samples apart: each sample is run alone, and each layer must see the same.

Legend: R rows of the forward pass, T positions of a row, S samples, L positions of the longest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError, UsageError
from indexer.dotprod.forward_record import without_labels
from indexer.dotprod.segments import Segments, without_axes_of_one
from indexer.encode.forward_probe import Call
from indexer.encode.modes import buffers_kept, device_type, evaluating
from indexer.encode.sample_axis import place_sums
from indexer.layers.base import LayerType, input_of
from indexer.layers.call import has_positions, outputs_of, tensors_in

_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments that say where packed samples begin."""
_ALONE, _NARROW_ALONE = 2e-3, 5e-2
"""Relative. What rounding (TF32, 16 bits) may change where a sample runs alone: kernels choose by size."""
_LEAK, _NARROW_LEAK = 1e-6, 1e-3
"""Relative. Other tokens in other samples leave what a layer sees of a sample as it is, but for the kernel's order."""

Seen = dict[str, list[Tensor]]
"""(S, L, numbers) of each call of each layer's input, and of the logits, by name."""


def refuse_mixed_segments(model: nn.Module, call: Call, segments: Segments, layers: Mapping[str, LayerType]) -> None:
    """Run ``model`` in eval mode on the packed rows of ``call`` and on each of their samples alone.

    CaptureError naming the layers whose inputs are not by position. UsageError where a sample in its row is not what it
    is alone: the model looks beyond it. Mode, buffers and random state are restored.
    """
    autocast = torch.autocast(device_type(model), dtype=call.autocast, enabled=call.autocast is not None)
    probe = _Probe(model, segments, layers)
    with buffers_kept(model), torch.no_grad(), autocast, evaluating(model):
        packed = probe.run(_without_labels(call))
        narrow = probe.narrow
        for sample in range(segments.count):
            alone = probe.run(_alone(call, segments, sample), alone=int((~segments.absent_SL[sample]).sum()))
            differing = _differing(packed, alone, sample, _NARROW_ALONE if narrow else _ALONE)
            _refuse(model, differing, f"sample {sample} of the batch alone")
        for parity in (0, 1) if segments.count > 1 else ():
            other = probe.run(_others_changed(call, segments, parity))
            for sample in range(1 - parity, segments.count, 2):
                part = {name: [x[sample : sample + 1] for x in calls] for name, calls in other.items()}
                differing = _differing(packed, part, sample, _NARROW_LEAK if narrow else _LEAK)
                _refuse(model, differing, "other tokens in the samples beside it")


class _Probe:
    """Runs the model and keeps random sums of what its layers see, or give where no formula knows them."""

    def __init__(self, model: nn.Module, segments: Segments, layers: Mapping[str, LayerType]) -> None:
        self._model, self._segments, self._layers = model, segments, layers
        self._by_position: dict[str, list[bool]] = {}
        """Of each layer without a formula, which of the outputs of its calls have positions in the packed rows."""
        self._outputs = Counter[str]()
        """How many there were in this run."""
        self.narrow = False
        """Whether 16-bit numbers took part: autocast may be open inside the model's forward pass alone."""

    def run(self, call: Call, *, alone: int = 0) -> Seen:
        """Of the packed rows by sample; of a sample that runs ``alone``, in as many positions, (1, L, numbers)."""
        seen: Seen = {}
        self._by_position = self._by_position if alone else {}
        self._outputs.clear()
        handles = [
            self._model.get_submodule(name).register_forward_hook(self._hook(name, seen, alone), with_kwargs=True)
            for name in self._layers
        ]
        try:
            output = self._model.forward(*call.args, **call.kwargs)  # not its hooks: this is no training step
        finally:
            for handle in handles:
                handle.remove()
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.dim() == 3:
            seen["logits"] = [self._sums("logits", logits, alone)]
        return seen

    def _hook(self, name: str, seen: Seen, alone: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> None:
            self.narrow |= any(x.dtype in (torch.float16, torch.bfloat16) for x in tensors_in(y))
            found = seen.setdefault(name, [])
            if self._layers[name].has_formula:
                found.append(self._sums(name, input_of(args, kwargs), alone))
            for output in [] if self._layers[name].has_formula else outputs_of(y):
                if self._has_positions(name, output, alone):
                    found.append(self._sums(name, output, alone))

        return hook

    def _has_positions(self, name: str, output: Tensor, alone: int) -> bool:
        """Whether the next ``output`` has positions in the packed rows. Alone another axis may be as long."""
        known = self._by_position.setdefault(name, [])
        if not alone:
            known.append(has_positions(output.shape, *self._segments.sample_RT.shape))
        self._outputs[name] += 1
        return self._outputs[name] <= len(known) and known[self._outputs[name] - 1]

    def _sums(self, name: str, x: Tensor, alone: int) -> Tensor:
        rows, length = (1, alone) if alone else self._segments.sample_RT.shape
        x = without_axes_of_one(x, length)
        if x.dim() > 1 and x.shape[0] == 1 != rows and x.shape[1] == length:
            x = x.expand(rows, *x.shape[1:])  # positions, once for all rows
        if x.shape[:2] != (rows, length) and has_positions(x.shape, rows, length):
            x = x.reshape(rows, length, *x.shape[1:])
        if x.dim() < 2 or x.shape[:2] != (rows, length):
            raise CaptureError(
                f"layer {name!r} saw or gave a tensor of shape {tuple(x.shape)} in packed rows of shape "
                f"{(rows, length)}: its first axes must be rows and positions. Leave it out with `exclude_layers`, or "
                "train without packing"
            )
        if not x.is_floating_point():
            sums_RTN = x.double().reshape(rows, length, -1)
        else:
            sums_RTN = place_sums(x if x.dim() > 2 else x.unsqueeze(2)).reshape(rows, length, -1)
        return sums_RTN if alone else self._segments.gather(sums_RTN)


def _without_labels(call: Call) -> Call:
    return Call(call.args, without_labels(call.kwargs), call.autocast)


def _alone(call: Call, segments: Segments, sample: int) -> Call:
    """The call of one sample without the others and without labels."""
    rows, length = segments.sample_RT.shape
    index = segments.index_SL[sample][~segments.absent_SL[sample]]

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != length:
            return value
        if value.shape[0] == 1 != rows:
            value = value.expand(rows, *value.shape[1:])
        return value.flatten(0, 1)[index.to(value.device)].unsqueeze(0) if len(value) == rows else value

    args, kwargs, autocast = _without_labels(call)
    kwargs = {name: cut(value) for name, value in kwargs.items() if name not in _BOUNDS}
    return Call(tuple(cut(value) for value in args), kwargs, autocast)


def _others_changed(call: Call, segments: Segments, parity: int) -> Call:
    """The packed call with other tokens in every second sample."""
    changed_RT = (segments.sample_RT >= 0) & (segments.sample_RT % 2 == parity)

    def change(value: Any) -> Any:
        is_tokens = isinstance(value, Tensor) and value.shape == changed_RT.shape and not value.is_floating_point()
        if not is_tokens:
            return value
        return torch.where(changed_RT.to(value.device), value.flatten().roll(1).view_as(value), value)

    args, kwargs, autocast = _without_labels(call)
    if isinstance(kwargs.get("input_ids"), Tensor):
        kwargs["input_ids"] = change(kwargs["input_ids"])
    elif args:
        args = (change(args[0]), *args[1:])
    return Call(args, kwargs, autocast)


def _differing(packed: Seen, other: Seen, sample: int, tolerance: float) -> list[str]:
    """Names whose tensors of ``sample`` in the packed rows differ from those in ``other``, (1, length, numbers)."""
    found = []
    for name, calls in packed.items():
        others = other.get(name, [])
        if len(calls) != len(others):
            found.append(name)
            continue
        for x_SLN, y_1LN in zip(calls, others, strict=True):
            expected, measured = x_SLN[sample : sample + 1, : y_1LN.shape[1]], y_1LN
            gap, size = float((measured - expected).norm()), float(expected.norm())
            if not gap <= tolerance * size:
                found.append(name)
                break
    return found


def _refuse(model: nn.Module, names: list[str], what: str) -> None:
    if names:
        raise UsageError(
            f"{type(model).__name__} does not keep the samples of a packed row apart: with {what}, "
            f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''} of a sample changes. Then no sample has a "
            "gradient of its own. Transformers' models keep them apart where they run without a cache (use_cache=False "
            "in the call, or model.config.use_cache = False) and without `attention_mask`, with attn_implementation "
            "'sdpa' or 'eager' (on a GPU also 'flash_attention_2'). Or train without packing (SFTConfig: "
            "packing=False, padding_free=False; transformers: a collator that pads)"
        )
