"""The second step of the projection: a sparse JL sketch of the whole vector to K numbers.

A balanced count sketch (Charikar, Chen, Farach-Colton 2002): a seeded permutation deals the D coordinates
to K buckets in equal numbers, each with a random sign, and a bucket is the signed sum of its coordinates.
E[⟨Sx, Sy⟩] = ⟨x, y⟩ exactly, since signs are independent; one non-zero a column is the least variance a
sparse sketch can have for inner products. Sums run in a fixed order: no atomics, the same on every run.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from indexer import draws


class Sketch:
    """Maps (B, n) to (B, k), k ≤ n. Drawn from ``key``, n and k alone."""

    def __init__(self, key: str, n: int, k: int) -> None:
        if not 0 < k <= n:
            raise ValueError(f"a sketch of {n} numbers can have 1 to {n} numbers, not {k}")
        self.n, self.k = n, k
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
        """(B, n) to (B, k) float32."""
        dealt = x_BN.float().index_select(1, self.source) * self.weight
        return dealt.view(x_BN.shape[0], self.k, self.width).sum(-1)

    def matrix(self) -> Tensor:
        """The (k, n) matrix: the slow, obvious form, for tests."""
        dense = torch.zeros(self.k, self.n)
        rows = torch.arange(self.k).repeat_interleave(self.width)
        return dense.index_put_((rows, self.source.cpu()), self.weight.cpu(), accumulate=True)
