"""The second step of the projection: a sparse Johnson-Lindenstrauss (JL) sketch of the vector to K numbers.

It is a balanced count sketch (Charikar, Chen, Farach-Colton 2002). A seeded permutation assigns the n numbers of the
vector to K buckets of equal size, each number with a random sign; a bucket is the signed sum of its numbers.
E[⟨Sx, Sy⟩] = ⟨x, y⟩ exactly, because the signs are independent. Sums have a fixed order, without atomics, so every run
gives the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from indexer.projection import draws


class Sketch:
    """Maps (B, n) to (B, k), k ≤ n. It depends only on ``key``, n and k."""

    def __init__(self, key: str, n: int, k: int) -> None:
        if not 0 < k <= n:
            raise ValueError(f"a sketch of {n} numbers can have 1 to {n} numbers, not {k}")
        self.n, self.k = n, k
        self.read = n
        """Numbers of the input vectors, of which it reads n."""
        self.width = -(-n // k)
        key = f"{key}|sketch={k}x{n}"
        # The permutation is assigned to the buckets in turn, so the last row of places may not fill all buckets.
        places = torch.full((self.width * k,), n)
        places[:n] = torch.from_numpy(draws.permutation(f"{key}|places", n))
        source = places.view(self.width, k).t().reshape(-1)
        sign = torch.from_numpy(draws.signs(f"{key}|signs", self.width * k))
        # Empty places read the first number of the vector with weight zero.
        empty = source >= n
        self.source = torch.where(empty, 0, source)
        self.weight = torch.where(empty, torch.zeros(()), sign)

    def of(self, places: Tensor, read: int) -> Sketch:
        """Change this sketch to read the n numbers at ``places`` out of vectors of ``read`` numbers, and return it."""
        self.source, self.read = places[self.source], read
        return self

    def to(self, device: torch.device) -> Sketch:
        """Move to ``device``, in place."""
        self.source, self.weight = self.source.to(device), self.weight.to(device)
        return self

    def digest(self) -> bytes:
        """SHA-256 of the places and weights of the sketch."""
        return hashlib.sha256(
            self.source.cpu().numpy().astype("<i8").tobytes() + self.weight.cpu().numpy().astype("<f4").tobytes()
        ).digest()

    def __call__(self, x_BN: Tensor) -> Tensor:
        """(B, k) float32: the sketches of vectors (B, read)."""
        signed = x_BN.float().index_select(1, self.source) * self.weight
        return signed.view(x_BN.shape[0], self.k, self.width).sum(-1)


class BlockSketches:
    """Maps (B, n) to (B, K), block by block: some numbers of each block as they are, then a sketch of the others.

    ``columns`` are the (start, stop) of the blocks, which together cover the n numbers. ``sizes`` are the numbers of
    each block afterwards. ``kept`` are the places, in each block, of the numbers that stay as they are, ascending. The
    sketches depend only on these, on ``key`` and on ``names``.
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
            sketched = others.nonzero().flatten() + start
            self.kept.append(places + start)
            if size == len(places):
                self.sketches.append(None)
            else:
                sketch = Sketch(f"{key}|layer={name}", len(sketched), size - len(places))
                self.sketches.append(sketch.of(sketched, self.n))

    @property
    def k(self) -> int:
        """K, the numbers after the sketch."""
        return sum(self.sizes)

    def to(self, device: torch.device) -> BlockSketches:
        """Move to ``device``, in place."""
        self.kept = [places.to(device) for places in self.kept]
        for sketch in self.sketches:
            if sketch is not None:
                sketch.to(device)
        return self

    def digest(self) -> bytes:
        """SHA-256 of the kept places and of the sketches."""
        digest = hashlib.sha256()
        for places, sketch in zip(self.kept, self.sketches, strict=True):
            digest.update(places.cpu().numpy().astype("<i8").tobytes())
            digest.update(b"" if sketch is None else sketch.digest())
        return digest.digest()

    def __call__(self, x_BN: Tensor) -> Tensor:
        """(B, K) float32: the sketches of vectors (B, n)."""
        pieces = []
        for places, sketch in zip(self.kept, self.sketches, strict=True):
            pieces.append(x_BN.float().index_select(1, places))
            if sketch is not None:
                pieces.append(sketch(x_BN))
        return torch.cat(pieces, dim=1)
