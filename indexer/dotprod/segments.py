"""Packed rows: several samples one after another in one row of a forward pass, each a segment of it.

Legend: R rows of the forward pass, T positions of a row, S samples, L positions of the longest sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghoststore.errors import CaptureError, UsageError
from indexer.encode.losses import IGNORED
from indexer.layers.call import Call


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Which sample each position of the rows belongs to."""

    sample_RT: Tensor
    """int64; -1 for a position of no sample (padding)."""
    count: int
    """S."""
    index_SL: Tensor
    """The places of each sample's positions in the flattened rows, in their order."""
    absent_SL: Tensor
    """Where a sample is shorter than the longest."""

    @classmethod
    def of(cls, sample_RT: Tensor, count: int) -> Segments:
        """UsageError unless the numbers are those of ``count`` samples, each with a position."""
        if sample_RT.dim() != 2 or sample_RT.is_floating_point() or sample_RT.dtype == torch.bool:
            raise UsageError(
                "`segments` is the number of the sample of each position, integers of shape (rows, positions); found "
                f"{sample_RT.dtype} of shape {tuple(sample_RT.shape)}"
            )
        sample_RT = sample_RT.detach().long()
        flat = sample_RT.flatten()
        if int(flat.max()) >= count:
            raise UsageError(f"`segments` names sample {int(flat.max())}; the batch has {count}, from 0")
        sizes_S = torch.bincount(flat[flat >= 0], minlength=count)
        if not bool((sizes_S > 0).all()):
            raise UsageError(f"`segments` gives sample {int((sizes_S == 0).nonzero()[0])} of {count} no position")
        order = torch.argsort(flat, stable=True)[int((flat < 0).sum()) :]
        first_S = torch.cumsum(sizes_S, 0) - sizes_S
        place_L = torch.arange(int(sizes_S.max()), device=flat.device)
        absent_SL = place_L >= sizes_S.unsqueeze(1)
        index_SL = order[(first_S.unsqueeze(1) + place_L).clamp_max(len(order) - 1)]
        return cls(sample_RT, count, index_SL, absent_SL)

    @property
    def rows(self) -> int:
        """R."""
        return len(self.sample_RT)

    def gather(self, x: Tensor) -> Tensor:
        """(S, L, …) of ``x`` (R, T, …): each sample's positions, zeros after them. CaptureError for another shape."""
        x = without_axes_of_one(x, self.sample_RT.shape[1])
        if x.shape[:2] != self.sample_RT.shape:
            raise CaptureError(
                f"a layer saw tensors of shape {tuple(x.shape)} for packed rows of shape "
                f"{tuple(self.sample_RT.shape)}: which position each number belongs to is not known. Leave the layer "
                "out with `exclude_layers`, or train without packing"
            )
        index, absent = self.index_SL.to(x.device), self.absent_SL.to(x.device)
        return x.flatten(0, 1)[index].masked_fill_(absent.view(*absent.shape, *[1] * (x.dim() - 2)), 0)

    def by_sample(self, saved: Tensor | Call, dy: Tensor) -> tuple[Tensor | Call, Tensor]:
        """What a layer kept and the gradient at its outputs, by sample. CaptureError for another shape."""
        if isinstance(saved, Tensor):
            return self.gather(saved), self.gather(dy)
        length = self.sample_RT.shape[1]
        places, positions = [], []
        for index_L, absent_L in zip(self.index_SL.cpu(), self.absent_SL.cpu(), strict=True):
            rows_L, positions_L = index_L[~absent_L] // length, index_L[~absent_L] % length
            if int(rows_L.max()) > int(rows_L.min()):
                raise CaptureError(
                    "a module that no formula knows runs again row by row, and a sample has positions in more than one"
                )
            places.append(int(rows_L[0]))
            positions.append(positions_L.to(dy.device))
        return saved.of_samples(tuple(places), tuple(positions), length), self.gather(saved.by_position(dy, length))

    def target_counts(self, labels_RT: Tensor) -> Tensor:
        """(S,) int64: targets of each sample under the next-token shift.

        UsageError for a target that follows a position of another sample, and for labels of another shape.
        """
        sample_RT = self.sample_RT.to(labels_RT.device)
        if labels_RT.shape != sample_RT.shape:
            raise UsageError(
                f"labels are of the packed rows, of shape {tuple(sample_RT.shape)}; found {tuple(labels_RT.shape)}"
            )
        before_RT, is_target_RT = sample_RT[:, :-1], labels_RT[:, 1:] != IGNORED
        crossing = is_target_RT & ((before_RT != sample_RT[:, 1:]) | (before_RT < 0))
        if bool(crossing.any()):
            row, place = (int(index) for index in crossing.nonzero()[0])
            raise UsageError(
                f"the label at position {place + 1} of packed row {row} is the first of its sample and a target: the "
                "sample before would be trained to predict it. Set the first label of each sample to -100, as "
                "transformers' DataCollatorWithFlattening does"
            )
        return torch.bincount(before_RT[is_target_RT], minlength=self.count)

    def weights_of_rows(self, weights_S: Tensor, counts_S: Tensor) -> Tensor:
        """(R,) of ``weights_S``, float64, which must go with the targets of the samples, as those of a mean over all
        targets do: UsageError otherwise.
        """
        counts_S = counts_S.to(weights_S.device).double()
        if not torch.allclose(weights_S * counts_S.sum(), counts_S * weights_S.sum(), rtol=1e-6):
            raise UsageError(
                "the loss of packed rows is one over all targets alike: say watch(loss, labels=labels), without other "
                "weights"
            )
        row_S = self.index_SL[:, 0].to(weights_S.device) // self.sample_RT.shape[1]
        return torch.zeros(self.rows, dtype=torch.float64, device=weights_S.device).index_add(0, row_S, weights_S)


def without_axes_of_one(x: Tensor, length: int) -> Tensor:
    """``x`` (R, T, …) of (R, 1, T, …), T being ``length``: a projection that DeepSeek applies head by head has them."""
    while x.dim() > 2 and x.shape[1] == 1 != length and length in x.shape[2:]:
        x = x.squeeze(1)
    return x


def packed_samples(batch: Mapping[str, Any], count: int) -> Tensor | None:
    """(R, T) int64: the number of the sample of each position of packed rows that hold ``count`` samples, from 0; None
    where nothing says that the rows of ``batch`` are packed.

    A row is packed if its ``position_ids`` start again from 0 within it; ``seq_idx`` and ``cu_seq_lens_q``, where they
    are there, must say the same. Where there are more starts than samples, those that follow one another at the end of
    a row are padding: -1. UsageError if there are not ``count`` samples then; None if ``count`` is that of the rows,
    each of which is one sample to its caller.
    """
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or isinstance(batch.get("attention_mask"), Tensor):
        return None
    starts_RT = positions == 0
    starts_RT[:, 0] = True
    if not bool(starts_RT[:, 1:].any()):
        return None
    _refuse_other_bounds(batch, positions, starts_RT)
    padding_RT = torch.zeros_like(starts_RT)
    if int(starts_RT.sum()) > count:
        padding_RT = starts_RT.flip(1).long().cumprod(1).flip(1).bool()
        padding_RT[:, 0] = False
    found = int((starts_RT & ~padding_RT).sum())
    if found != count == len(positions):
        return None
    if found != count:
        raise UsageError(
            f"the packed rows hold {found} samples, as their `position_ids` say, and {count} numbers of samples came "
            "with them"
        )
    sample_RT = (starts_RT & ~padding_RT).flatten().long().cumsum(0).view_as(positions) - 1
    return sample_RT.masked_fill(padding_RT, -1)


def _refuse_other_bounds(batch: Mapping[str, Any], positions: Tensor, starts_RT: Tensor) -> None:
    grows = (positions[:, 1:] == positions[:, :-1] + 1) | starts_RT[:, 1:]
    if not bool(grows.all()):
        raise UsageError(
            "`position_ids` of packed rows count each sample from 0, one by one; they jump within a sample"
        )
    stated: dict[str, Tensor] = {}
    sequence = batch.get("seq_idx")
    if isinstance(sequence, Tensor) and sequence.shape == positions.shape:
        stated["seq_idx"] = torch.ones_like(starts_RT)
        stated["seq_idx"][:, 1:] = sequence[:, 1:] != sequence[:, :-1]
    lengths = batch.get("cu_seq_lens_q")
    if isinstance(lengths, Tensor) and len(positions) == 1:
        stated["cu_seq_lens_q"] = torch.zeros_like(starts_RT)
        stated["cu_seq_lens_q"][0, lengths[:-1].long().to(starts_RT.device)] = True
    for name, bounds in stated.items():
        if not torch.equal(bounds, starts_RT):
            raise UsageError(
                f"`{name}` and `position_ids` of the packed rows say that samples begin at other positions"
            )
