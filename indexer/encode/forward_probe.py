"""Check by forward passes that the rows of each layer's input belong to the samples of the batch, whatever their batch
mates.

The model runs again, without a graph, on the whole batch, on two and three samples of it, and on single samples. The
input of a layer must have one row for each sample, and that row must equal the sample's row in the whole batch.
:mod:`indexer.encode.sample_axis` shows that the gradients at a layer's output belong to the samples. This check shows
that nothing before the layer mixes them. It is the only check if there is a single training loss, which cannot be
reweighted.

Kernels that depend on the size of the batch round differently with other batch mates. How much is measured for each
layer, with batches of copies of one sample, which cannot mix anything into it. A few times that is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf, isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError
from indexer.encode.modes import (
    autocast_dtype,
    buffers_kept,
    device_type,
    devices_of,
    evaluating,
    outside_graphs,
    reseed,
    uncompiled,
)
from indexer.encode.sample_axis import (
    COMPANY_TOLERANCE,
    NARROW_COMPANY_TOLERANCE,
    can_be_cut,
    place_sums,
    row_sums,
    taken,
)
from indexer.layers import LayerType

ABSENT = "does not run in eval mode"
_MIXED = "its input does not follow the samples: they are mixed, routed or in another order"
_UNKNOWN = "so it cannot be told which axis of each layer carries the samples; check=False trusts that it is the first"
ALONE = 16
"""Most samples that run alone."""
COMPANIES = (2, 3)
"""Sizes of the smaller batches in which samples are compared."""
ROUNDING = 4.0
"""Largest allowed difference, in multiples of the difference between copies of one sample."""
LEAST, LEAST_STEPS = 1e-4, 2.0
"""Allowed difference even if copies do not differ: as a share of a row's length, and in steps of 16-bit numbers."""
FAINT = 1e-3
"""Positions of an output with a smaller share of the largest position are compared relative to that share."""

Sums = dict[str, Tensor]
"""Random sums (B, M, SKETCH) of each tensor in a model's output, by its path in the output."""


class CannotRun(CaptureError):
    """The model cannot run on some of the samples of a batch, or is random."""


class Call(NamedTuple):
    """The arguments of a call of the model, and the dtype of the open autocast."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype | None


class CallKeeper:
    """Keeps the last call of the model, between :meth:`begin` and :meth:`forget`."""

    def __init__(self, model: nn.Module) -> None:
        self.call: Call | None = None
        self._model, self._wanted = model, False
        self._handle = outside_graphs(model.register_forward_pre_hook(self._see, with_kwargs=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> CallKeeper:
        """The keeper itself: a deep copy of the model has this hook, too, and must not get a keeper of its own."""
        return self

    def begin(self) -> None:
        """Begin a batch."""
        self.call, self._wanted = None, True

    def forget(self) -> None:
        """Drop the call of the batch."""
        self.call, self._wanted = None, False

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._wanted and module is self._model and torch.is_grad_enabled():
            self.call = Call(args, dict(kwargs), autocast_dtype(module))

    def remove(self) -> None:
        """Remove the hook and drop the call."""
        self._handle.remove()
        self.forget()


def strangers(
    model: nn.Module, call: Call, batch: int, layers: Mapping[str, LayerType], *, outputs: bool = False
) -> dict[str, str]:
    """The layers, of ``layers`` by name, whose input rows do not belong to the ``batch`` samples of ``call``, each with
    a phrase that says what is wrong.

    The model runs in eval mode. If it is in training mode and not random, it runs in that mode, too. Its mode, its
    buffers and the random state are restored. A layer that does not run in eval mode is among the results, because
    nothing can be said about it. With ``outputs`` the rows of the model's output must belong to the samples, too (else
    CaptureError).

    CannotRun if the model accepts no other batch than the whole one, or is random.
    """
    probe = _Probe(model, call, batch, layers)
    autocast = torch.autocast(device_type(model), dtype=call.autocast, enabled=call.autocast is not None)
    with uncompiled(), buffers_kept(model), torch.no_grad(), autocast:
        with evaluating(model):
            probe.follow(outputs=outputs, absent=ABSENT)
        if model.training and probe.differs() and not probe.random():
            probe.follow(outputs=outputs, absent=None)
    return probe.problems


class _Probe:
    """Runs a model on some of the samples of a batch and compares the rows with those of the whole batch."""

    def __init__(self, model: nn.Module, call: Call, batch: int, kinds: Mapping[str, LayerType]) -> None:
        self.model, self.call, self.batch, self.kinds, self.names = model, call, batch, kinds, set(kinds)
        self.problems: dict[str, str] = {}
        self._expanded: set[str] = set()
        self._whole: dict[str, list[Tensor]] = {}
        dtypes = {parameter.dtype for parameter in model.parameters()} | {call.autocast}
        narrow = dtypes & {torch.float16, torch.bfloat16}
        self._most = NARROW_COMPANY_TOLERANCE if narrow else COMPANY_TOLERANCE
        self._least = max([LEAST, *(LEAST_STEPS * torch.finfo(dtype).eps for dtype in narrow if dtype is not None)])

    def differs(self) -> bool:
        """Whether the inputs of layers differ between the model's mode now and the mode of the last :meth:`follow`."""
        return self._differ(self._whole, self._rows(range(self.batch))[0])

    def random(self) -> bool:
        """Whether the inputs of layers differ between two runs with different random seeds."""
        return self._differ(*(self._rows(range(self.batch), seed)[0] for seed in (1, 2)))

    def _differ(self, first: dict[str, list[Tensor]], second: dict[str, list[Tensor]]) -> bool:
        return first.keys() != second.keys() or any(
            len(rows) != len(second[name])
            or any(_gap(a, b) > self._most for a, b in zip(rows, second[name], strict=True))
            for name, rows in first.items()
        )

    def _allowed(self, place: int) -> tuple[dict[str, float], dict[str, float]]:
        """(for each layer, for each tensor of the output) the relative difference of rows that rounding may cause.

        It is measured with copies of the sample at ``place``, in batches of the sizes that are compared.
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
        """Compare the rows of single samples, and of two and three samples, with those of the whole batch.

        ``absent`` is the problem to record for a layer that does not run; None: none.
        """
        last = self.batch - 1
        alone = sorted({place * last // (ALONE - 1) for place in range(ALONE)})
        whole_rows, output = self._rows(range(self.batch))
        self._whole = whole_rows
        self._refuse_other_output(output)
        of_layer, of_output = self._allowed(last)
        for places in ([last, 0], [self.batch // 2, 0, last], *([place] for place in alone)):
            layer_rows, output_part = self._rows(places)
            for name in self.names - set(self.problems):
                expected, rows = whole_rows.get(name, []), layer_rows.get(name, [])
                if not expected and absent is not None:
                    self.problems[name] = absent
                elif len(expected) != len(rows):
                    self.problems[name] = "runs more often for some samples of a batch than for all of them"
                elif any(_gap(a[list(places)], b) > of_layer[name] for a, b in zip(expected, rows, strict=True)):
                    self.problems[name] = _MIXED
            if outputs and not self._rows_follow(output, output_part, places, of_output):
                raise CaptureError(
                    f"a row of what {type(self.model).__name__} puts out changes with the batch mates of its sample: "
                    "something mixes the samples of a batch, so none has a gradient of its own"
                )

    def _rows_follow(self, whole: Sums, part: Sums, places: Sequence[int], allowed: Mapping[str, float]) -> bool:
        """Whether the rows of ``part`` equal those at ``places`` of ``whole``, in every tensor whose first axis is the
        samples.
        """
        of_samples = [
            (whole[name][list(places)], sums, allowed.get(name, self._least))
            for name, sums in part.items()
            if name in whole and len(whole[name]) == self.batch and len(sums) == len(places)
        ]
        return all(expected.shape == sums.shape and _gap(expected, sums) <= most for expected, sums, most in of_samples)

    def _refuse_other_output(self, watched: Sums) -> None:
        """Check that the hooks, which expand positions to one row a sample, do not change the output ``watched``.

        CannotRun if the model is random.
        """
        if _same_output(watched, self._run(range(self.batch), seed=1)):
            return
        if self._expanded and not _same_output(watched, self._run(range(self.batch))):
            self.problems |= dict.fromkeys(self._expanded, "an index for the whole batch, not of positions")
            return
        raise CannotRun(f"{type(self.model).__name__} gives another output each time it runs, {_UNKNOWN}")

    def _rows(self, places: Sequence[int], seed: int | None = None) -> tuple[dict[str, list[Tensor]], Sums]:
        """(random sums of the rows of each layer's input for each call, those of the model's output)."""
        rows_by_layer: dict[str, list[Tensor]] = {}
        handles = [
            self.model.get_submodule(name).register_forward_hook(
                self._hook(name, len(places), rows_by_layer), with_kwargs=True, prepend=True
            )
            for name in self.names
        ]
        try:
            return rows_by_layer, self._run(places, seed)
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, places: Sequence[int], seed: int | None = None) -> Sums:
        """The random sums of the model's output for the samples at ``places``. CannotRun if the model fails on them."""
        arguments = (self.call.args, self.call.kwargs)
        if len(places) != self.batch and not can_be_cut(arguments, self.batch):
            raise CannotRun(
                f"{type(self.model).__name__} is called with nothing whose first axis is the {self.batch} samples of "
                f"the batch, {_UNKNOWN}"
            )
        args, kwargs = taken(arguments, places, self.batch)
        devices = devices_of(self.model)
        with torch.random.fork_rng(devices=devices):  # the same numbers in every run
            if seed is not None:
                reseed(seed, devices)
            try:
                output = self.model(*args, **kwargs)
            except Exception as error:
                raise CannotRun(
                    f"{type(self.model).__name__} does not run on {len(places)} of the {self.batch} samples of a batch "
                    f"({error!r:.200}), {_UNKNOWN}"
                ) from error
        return dict(_output_sums(output))

    def _hook(self, name: str, batch: int, rows_by_layer: dict[str, list[Tensor]]) -> Callable[..., Any]:
        """A forward hook that records the rows of a layer's input, and what is wrong with its shape."""
        kind = self.kinds[name]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> Any:
            problem = kind.axis_problem(args, kwargs, y, batch)
            if problem is not None:
                self.problems[name] = problem
                return None
            seen = kind.seen(module, args, kwargs, y, batch, name)
            if seen.expanded:
                self._expanded.add(name)
            inputs = seen.x if isinstance(seen.x, Tensor) else seen.x.inputs()
            rows_by_layer.setdefault(name, []).append(row_sums(inputs))
            return seen.back(seen.outputs)  # expanded to one row a sample, as the engines do

        return hook


def _gap(expected: Tensor, measured: Tensor) -> float:
    """‖measured - expected‖ ÷ ‖expected‖; infinite if a number is not finite."""
    gap, length = float((measured - expected).norm()), float(expected.norm())
    if not isfinite(gap + length):
        return inf
    return gap / length if length else float(gap > 0.0)


def _output_sums(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(path in ``output``, random sums (B, M, SKETCH)) of each tensor (B, …) in it. Numbers that are not finite count
    as 0.

    Only sums are kept, not the logits, so that the check needs no more memory than a training step.
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


def _same_output(measured: Sums, expected: Sums) -> bool:
    """Whether the outputs of two runs are equal at every position, up to rounding."""
    return measured.keys() == expected.keys() and all(
        measured[name].shape == sums.shape and _same_places(measured[name], sums) for name, sums in expected.items()
    )


def _same_places(measured_BMS: Tensor, expected_BMS: Tensor) -> bool:
    gap_BM, size_BM = (measured_BMS - expected_BMS).norm(dim=2), expected_BMS.norm(dim=2)
    return bool((gap_BM <= NARROW_COMPANY_TOLERANCE * size_BM + FAINT * size_BM.max()).all())
