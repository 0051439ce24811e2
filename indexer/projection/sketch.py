"""The second step of the projection: a sparse JL sketch of the whole vector to K numbers.

A balanced count sketch (Charikar, Chen, Farach-Colton 2002): a seeded permutation deals the D coordinates
to K buckets in equal numbers, each with a random sign, and a bucket is the signed sum of its coordinates.
E[⟨Sx, Sy⟩] = ⟨x, y⟩ exactly, since signs are independent; one non-zero a column is the least variance a
sparse sketch can have for inner products. Sums run in a fixed order: no atomics, the same on every run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from indexer.projection import draws


class Sketch:
    """Maps (B, n) to (B, k), k ≤ n. Drawn from ``key``, n and k alone."""

    def __init__(self, key: str, n: int, k: int) -> None:
        if not 0 < k <= n:
            raise ValueError(f"a sketch of {n} numbers can have 1 to {n} numbers, not {k}")
        self.n, self.k = n, k
        self.read = n
        """Numbers that it is given; of these it reads n."""
        self.width = -(-n // k)
        key = f"{key}|sketch={k}x{n}"
        # The permutation is dealt like cards, bucket after bucket: the last row of places may be short.
        dealt = torch.full((self.width * k,), n)
        dealt[:n] = torch.from_numpy(draws.permutation(f"{key}|places", n))
        source = dealt.view(self.width, k).t().reshape(-1)
        sign = torch.from_numpy(draws.signs(f"{key}|signs", self.width * k))
        # Places past the end of the vector read its first number with weight zero.
        past = source >= n
        self.source = torch.where(past, 0, source)
        self.weight = torch.where(past, torch.zeros(()), sign)

    def of(self, places: Tensor, read: int) -> Sketch:
        """This sketch, reading the n ``places`` (n,) out of ``read`` numbers; in place."""
        self.source, self.read = places[self.source], read
        return self

    def to(self, device: torch.device) -> Sketch:
        """Move to ``device``, in place."""
        self.source, self.weight = self.source.to(device), self.weight.to(device)
        return self

    def digest(self) -> bytes:
        """SHA-256 of the places and weights."""
        return hashlib.sha256(
            self.source.cpu().numpy().astype("<i8").tobytes() + self.weight.cpu().numpy().astype("<f4").tobytes()
        ).digest()

    def __call__(self, x_BN: Tensor) -> Tensor:
        """(B, read) to (B, k) float32."""
        dealt = x_BN.float().index_select(1, self.source) * self.weight
        return dealt.view(x_BN.shape[0], self.k, self.width).sum(-1)


class BlockSketches:
    """Maps (B, n) to (B, K), block by block: of each block some numbers as they are, then a sketch of the others.

    ``columns`` are the (start, stop) of the blocks in the vector, together all n; ``sizes`` their numbers afterwards;
    ``kept`` the places, in each block, of the numbers that stay as they are, ascending. Drawn from ``key``, the names
    and these alone.
    """

    def __init__(
        self,
        key: str,
        names: Sequence[str],
        columns: Sequence[tuple[int, int]],
        sizes: Sequence[int],
        kept: Sequence[Tensor],
    ) -> None:
        self.n = columns[-1][1]
        self.sizes = list(sizes)
        self.kept: list[Tensor] = []
        self.sketches: list[Sketch | None] = []
        for name, (start, stop), size, places in zip(names, columns, sizes, kept, strict=True):
            width = stop - start
            others = torch.ones(width, dtype=torch.bool)
            others[places] = False
            rest = others.nonzero().flatten() + start
            self.kept.append(places + start)
            if size == len(places):
                self.sketches.append(None)
            else:
                sketch = Sketch(f"{key}|layer={name}", len(rest), size - len(places))
                self.sketches.append(sketch.of(rest, self.n))

    @property
    def k(self) -> int:
        """K."""
        return sum(self.sizes)

    def to(self, device: torch.device) -> BlockSketches:
        """Move to ``device``, in place."""
        self.kept = [places.to(device) for places in self.kept]
        for sketch in self.sketches:
            if sketch is not None:
                sketch.to(device)
        return self

    def digest(self) -> bytes:
        """SHA-256 of what is kept and of the sketches."""
        digest = hashlib.sha256()
        for places, sketch in zip(self.kept, self.sketches, strict=True):
            digest.update(places.cpu().numpy().astype("<i8").tobytes())
            digest.update(b"" if sketch is None else sketch.digest())
        return digest.digest()

    def __call__(self, x_BN: Tensor) -> Tensor:
        """(B, n) to (B, K) float32."""
        pieces = []
        for places, sketch in zip(self.kept, self.sketches, strict=True):
            pieces.append(x_BN.float().index_select(1, places))
            if sketch is not None:
                pieces.append(sketch(x_BN))
        return torch.cat(pieces, dim=1)
