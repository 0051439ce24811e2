"""Do the rows of a layer's input follow the samples of the batch, whatever their company?

The model runs again, without a graph, on the whole batch, on two and three samples of it and on single ones: a layer's
input must have as many rows, and each row must be the one that its sample has in the whole. That the gradients at a
layer's output belong to the samples is what :mod:`indexer.encode.sample_axis` shows; this shows that nothing before the
layer mixes them, and stands in where there is one training loss alone, which cannot be reweighted.

Kernels that are chosen by the size of a batch round otherwise in another company. How much is measured, layer by layer:
copies of one sample are company that mixes nothing into it. What is allowed is a few times that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf, isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import CaptureError
from indexer.encode.modes import autocast_dtype, buffers_kept, device_type, devices_of, evaluating
from indexer.encode.sample_axis import (
    COMPANY_TOLERANCE,
    NARROW_COMPANY_TOLERANCE,
    can_be_cut,
    place_sums,
    row_sums,
    taken,
)
from indexer.layers import layer_type_of
from indexer.layers.base import axis_problem, by_sample, input_of

ABSENT = "does not run in eval mode"
_MIXED = "its input does not follow the samples: they are mixed, routed or in another order"
_UNKNOWN = "so it cannot be told which axis of each layer carries the samples; check=False trusts that it is the first"
ALONE = 16
"""Samples that run alone: all of a small batch."""
COMPANIES = (2, 3)
"""Sizes of the batches in which samples are compared, beside the whole one and single ones."""
ROUNDING = 4.0
"""Times what copies of one sample differ by: others may round a little worse."""
LEAST, LEAST_STEPS = 1e-4, 2.0
"""What is allowed where copies do not differ at all: so much of a row, or so many steps of its numbers."""
FAINT = 1e-3
"""Of the largest place of an output: what is smaller is measured against it."""

Sums = dict[str, Tensor]
"""Random sums at each place (B, M, SKETCH) of the tensors in a model's output, by where they are in it."""


class CannotRun(CaptureError):
    """The model does not run on some of the samples of a batch alone."""


class Call(NamedTuple):
    """What the model was called with, and under which autocast."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype | None


class CallKeeper:
    """Keeps what the model was called with last, while it is asked to."""

    def __init__(self, model: nn.Module) -> None:
        self.call: Call | None = None
        self._model, self._wanted = model, False
        self._handle: RemovableHandle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> CallKeeper:
        """Itself: a deep copy of the model has this hook, too, and its calls are none of ours."""
        return self

    def begin(self, *, wanted: bool) -> None:
        """A batch begins, whose call is ``wanted`` or not."""
        self.call, self._wanted = None, wanted

    def forget(self) -> None:
        """Nothing of the batch is kept any more."""
        self.begin(wanted=False)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._wanted and module is self._model and torch.is_grad_enabled():
            self.call = Call(args, dict(kwargs), autocast_dtype(module))

    def remove(self) -> None:
        """Take the hook away and let go of the call."""
        self._handle.remove()
        self.forget()


def strangers(
    model: nn.Module, call: Call, batch: int, layers: Iterable[str], *, outputs: bool = False
) -> dict[str, str]:
    """Of ``layers``, those whose input does not follow the ``batch`` samples of ``call``, and what is wrong, in words.

    The model runs in eval mode and, if it is in training mode and nothing in it is random, in that, too; its mode, its
    buffers and the random state are put back. A layer that does not run in eval mode is one of them: nothing is known
    of it. With ``outputs`` the model's own rows must follow the samples, too (else CaptureError).

    CannotRun where the model takes no other batch than the whole one, or is another function each time.
    """
    probe = _Probe(model, call, batch, set(layers))
    autocast = torch.autocast(device_type(model), dtype=call.autocast, enabled=call.autocast is not None)
    with buffers_kept(model), torch.no_grad(), autocast:
        with evaluating(model):
            probe.follow(outputs=outputs, absent=ABSENT)
        if model.training and probe.differs() and not probe.random():
            probe.follow(outputs=outputs, absent=None)
    return probe.problems


class _Probe:
    """Runs of a model on some of the samples of a batch, compared with its run on all."""

    def __init__(self, model: nn.Module, call: Call, batch: int, names: set[str]) -> None:
        self.model, self.call, self.batch, self.names = model, call, batch, names
        self.problems: dict[str, str] = {}
        self._expanded: set[str] = set()
        self._whole: dict[str, list[Tensor]] = {}
        dtypes = {parameter.dtype for parameter in model.parameters()} | {call.autocast}
        narrow = dtypes & {torch.float16, torch.bfloat16}
        self._most = NARROW_COMPANY_TOLERANCE if narrow else COMPANY_TOLERANCE
        self._least = max([LEAST, *(LEAST_STEPS * torch.finfo(dtype).eps for dtype in narrow if dtype is not None)])

    def differs(self) -> bool:
        """Whether layers see something else in the model's mode now than in the one that was followed before."""
        return self._differ(self._whole, self._rows(range(self.batch))[0])

    def random(self) -> bool:
        """Whether two runs draw numbers that matter."""
        return self._differ(*(self._rows(range(self.batch), seed)[0] for seed in (1, 2)))

    def _differ(self, first: dict[str, list[Tensor]], second: dict[str, list[Tensor]]) -> bool:
        return first.keys() != second.keys() or any(
            len(rows) != len(second[name])
            or any(_gap(a, b) > self._most for a, b in zip(rows, second[name], strict=True))
            for name, rows in first.items()
        )

    def _allowed(self, place: int) -> tuple[dict[str, float], dict[str, float]]:
        """What rounding may change in the rows of each layer, and of each tensor of the output, of their length:
        measured with copies of the sample at ``place``, at the sizes of batches that are compared.
        """
        layers, outputs = dict.fromkeys(self.names, 0.0), dict[str, float]()
        alone, output_alone = self._rows([place])
        for size in {*COMPANIES, self.batch}:
            copies, output = self._rows([place] * size)
            for name, calls in copies.items():
                for single, rows in zip(alone.get(name, []), calls, strict=False):
                    layers[name] = max(layers[name], _gap(single.expand_as(rows), rows))
            for name, sums in output.items():
                single = output_alone.get(name, sums)
                if len(sums) == size and single.shape[1:] == sums.shape[1:]:
                    outputs[name] = max(outputs.get(name, 0.0), _gap(single[:1].expand_as(sums), sums))
        return self._bounded(layers), self._bounded(outputs)

    def _bounded(self, gaps: Mapping[str, float]) -> dict[str, float]:
        return {name: min(self._most, max(self._least, ROUNDING * gap)) for name, gap in gaps.items()}

    def follow(self, *, outputs: bool, absent: str | None) -> None:
        """Compare the rows of single samples, of two and of three with those of all. ``absent`` is the problem of a
        layer that does not run.
        """
        last = self.batch - 1
        alone = sorted({place * last // (ALONE - 1) for place in range(ALONE)})
        whole, output = self._rows(range(self.batch))
        self._whole = whole
        self._refuse_other_output(output)
        of_layer, of_output = self._allowed(last)
        for places in ([last, 0], [self.batch // 2, 0, last], *([place] for place in alone)):
            seen, part = self._rows(places)
            for name in self.names - set(self.problems):
                expected, of_part = whole.get(name, []), seen.get(name, [])
                if not expected and absent is not None:
                    self.problems[name] = absent
                elif len(expected) != len(of_part):
                    self.problems[name] = "runs more often for some samples of a batch than for all of them"
                elif any(_gap(a[list(places)], b) > of_layer[name] for a, b in zip(expected, of_part, strict=True)):
                    self.problems[name] = _MIXED
            if outputs and not self._rows_follow(output, part, places, of_output):
                raise CaptureError(
                    f"a row of what {type(self.model).__name__} puts out changes with the batch mates of its sample: "
                    "something mixes the samples of a batch, so none has a gradient of its own"
                )

    def _rows_follow(self, whole: Sums, part: Sums, places: Sequence[int], allowed: Mapping[str, float]) -> bool:
        """Whether every tensor of ``whole`` whose first axis is the samples has the rows of ``part``."""
        of_samples = [
            (whole[name][list(places)], sums, allowed.get(name, self._least))
            for name, sums in part.items()
            if name in whole and len(whole[name]) == self.batch and len(sums) == len(places)
        ]
        return all(expected.shape == sums.shape and _gap(expected, sums) <= most for expected, sums, most in of_samples)

    def _refuse_other_output(self, watched: Sums) -> None:
        """Positions are seen once a sample in the run that is watched: that must change nothing. CannotRun where the
        model is another function each time.
        """
        if _same_output(watched, self._run(range(self.batch), seed=1)):
            return
        if self._expanded and not _same_output(watched, self._run(range(self.batch))):
            self.problems |= dict.fromkeys(self._expanded, "an index for the whole batch, not of positions")
            return
        raise CannotRun(f"{type(self.model).__name__} gives another output each time it runs, {_UNKNOWN}")

    def _rows(self, places: Sequence[int], seed: int | None = None) -> tuple[dict[str, list[Tensor]], Sums]:
        """Random sums of the rows of each layer's input, call by call, and of the model's output."""
        seen: dict[str, list[Tensor]] = {}
        handles = [
            self.model.get_submodule(name).register_forward_hook(
                self._hook(name, len(places), seen), with_kwargs=True, prepend=True
            )
            for name in self.names
        ]
        try:
            return seen, self._run(places, seed)
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, places: Sequence[int], seed: int | None = None) -> Sums:
        given = (self.call.args, self.call.kwargs)
        if len(places) != self.batch and not can_be_cut(given, self.batch):
            raise CannotRun(
                f"{type(self.model).__name__} is called with nothing whose first axis is the {self.batch} samples of "
                f"the batch, {_UNKNOWN}"
            )
        args, kwargs = taken(given, places, self.batch)
        with torch.random.fork_rng(devices=devices_of(self.model)):  # the same numbers in every run
            if seed is not None:
                torch.manual_seed(seed)
            try:
                output = self.model(*args, **kwargs)
            except Exception as error:
                raise CannotRun(
                    f"{type(self.model).__name__} does not run on {len(places)} of the {self.batch} samples of a batch "
                    f"({error!r:.200}), {_UNKNOWN}"
                ) from error
        return dict(_output_sums(output))

    def _hook(self, name: str, batch: int, seen: dict[str, list[Tensor]]) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor | None:
            x = input_of(args, kwargs)
            kind = layer_type_of(module)
            assert kind is not None
            problem = axis_problem(x, batch, kind)
            if problem is not None:
                self.problems[name] = problem
                return None
            if len(x) != batch:
                self._expanded.add(name)
            x_B, y_B = by_sample(x, y, batch, kind, name)
            seen.setdefault(name, []).append(row_sums(x_B))
            return y_B  # as the engines give it back: positions, once a sample

        return hook


def _gap(expected: Tensor, found: Tensor) -> float:
    """How far ``found`` is from ``expected``, of its length; infinite where numbers are not finite."""
    gap, length = float((found - expected).norm()), float(expected.norm())
    if not isfinite(gap + length):
        return inf
    return gap / length if length else float(gap > 0.0)


def _output_sums(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(B, M, SKETCH) of each tensor in ``output`` (B, …), by its place in it. Logits are not kept, let alone in
    float64: the check must not need more memory than the training step. What is not finite counts as zero.
    """
    if isinstance(output, Tensor):
        if output.dim() > 0:
            sums = place_sums(output)
            if not bool(sums.isfinite().all()):
                sums = torch.cat([place_sums(sample.nan_to_num(0.0, 0.0, 0.0)) for sample in torch.split(output, 1)])
            yield name, sums
        else:
            yield name, output.reshape(1, 1, 1).double().nan_to_num(0.0, 0.0, 0.0)
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _output_sums(value, f"{name}.{key}")
    elif isinstance(output, (list, tuple)):
        for place, value in enumerate(output):
            yield from _output_sums(value, f"{name}[{place}]")


def _same_output(found: Sums, expected: Sums) -> bool:
    """Whether two runs put out the same at every place, up to rounding."""
    return found.keys() == expected.keys() and all(
        found[name].shape == sums.shape and _same_places(found[name], sums) for name, sums in expected.items()
    )


def _same_places(found_BMS: Tensor, expected_BMS: Tensor) -> bool:
    gap_BM, size_BM = (found_BMS - expected_BMS).norm(dim=2), expected_BMS.norm(dim=2)
    return bool((gap_BM <= NARROW_COMPANY_TOLERANCE * size_BM + FAINT * size_BM.max()).all())
