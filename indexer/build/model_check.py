"""What a build finds out about a model before its first row: whether its vectors would be the samples' own gradients.

On a few tokens of the corpus: the samples are the first axis of every layer, each block is the one that autograd gives
for a sample alone, and neither batch mates nor padding change it. What fails is refused by name; a model that padding
changes is built in batches of rows of one length.

Legend: B samples, K and J the ranks of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ghoststore.corpus import Sample
from ghoststore.errors import CaptureError
from ghoststore.store.part.status import Status
from indexer.encode.encoder import RowEncoder, forward_options, pad
from indexer.encode.losses import Reduction, next_token_losses_plainly
from indexer.encode.plain import ArrivingBlocks
from indexer.encode.sample_axis import PROBE_SIZES, AxisProbe
from indexer.encode.tokens import Row, Tokens
from indexer.layers import layer_type_by_name
from indexer.projection import draws
from indexer.projection.matrices import Projection
from indexer.projection.plan import ProjectionPlan

LENGTHS = (7, 5, 3)
"""Tokens of the samples that are compared with autograd, or fewer where rows are shorter."""
TRIED = 6
"""Samples that are tried for those: of some the gradient may be out of range."""
SHORTEST_PAIR = 4
"""Tokens of two rows of two tokens: with less for a batch, every row has one of its own."""
SIDE = 4
"""Ranks of the blocks that are compared: no layer's gradient passes sixteen random sums unseen."""
ROWS_LOOKED_AT = 16
"""Usable rows of the corpus whose tokens are tried."""
MANY_IDS = 32
"""Different tokens that the samples are made of, where the model knows as many."""
TOLERANCE, NARROW_TOLERANCE = 1e-2, 0.2
"""Relative difference of a block that is more than rounding, in float32 and in 16 bits. Large random weights bring
float32 itself to 2e-3; what is wrong is wrong by far more.
"""
STATES_TOLERANCE, NARROW_STATES_TOLERANCE = 1e-2, 0.1
FAINT = 1e-3
"""A block this small beside the whole vector is measured against the whole: its own digits are rounding."""
NAMED = 12
_ALONE = (
    "Where it is all layers, the model itself mixes the samples of a batch (a statistic over it, routing with a "
    "capacity), and can only be given one sample at a time: give `batch_tokens=1`. "
)


class ModelCheck:
    """``ModelCheck(model, plan, rows, …).run()`` says whether rows of different lengths may share a batch.

    ``rows`` are some of the corpus, ``longest`` the most tokens that a row may have, ``batch_tokens`` those of a batch;
    ``note`` is told what could not be looked at. The model is left as it was. Takes about the time of fifty tokens,
    forward and backward, and of one and a half rows that are as long as two in a batch may be, forward; memory for
    the largest layer's gradient.
    """

    def __init__(
        self,
        model: Any,
        plan: ProjectionPlan,
        rows: Sequence[Row],
        *,
        longest: int,
        batch_tokens: int,
        reduction: Reduction = "mean",
        checkpointing: bool = False,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._model, self._plan, self._reduction = model, plan, reduction
        self._alone, self._longest = batch_tokens < SHORTEST_PAIR, longest
        # A longer row has a batch of its own, without padding; what is asked of the part has the same batches.
        self._longest_shared = min(longest, batch_tokens // 2)
        self._checkpointing, self._note = checkpointing, note
        self._tokens = [row.tokens for row in rows if row.status.usable]
        self._narrow = model.dtype in (torch.float16, torch.bfloat16)
        self._options = forward_options(model)

    def run(self) -> bool:
        """False if padding changes what the model makes of a row.

        CaptureError that names every layer whose vectors would not be those of single samples.
        """
        if not self._tokens:
            return True  # no row will have a vector
        self._refuse_mixed_axes()
        pads = self._pads_in_small(self._probing())
        return self._alone or (pads and self._pads_at_length())

    def _row(self, place: int, length: int) -> Row:
        """A row of ``length`` tokens (fewer where no row may be as long), another at every token for each ``place``."""
        tokens: Tokens = self._ids(min(length, self._longest), place).int().numpy()
        return Row(Sample(place, "", None, "", -1, 0), 0, 0, tokens, 1, Status.OK)

    def _ids(self, length: int, place: int = 0) -> Tensor:
        """(length,): tokens of the corpus, and of the vocabulary where the corpus has few: rows that are alike would
        not show that one is mixed with the other.
        """
        different = self._different_ids
        ids = different.roll(-place * max(1, len(different) // ROWS_LOOKED_AT)).repeat(-(-length // len(different)))
        ids = ids[:length].clone()
        if length > 3:
            ids[-2] = ids[0]  # a token comes twice
        return ids

    @cached_property
    def _different_ids(self) -> Tensor:
        of_corpus = dict.fromkeys(int(token) for tokens in self._tokens for token in tokens)
        vocabulary = int(self._model.get_input_embeddings().num_embeddings)
        drawn = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[: 2 * MANY_IDS].tolist()
        return torch.tensor(list(dict.fromkeys([*of_corpus, *drawn]))[:MANY_IDS])

    def _losses(self, rows: Sequence[Row]) -> Tensor:
        device = next(self._model.parameters()).device
        ids, labels, mask = (x.to(device) for x in pad(rows))
        logits = self._model(input_ids=ids, attention_mask=mask, **self._options).logits
        return next_token_losses_plainly(logits, labels, reduction=self._reduction)[0]

    def _refuse_mixed_axes(self) -> None:
        """CaptureError that names every layer whose rows are not the samples'."""
        uses = [use for layer in self._plan.layers for use in layer.block.uses]
        probe = AxisProbe(self._model, {use.module: layer_type_by_name(use.type) for use in uses})
        for size, length in [(1, 5)] if self._alone else zip(PROBE_SIZES, (5, 7), strict=True):
            rows = [self._row(place, length) for place in range(size)]
            probe.run(lambda rows=rows: self._losses(rows), size)  # type: ignore[misc]
        probe.refuse(_ALONE)

    def _probing(self) -> Projection:
        """Small random sides, whatever the plan's projection is and learns."""
        sides: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        for layer in self._plan.layers:
            block = layer.block
            pair = ((name, n, min(SIDE, n)) for name, n in (("in", block.n_in), ("out", block.n_out)))
            p_in, p_out = (
                torch.from_numpy(draws.gaussian(f"ghoststore/1|examining|layer={block.name}|{side}", k, n))
                for side, n, k in pair
            )
            sides[block.name] = (p_in, p_out)
        return Projection.with_sides(self._plan, sides)

    def _vectors(self, projection: Projection, batches: Sequence[Sequence[Row]]) -> Tensor:
        """(B, D): the engine's vectors of all rows of ``batches``."""
        with RowEncoder(
            self._model, projection, reduction=self._reduction, checkpointing=self._checkpointing
        ) as encoder:
            return torch.cat([encoder(rows).vectors for rows in batches])

    def _pads_in_small(self, projection: Projection) -> bool:
        """Whether blocks of rows padded in one batch are those of plain autograd of each alone.

        CaptureError if they are not for another reason than padding.
        """
        rows, expected_BD = self._plain(projection)
        if len(rows) < (1 if self._alone else 2):
            self._note(
                "the gradients of the tokens that the model was looked at with are not finite: whether the vectors are "
                "autograd's, and whether batch mates change them, is not known"
            )
            return True
        if not self._alone and not self._wrong(projection, self._vectors(projection, [rows]), expected_BD):
            return True
        alone = self._wrong(projection, self._vectors(projection, [[row] for row in rows]), expected_BD)
        if alone:
            raise CaptureError(
                f"the vectors of {len(alone)} layer(s) would not be autograd's gradients: {_named(alone)}. A weight is "
                "used where the engine does not see it (other than by calling its layer), or a layer computes "
                "something else than its class says. Call the layer itself, or leave it out: `exclude_layers` "
                f"'{','.join(alone)}'"
            )
        if not self._alone:
            self._refuse_mixing(projection, [self._row(row.sample.source_row, LENGTHS[0]) for row in rows])
        return self._alone

    def _plain(self, projection: Projection) -> tuple[list[Row], Tensor]:
        """Rows of other lengths and their blocks (B, D) by plain autograd of each alone: those that are finite."""
        projection.to(next(self._model.parameters()).device)
        rows: list[Row] = []
        plain: list[Tensor] = []
        for place in range(TRIED):
            if len(rows) < len(LENGTHS):
                row = self._row(place, LENGTHS[len(rows)])
                with ArrivingBlocks(self._model, projection) as arriving:
                    (loss,) = self._losses([row])
                    loss.backward()
                    vector_1D = projection.assemble([block.unsqueeze(0) for block in arriving.blocks()])
                if bool(vector_1D.isfinite().all()):  # others get a status of their own
                    rows.append(row)
                    plain.append(vector_1D)
        return rows, torch.cat(plain) if plain else torch.zeros(0, projection.plan.dimension)

    def _refuse_mixing(self, projection: Projection, rows: Sequence[Row]) -> None:
        """CaptureError if rows of one length, without padding, have other blocks together than alone."""
        alone_BD = self._vectors(projection, [[row] for row in rows])
        together = self._wrong(projection, self._vectors(projection, [rows]), alone_BD)
        if together:
            raise CaptureError(
                f"{type(self._model).__name__} gives a sample another gradient beside others than alone, in "
                f"{len(together)} layer(s): {_named(together)}. Something mixes the samples of a batch, such as a "
                "statistic over it or routing with a capacity: such a model cannot be built in batches; give "
                "`batch_tokens=1`"
            )

    def _wrong(self, projection: Projection, found_BD: Tensor, expected_BD: Tensor) -> dict[str, float]:
        """Relative errors by layer, of those that are more than rounding, or not numbers."""
        floor_B = FAINT * expected_BD.norm(dim=1)
        wrong = {}
        for layer in projection.plan.layers:
            expected, found = (x[:, layer.start : layer.stop] for x in (expected_BD, found_BD))
            gap_B, size_B = (found - expected).norm(dim=1), torch.maximum(expected.norm(dim=1), floor_B)
            error = float(torch.where(gap_B == 0, 0.0, gap_B / size_B).max())  # 0 ÷ 0: without a gradient
            if not error <= (NARROW_TOLERANCE if self._narrow else TOLERANCE):
                wrong[layer.block.name] = error
        return wrong

    def _pads_at_length(self) -> bool:
        """Half of the longest row that may share a batch, alone and padded to the whole: some attention leaves out
        tokens beyond a length. Not the longest row of the corpus: what is asked of the part may be longer.
        """
        real = max(1, self._longest_shared // 2)
        ids = self._ids(real)
        padded = torch.cat([ids, torch.zeros(self._longest_shared - real, dtype=torch.long)])
        alone, beside = (self._states(x, real) for x in (ids, padded))
        spread = float((alone - alone.mean(-1, keepdim=True)).norm())
        moved = float((beside - alone).norm())
        return moved <= (NARROW_STATES_TOLERANCE if self._narrow else STATES_TOLERANCE) * spread

    def _states(self, ids: Tensor, real: int) -> Tensor:
        """(real, width) float32: what the model makes of the first ``real`` of ``ids``, the others being padding.
        Before the head, where there is a model below it: the head is no part of the question, and a third of the work.
        """
        device = next(self._model.parameters()).device
        mask = (torch.arange(len(ids)) < real).long()
        body = getattr(self._model, "base_model", self._model)
        with torch.no_grad():
            output = body(
                input_ids=ids.unsqueeze(0).to(device),
                attention_mask=mask.unsqueeze(0).to(device),
                **forward_options(body),
            )
        states: Tensor = output.last_hidden_state if "last_hidden_state" in output else output.logits
        return states[0, :real].float()


def _named(errors: dict[str, float]) -> str:
    shown = ", ".join(f"{name} ({error:.2g})" for name, error in list(errors.items())[:NAMED])
    return shown + (f" and {len(errors) - NAMED} more" if len(errors) > NAMED else "")
