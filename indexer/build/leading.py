"""The leading eigenvectors of a second moment whose terms go by once.

An axis no longer than its random directions keeps the sum of all terms. Of a longer one that matrix is never formed: a
Nyström approximation gives its leading eigenvectors from its products with the directions (Tropp et al. 2017,
"Fixed-rank approximation of a positive-semidefinite matrix from streaming data"). It depends on the space that these
span, so they are made orthonormal only where rounding would tell.

Legend: n the length of an axis, m its random directions, k the wanted eigenvectors, C columns of terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from indexer.projection import draws
from indexer.projection.kfac import MomentFactor

OVERSAMPLING = 3
"""Number of random directions for each wanted eigenvector."""
LEAST_DIRECTIONS = 64
"""Least number of random directions, for the case of few eigenvectors and a slowly falling spectrum."""
ROUNDING = 2.0**-20
"""Eigenvalues below this share of the largest are rounding errors of float32 sums."""
WELL_CONDITIONED = 2
"""From so many times the directions on, the length of an axis makes gaussian numbers nearly orthogonal."""


class Leading:
    """The ``k`` leading eigenvectors of the mean of terms Y Yᵀ that are added one by one. Memory: n × m numbers."""

    def __init__(self, n: int, k: int, directions_NM: Tensor | None, device: torch.device) -> None:
        """``directions_NM``: those of :func:`drawn_directions`, which several may share."""
        self.k, self._n, self._directions = k, n, directions_NM
        self._products = torch.zeros(n, random_directions(n, k), device=device)
        self._trace = torch.zeros((), dtype=torch.float64, device=device)
        self._terms = 0

    def add(self, y_NC: Tensor, terms: int) -> None:
        """Add ``terms`` terms at once: the columns of their Y side by side, (n, columns)."""
        right_CM = y_NC.t() if self._directions is None else y_NC.t() @ self._directions
        self._products.addmm_(y_NC, right_CM)
        self._trace += torch.linalg.vector_norm(y_NC).double().square()
        self._terms += terms

    def factor(self) -> MomentFactor:
        """The k largest eigenvalues and their eigenvectors. The sign of a vector makes its largest number positive.

        ValueError if the mean is zero or not finite.
        """
        products = _wide(self._products) / self._terms
        trace, size = float(self._trace) / self._terms, float(products.norm())
        if not (0 < size < math.inf and 0 < trace < math.inf):
            raise ValueError("the gradients are zero or not finite")
        if self._directions is None:
            values, vectors = torch.linalg.eigh((products + products.t()) / 2)
            rows = vectors.flip(1)[:, : self.k].t()
        else:
            values, rows = self._approximated(products, _wide(self._directions))
        values = values.flip(0)[: self.k].clamp_min(0)
        signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
        outside = self._n - self.k
        rest = max(0.0, trace - float(values.sum())) / outside if outside else 0.0
        return MomentFactor((rows * signs).float().contiguous().cpu(), values.float().cpu(), rest)

    def _approximated(self, products_NM: Tensor, directions_NM: Tensor) -> tuple[Tensor, Tensor]:
        """(the m eigenvalues, ascending, the k leading eigenvectors as rows): those of B Bᵀ for
        B = products · (directionsᵀ products)^-½, by the eigenvectors of the small Bᵀ B.
        """
        core = directions_NM.t() @ products_NM
        inner, turn = torch.linalg.eigh((core + core.t()) / 2)
        root = turn * torch.where(inner > ROUNDING * inner[-1], inner.rsqrt(), 0.0)
        small = root.t() @ (products_NM.t() @ products_NM) @ root
        values, turn = torch.linalg.eigh((small + small.t()) / 2)
        # Not divided by their lengths but made orthonormal, for some may be zero.
        return values, torch.linalg.qr(products_NM @ (root @ turn.flip(1)[:, : self.k])).Q.t()


def _wide(matrix: Tensor) -> Tensor:
    """In float64: on a GPU of CUDA where it lies, else on the CPU, since others have no such numbers."""
    return matrix.double() if matrix.is_cuda else matrix.cpu().double()


def random_directions(n: int, k: int) -> int:
    """m for k eigenvectors of an axis of length n."""
    return min(n, max(OVERSAMPLING * k, LEAST_DIRECTIONS))


def drawn_directions(key: str, n: int, k: int, device: torch.device) -> Tensor | None:
    """(n, m) float32, drawn by ``key``; None for a short axis, where they would be all there are."""
    m = random_directions(n, k)
    if m == n:
        return None
    drawn = torch.from_numpy(draws.gaussian(key, m, n)).t()
    drawn = drawn if n >= WELL_CONDITIONED * m else torch.linalg.qr(drawn).Q
    return drawn.contiguous().to(device)


def leading_bytes(axes: Sequence[tuple[int, int]]) -> int:
    """The most bytes on the device of the :class:`Leading` of ``axes`` (n, k), where those alike share directions."""
    return sum(4 * n * random_directions(n, k) for each in (axes, set(axes)) for n, k in each)
