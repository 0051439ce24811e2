"""The check of a model before a build: would its vectors be the samples' own gradients?

With a few tokens of the corpus it checks that the samples are the first axis of every layer, that each block is the one
that autograd gives for a sample alone, and that neither batch mates nor padding change it. A failure is an error that
names the layers. If only padding changes vectors, the build uses batches of rows of one length.

Legend: B samples, K and J the ranks of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghoststore.corpus import Sample
from ghoststore.errors import CaptureError
from ghoststore.store.part.status import Status
from indexer.encode.encoder import RowEncoder, inputs_of
from indexer.encode.losses import Reduction, next_token_losses_plainly
from indexer.encode.modes import forward_options
from indexer.encode.plain import ArrivingBlocks
from indexer.encode.sample_axis import PROBE_SIZES, AxisProbe, unsupported
from indexer.encode.tokens import Row, Tokens
from indexer.projection import draws
from indexer.projection.matrices import Projection
from indexer.projection.plan import ProjectionPlan

LENGTHS = (7, 5, 3)
"""Lengths, in tokens, of the samples that are compared with autograd. They are shorter if no row may be as long."""
TRIED = 6
"""Most samples to try for the comparison, because the gradient of some may be out of range."""
SHORTEST_PAIR = 4
"""Tokens of the smallest batch of two rows (two tokens each). With less, every row has a batch of its own."""
SIDE = 4
"""Ranks of the blocks that are compared. Sixteen random sums show any wrong gradient."""
ROWS_LOOKED_AT = 16
"""Number of usable rows of the corpus whose tokens are used."""
MANY_IDS = 32
"""Number of different tokens in the samples, if the model has as many."""
TOLERANCE, NARROW_TOLERANCE = 1e-2, 0.2
"""Largest relative difference of a block that can be rounding, in float32 and in 16 bits. With large random weights
float32 reaches 2e-3; wrong gradients differ by far more.
"""
STATES_TOLERANCE, NARROW_STATES_TOLERANCE = 1e-2, 0.1
FAINT = 1e-3
"""A block with a smaller share of the vector's length is compared relative to that share, because its own digits are
rounding errors."""
NAMED = 12
_ALONE = (
    "Where it is all layers, the model itself mixes the samples of a batch (a statistic over it, routing with a "
    "capacity), and can only be given one sample at a time: give `batch_tokens=1`. "
)


class ModelCheck:
    """``ModelCheck(model, plan, rows, …).run()`` says whether rows of different lengths may share a batch.

    ``rows`` are some rows of the corpus. ``longest`` is the largest number of tokens of a row, and ``batch_tokens``
    that of a batch. ``note`` gets a message about what could not be checked. The model is left as it was.

    Time: forward and backward passes of about fifty tokens, and forward passes of at most ¾ · ``batch_tokens`` tokens.
    Memory: that of the largest layer's gradient.
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
        # A longer row has a batch of its own, without padding, in builds and in queries.
        self._longest_shared = min(longest, batch_tokens // 2)
        self._checkpointing, self._note = checkpointing, note
        self._tokens = [row.tokens for row in rows if row.status.usable]
        self._starts = [row.tokens[:1] for row in rows if row.status.usable and row.source is not None]
        """What the decoder of an encoder-decoder model reads first; none for a causal one."""
        self._narrow = model.dtype in (torch.float16, torch.bfloat16)
        self._options = forward_options(model)

    def run(self) -> bool:
        """Whether rows of different lengths may share a batch: False if padding changes the vectors.

        CaptureError, with the names of the layers, if vectors would not be the gradients of single samples.
        """
        if not self._tokens:
            return True  # no row will have a vector
        self._refuse_mixed_axes()
        pads = self._pads_in_small(self._probing())
        return self._alone or (pads and self._pads_at_length())

    def _row(self, place: int, length: int) -> Row:
        """A row of ``length`` tokens, or fewer if no row may be as long. Rows of different ``place`` differ at every
        token.
        """
        tokens: Tokens = self._ids(min(length, self._longest), place).int().numpy()
        sample = Sample(place, "", None, "", -1, 0)
        if not self._starts:
            return Row(sample, 0, 0, tokens, 1, Status.OK)
        read = np.concatenate([self._starts[0], tokens[::-1][: max(1, len(tokens) - 2)]])
        return Row(sample, 0, 0, read, 1, Status.OK, tokens)

    def _ids(self, length: int, place: int = 0) -> Tensor:
        """(length,): tokens of the corpus, filled up from the vocabulary if the corpus has few different ones.

        Equal rows would not show that the model mixes them.
        """
        different = self._different_ids
        ids = different.roll(-place * max(1, len(different) // ROWS_LOOKED_AT)).repeat(-(-length // len(different)))
        ids = ids[:length].clone()
        if length > 3:
            ids[-2] = ids[0]  # one token occurs twice, for the embedding's gradient
        return ids

    @cached_property
    def _different_ids(self) -> Tensor:
        of_corpus = dict.fromkeys(int(token) for tokens in self._tokens for token in tokens)
        vocabulary = len(self._model.get_input_embeddings().weight)
        drawn = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[: 2 * MANY_IDS].tolist()
        return torch.tensor(list(dict.fromkeys([*of_corpus, *drawn]))[:MANY_IDS])

    def _losses(self, rows: Sequence[Row]) -> Tensor:
        device = next(self._model.parameters()).device
        inputs, labels = inputs_of(rows, device)
        logits = self._model(**inputs, **self._options).logits
        return next_token_losses_plainly(logits, labels, reduction=self._reduction)[0]

    def _refuse_mixed_axes(self) -> None:
        """CaptureError, with the names of the layers, if the first axis of a layer is not that of the samples."""
        uses = [use for layer in self._plan.layers for use in layer.block.uses]
        probe = AxisProbe(self._model, {use.module: use.kind for use in uses})
        for size, length in [(1, 5)] if self._alone else zip(PROBE_SIZES, (5, 7), strict=True):
            rows = [self._row(place, length) for place in range(size)]
            probe.run(lambda rows=rows: self._losses(rows), size)  # type: ignore[misc]
        probe.refuse(_ALONE)

    def _probing(self) -> Projection:
        """A projection to small random blocks, whatever the projection of the plan is."""
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
        settings: dict[str, Any] = {"reduction": self._reduction, "checkpointing": self._checkpointing}
        with RowEncoder(self._model, projection, find_uses=False, **settings) as encoder:
            return torch.cat([encoder(rows).vectors for rows in batches])

    def _pads_in_small(self, projection: Projection) -> bool:
        """Whether the blocks of rows in one padded batch equal those by plain autograd of each row alone.

        CaptureError if they differ for another reason than padding.
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
        wrong = self._wrong(projection, self._vectors(projection, [[row] for row in rows]), expected_BD)
        if wrong:
            raise unsupported(
                f"the vectors of {len(wrong)} layer(s) would not be autograd's gradients: {_named(wrong)}. A weight is "
                "used where the engine does not see it (other than by calling its layer), or a layer computes "
                "something else than its class says. Call the layer itself, or leave it out: `exclude_layers` "
                f"'{','.join(wrong)}'",
                wrong,
            )
        if not self._alone:
            self._refuse_mixing(projection, [self._row(row.sample.source_row, LENGTHS[0]) for row in rows])
        return self._alone

    def _plain(self, projection: Projection) -> tuple[list[Row], Tensor]:
        """(rows of different lengths, their vectors (B, D) by plain autograd of each row alone), finite ones only."""
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
                if bool(vector_1D.isfinite().all()):  # a build gives other rows the status NOT_FINITE
                    rows.append(row)
                    plain.append(vector_1D)
        return rows, torch.cat(plain) if plain else torch.zeros(0, projection.plan.dimension)

    def _refuse_mixing(self, projection: Projection, rows: Sequence[Row]) -> None:
        """CaptureError if rows of one length, without padding, have other blocks in one batch than alone."""
        alone_BD = self._vectors(projection, [[row] for row in rows])
        mixed = self._wrong(projection, self._vectors(projection, [rows]), alone_BD)
        if mixed:
            raise CaptureError(
                f"{type(self._model).__name__} gives a sample another gradient beside others than alone, in "
                f"{len(mixed)} layer(s): {_named(mixed)}. Something mixes the samples of a batch, such as a "
                "statistic over it or routing with a capacity: such a model cannot be built in batches; give "
                "`batch_tokens=1`"
            )

    def _wrong(self, projection: Projection, measured_BD: Tensor, expected_BD: Tensor) -> dict[str, float]:
        """The relative error of each layer whose error is more than rounding, or NaN."""
        floor_B = FAINT * expected_BD.norm(dim=1)
        wrong = {}
        for layer in projection.plan.layers:
            expected, measured = (x[:, layer.start : layer.stop] for x in (expected_BD, measured_BD))
            gap_B, size_B = (measured - expected).norm(dim=1), torch.maximum(expected.norm(dim=1), floor_B)
            error = float(torch.where(gap_B == 0, 0.0, gap_B / size_B).max())  # 0 ÷ 0 for a layer without a gradient
            if not error <= (NARROW_TOLERANCE if self._narrow else TOLERANCE):
                wrong[layer.block.name] = error
        return wrong

    def _pads_at_length(self) -> bool:
        """Whether padding is harmless at full length: some attention ignores tokens beyond a certain distance.

        Compares a row of half the longest length that may share a batch with the same row padded to that length. The
        length does not come from the corpus, because val samples of later queries may be longer.
        """
        real = max(1, self._longest_shared // 2)
        ids = self._ids(real)
        padded = torch.cat([ids, torch.zeros(self._longest_shared - real, dtype=torch.long)])
        alone, padded_states = (self._states(x, real) for x in (ids, padded))
        spread = float((alone - alone.mean(-1, keepdim=True)).norm())
        change = float((padded_states - alone).norm())
        return change <= (NARROW_STATES_TOLERANCE if self._narrow else STATES_TOLERANCE) * spread

    def _states(self, ids: Tensor, real: int) -> Tensor:
        """(real, width) float32: the hidden states of the first ``real`` of ``ids``; the others are padding. Of an
        encoder-decoder model those of a few tokens of the decoder, whose encoder reads ``ids``.

        They are taken before the head, if there is a base model, because the head does not matter here and takes a
        third of the time.
        """
        device = next(self._model.parameters()).device
        mask = (torch.arange(len(ids)) < real).long()
        body = getattr(self._model, "base_model", self._model)
        read: dict[str, Tensor] = {}
        if self._starts:  # the decoder reads the same; what it makes of it depends on the encoder
            tokens = self._row(0, LENGTHS[0]).tokens
            read["decoder_input_ids"] = torch.from_numpy(tokens).long().unsqueeze(0).to(device)
        with torch.no_grad():
            output = body(
                input_ids=ids.unsqueeze(0).to(device),
                attention_mask=mask.unsqueeze(0).to(device),
                **read,
                **forward_options(body),
            )
        states: Tensor = output.last_hidden_state if "last_hidden_state" in output else output.logits
        return states[0].float() if read else states[0, :real].float()


def _named(errors: dict[str, float]) -> str:
    shown = ", ".join(f"{name} ({error:.2g})" for name, error in list(errors.items())[:NAMED])
    return shown + (f" and {len(errors) - NAMED} more" if len(errors) > NAMED else "")
