"""Three respects in which a model's vectors and scores must be those of its samples run alone.

The gradients that they are held against come from plain autograd, one sample at a time and without padding. Of the code
that is measured only the matrices of a projection and the layout of a block are used for them.

Legend: B samples, T tokens, V vocabulary, K and J the ranks of a block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ghoststore import GradDotProdEngine, GradProjLoraEngine, ProjectionConfig
from indexer.encode.plain import all_trainable, plain_blocks

IGNORED = -100
LENGTHS, VAL_LENGTHS = (9, 5, 7, 4), (11, 6)
"""Tokens of the samples of a batch, padded on the right, and of the val samples."""
SQUARE = (4, 3, 4, 2)
"""As many samples as tokens: a layer whose first axis is another one looks right there."""
WRONG = 1e-3
"""The largest relative error that is rounding."""
FAINT = 1e-3
"""A block whose gradient is a smaller share of the whole is compared with that share: its own digits are rounding."""
ORTHOGONAL = 0.03
"""Two gradients with a smaller cosine are nearly orthogonal: their product is compared with this share of that of their
norms, for its own digits have cancelled."""

Gradients = dict[str, Tensor]
"""By the name of a parameter, or of a block."""


@dataclass(frozen=True, slots=True)
class Samples:
    """The inputs of B samples, padded to one length, and their labels."""

    inputs: dict[str, Tensor]
    labels_BT: Tensor
    lengths: tuple[int, ...]
    shifted: bool
    """Whether the logits at t predict the label at t + 1."""

    @property
    def batch(self) -> dict[str, Tensor]:
        """As a data loader gives them."""
        return {**self.inputs, "labels": self.labels_BT}

    def alone(self) -> list[Samples]:
        """Each sample by itself, without padding."""
        return [
            Samples(
                {k: x[i : i + 1, :n] for k, x in self.inputs.items()}, self.labels_BT[i : i + 1, :n], (n,), self.shifted
            )
            for i, n in enumerate(self.lengths)
        ]

    def losses(self, model: nn.Module, options: dict[str, Any]) -> Tensor:
        """(B,): the mean loss of each sample over its own targets."""
        losses_BT, targets_BT = _terms(model(**self.inputs, **options).logits, self.labels_BT, self.shifted)
        return losses_BT.sum(1) / targets_BT.sum(1)

    def mean_loss(self, model: nn.Module, options: dict[str, Any]) -> Tensor:
        """The mean loss over all targets."""
        losses_BT, targets_BT = _terms(model(**self.inputs, **options).logits, self.labels_BT, self.shifted)
        return losses_BT.sum() / targets_BT.sum()


def _terms(logits_BTV: Tensor, labels_BT: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """(the loss of each position, 0 where it has no target; whether it has one)."""
    if shifted:
        logits_BTV, labels_BT = logits_BTV[:, :-1], labels_BT[:, 1:]
    losses_BT = nn.functional.cross_entropy(
        logits_BTV.float().transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none"
    )
    return losses_BT, labels_BT != IGNORED


def unshifted_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B,): the losses of a batch whose labels stand where the logits do, for ``val_losses``."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    losses_BT, targets_BT = _terms(model(**inputs).logits, batch["labels"], False)
    return losses_BT.sum(1) / targets_BT.sum(1)


def samples_of(model: nn.Module, task: str, lengths: Sequence[int], seed: int) -> Samples:
    """Random samples for ``model``: with a mask where it takes one, and for an encoder-decoder of equally many tokens
    on both sides.
    """
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    is_real = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)
    ids, targets = (torch.randint(8, 99, shape, generator=generator) * is_real for _ in range(2))
    inputs, labels, shifted = {"input_ids": ids}, ids, True
    if "attention_mask" in takes:
        inputs["attention_mask"] = is_real.long()
    if task == "masked":
        hidden = torch.arange(shape[1]) % 3 == 1
        inputs["input_ids"] = ids.masked_fill(hidden & is_real, 4)
        labels, shifted = ids.masked_fill(~hidden, IGNORED), False
    elif task == "seq2seq" and "decoder_input_ids" in takes:
        start = torch.full((len(lengths), 1), 3)
        inputs["decoder_input_ids"] = torch.cat([start, targets[:, :-1]], 1) * is_real
        inputs["decoder_attention_mask"] = is_real.long()
        labels, shifted = targets, False
    return Samples(inputs, labels.masked_fill(~is_real, IGNORED), tuple(lengths), shifted)


def gradients_of(model: nn.Module, loss: Tensor) -> Gradients:
    """The gradient of every trainable parameter; zeros where the loss does not depend on it."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g.to_dense()
        for (name, p), g in zip(named.items(), gradients, strict=True)
    }


def gradients_alone(model: nn.Module, samples: Samples, options: dict[str, Any]) -> list[Gradients]:
    """Of each sample, run alone."""
    return [gradients_of(model, one.losses(model, options)[0]) for one in samples.alone()]


def gradients_beside(model: nn.Module, samples: Samples, options: dict[str, Any]) -> list[Gradients]:
    """Of each sample in the padded batch, by a pass of the whole batch for each."""
    return [gradients_of(model, samples.losses(model, options)[i]) for i in range(len(samples.lengths))]


def norm_of(gradients: Gradients) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())


def difference(found: Sequence[Gradients], expected: Sequence[Gradients]) -> tuple[float, str]:
    """(the largest relative error of a block of a sample, which block)."""
    worst = (0.0, "")
    for mine, right in zip(found, expected, strict=True):
        floor = FAINT * norm_of(right)
        for name, block in right.items():
            worst = max(worst, (_relative(float((mine[name] - block).norm()), max(float(block.norm()), floor)), name))
    return worst


def _relative(gap: float, size: float) -> float:
    """NaN counts as infinite: it must not look small."""
    error = 0.0 if gap == 0.0 else gap / max(size, 1e-30)
    return error if error == error else float("inf")


@dataclass(frozen=True, slots=True)
class Measured:
    """One respect of one batch, as the engine gives it."""

    error: float
    where: str
    covered: float
    """Share of the model's numbers that are in the vectors or scores."""


class Subject:
    """A model, samples for it, and its own gradients.

    ``padding_changes`` and ``mixing`` say how far the gradient of a sample in a batch differs from that of the sample
    alone by the model's own doing, padded and without padding. Where padding changes the model, samples of one length
    are used.
    """

    def __init__(self, model: nn.Module, task: str) -> None:
        self.model = model
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.numbers = sum(p.numel() for p in model.parameters())
        takes = inspect.signature(model.forward).parameters
        # As builds do; caches of some models cannot be made for training.
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        padded = samples_of(model, task, LENGTHS, 1)
        even = samples_of(model, task, LENGTHS[:1] * len(LENGTHS), 2)
        self.padding_changes, _ = self._own_difference(padded)
        self.mixing, _ = self._own_difference(even)
        self.padded = self.padding_changes <= WRONG
        self.samples = padded if self.padded else even
        self.square = samples_of(model, task, SQUARE if self.padded else (len(SQUARE),) * len(SQUARE), 3)
        self.val = samples_of(model, task, VAL_LENGTHS if self.padded else VAL_LENGTHS[:1] * 2, 4)

    def _own_difference(self, samples: Samples) -> tuple[float, str]:
        return difference(
            gradients_beside(self.model, samples, self.options), gradients_alone(self.model, samples, self.options)
        )

    def vectors(self, layers: Sequence[str], exclude: Sequence[str], samples: Samples) -> Measured:
        """Projected gradients of each sample, block by block. The error is infinite if a block loses a parameter."""
        self.model.eval()
        config = ProjectionConfig(layers=tuple(layers), exclude_layers=tuple(exclude), compress="none")
        with GradProjLoraEngine(self.model, config) as engine:
            engine.prepare(len(samples.lengths))
            vectors_BD = engine.collect(samples.losses(self.model, self.options))
        projection = engine.projection
        plan = projection.plan
        found = [{p.block.name: x_D[p.start : p.stop].view(p.k_out, p.k_in) for p in plan.layers} for x_D in vectors_BD]
        with all_trainable(self.model):
            alone = gradients_alone(self.model, samples, self.options)
        error, where = difference(found, [plain_blocks(projection, gradients) for gradients in alone])
        for layer in plan.layers:
            parts = {name: alone[0][name] for name in layer.block.parameters}
            lost = abs(float(layer.block.lay_out(alone[0]).norm()) - norm_of(parts))
            if lost > WRONG * norm_of(parts):
                error, where = float("inf"), f"the layout of {layer.block.name}"
        covered = {name for layer in plan.layers for name in layer.block.parameters}
        return Measured(error, where, self._share(covered))

    def scores(self, exclude: Sequence[str], samples: Samples) -> Measured:
        """Scores of a training step, parameter by parameter and their sum."""
        model = self.model
        losses = None if samples.shifted else unshifted_losses
        model.train()
        with GradDotProdEngine(model, self.val.batch, val_losses=losses, exclude_layers=tuple(exclude)) as engine:
            engine.prepare(len(samples.lengths))
            loss = samples.mean_loss(model, self.options)
            if samples.shifted:
                engine.watch(loss, labels=samples.labels_BT)
            else:
                targets_B = (samples.labels_BT != IGNORED).sum(1)
                engine.watch(loss, weights=targets_B / targets_B.sum(), batch=samples.batch)
            loss.backward()  # type: ignore[no-untyped-call]
            scores = engine.collect()
        rows = gradients_alone(model, samples, self.options)
        model.eval()
        val = gradients_alone(model, self.val, self.options)
        mean = {name: torch.stack([one[name] for one in val]).mean(0) for name in val[0]}
        error, where = score_difference(scores.total, scores.parameters, rows, mean)
        return Measured(error, where, self._share(set(scores.parameters)))

    def _share(self, names: set[str]) -> float:
        return sum(p.numel() for name, p in self.model.named_parameters() if name in names) / self.numbers

    def release(self) -> None:
        """Undo what a respect that failed may have left behind."""
        self.model.eval().zero_grad(set_to_none=True)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)


def score_difference(
    total_B: Tensor, parameters: dict[str, Tensor], rows: Sequence[Gradients], val: Gradients
) -> tuple[float, str]:
    """(the largest relative error of a parameter's scores or of their sum, where)."""
    worst, worst_sum = (0.0, ""), (0.0, "")
    for i, row in enumerate(rows):
        whole = norm_of(row) * norm_of(val)
        right = 0.0
        for name, scores_B in parameters.items():
            expected = float((row[name].double() * val[name].double()).sum())
            right += expected
            size = max(abs(expected), ORTHOGONAL * float(row[name].norm() * val[name].norm()), FAINT * whole)
            worst = max(worst, (_relative(abs(float(scores_B[i]) - expected), size), name))
        size = max(abs(right), ORTHOGONAL * whole)
        worst_sum = max(worst_sum, (_relative(abs(float(total_B[i]) - right), size), "the sum"))
    return worst if worst[0] > WRONG else max(worst, worst_sum)


Respect = Callable[[Subject, Sequence[str], Samples], Measured]
"""(subject, layers to exclude, samples)."""

RESPECTS: dict[str, Respect] = {
    "default layers": lambda subject, exclude, samples: subject.vectors(("mlp", "attn"), exclude, samples),
    "all layers": lambda subject, exclude, samples: subject.vectors(("all",), exclude, samples),
    "engine": lambda subject, exclude, samples: subject.scores(exclude, samples),
}
