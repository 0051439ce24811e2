"""Random matrices that are bit-identical on every machine and in every release.

A draw depends only on its key. The bits come from Philox4x64, a counter-based generator (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011), whose stream NumPy guarantees. All later operations are those that
IEEE 754 rounds exactly (add, multiply, divide, square root), in a fixed order, and never those of a BLAS or a maths
library. So the hash of a matrix can be written into a manifest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

LEVELS = 1 << 16
"""Levels of the gaussian table: 16 bits a number."""


def bits(key: str, words: int) -> NDArray[np.uint64]:
    """``words`` 64-bit words of the Philox stream whose 128-bit key is SHA-256 of ``key``, truncated."""
    digest = hashlib.sha256(key.encode()).digest()
    philox_key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    return np.asarray(np.random.Philox(key=philox_key).random_raw(words), dtype=np.uint64)


def log_exactly(x: Float64) -> Float64:
    """Natural logarithm of positive ``x`` with an error of about 1e-15, by exactly rounded operations only.

    x = m · 2^e with m in [√½, √2); log m = 2 artanh((m-1)/(m+1)) by its series.
    """
    mantissa, exponent = np.frexp(x)
    low = mantissa < math.sqrt(0.5)
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    exponent = exponent - low
    z = (mantissa - 1.0) / (mantissa + 1.0)
    z2 = z * z
    series = np.zeros_like(z)
    for odd in range(25, 0, -2):
        series = series * z2 + 1.0 / odd
    return 2.0 * z * series + exponent * 0.6931471805599453


def _polynomial(coefficients: str) -> tuple[float, ...]:
    return tuple(map(float, coefficients.split()))


# Wichura, "Algorithm AS 241: the percentage points of the normal distribution", Applied Statistics 37
# (1988): numerators and denominators, highest power first.
_CENTRE = (
    _polynomial(
        "2509.0809287301226727 33430.575583588128105 67265.770927008700853 45921.953931549871457 "
        "13731.693765509461125 1971.5909503065514427 133.14166789178437745 3.387132872796366608"
    ),
    _polynomial(
        "5226.495278852545925 28729.085735721942674 39307.89580009271061 21213.794301586595867 "
        "5394.1960214247511077 687.1870074920579083 42.313330701600911252 1.0"
    ),
)
_TAIL = (
    _polynomial(
        "7.7454501427834140764e-4 0.0227238449892691845833 0.24178072517745061177 1.27045825245236838258 "
        "3.64784832476320460504 5.7694972214606914055 4.6303378461565452959 1.42343711074968357734"
    ),
    _polynomial(
        "1.05075007164441684324e-9 5.475938084995344946e-4 0.0151986665636164571966 0.14810397642748007459 "
        "0.68976733498510000455 1.6763848301838038494 2.05319162663775882187 1.0"
    ),
)


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], r: Float64) -> Float64:
    numerator, denominator = np.zeros_like(r), np.zeros_like(r)
    for high, low in zip(*coefficients, strict=True):
        numerator = numerator * r + high
        denominator = denominator * r + low
    return numerator / denominator


@cache
def gaussian_table() -> Float32:
    """The ``LEVELS`` quantiles of the standard normal at (i + ½)/LEVELS, scaled to variance 1. float32.

    Mean 0 and variance 1 are exact up to rounding, and the fourth moment is 2.999, which is enough for a projection.
    Four numbers come from one 64-bit word. The largest number is 4.3.
    """
    p = (np.arange(LEVELS // 2, LEVELS, dtype=np.float64) + 0.5) / LEVELS
    q = p - 0.5
    centre = q * _ratio(_CENTRE, 0.180625 - q * q)
    # Beyond |q| = 0.425 AS 241 uses r = √(-log(1-p)); up to r = 5 one pair of polynomials serves.
    tail = _ratio(_TAIL, np.sqrt(-log_exactly(1.0 - p)) - 1.6)
    upper = np.where(q <= 0.425, centre, tail)
    variance = tree_sum(upper * upper) / upper.size
    upper = upper / np.sqrt(variance)
    table: Float32 = np.concatenate([-upper[::-1], upper]).astype(np.float32)
    table.setflags(write=False)
    return table


def tree_sum(x: Float64) -> Float64:
    """Sum over the last axis by repeated halving: an order that does not depend on a library or a vector width."""
    size = 1 << max(0, x.shape[-1] - 1).bit_length()
    if size != x.shape[-1]:
        x = np.concatenate([x, np.zeros((*x.shape[:-1], size - x.shape[-1]))], axis=-1)
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return np.asarray(x[..., 0])


def gaussian(key: str, k: int, n: int) -> Float32:
    """(k, n) float32: standard normal numbers divided by √k, so that E[PᵀP] = I."""
    words = -(-k * n // 4)
    index = bits(key, words).astype("<u8", copy=False).view("<u2")[: k * n]
    scaled: Float32 = gaussian_table()[index] * np.float32(1.0 / math.sqrt(k))
    return scaled.reshape(k, n)


def signs(key: str, count: int) -> Float32:
    """(count,) float32: independent random signs, +1 or -1."""
    packed = bits(key, -(-count // 64)).astype("<u8", copy=False).view(np.uint8)
    ones = np.unpackbits(packed, count=count, bitorder="little")
    return ones.astype(np.float32) * np.float32(2) - np.float32(1)


def rademacher(key: str, k: int, n: int) -> Float32:
    """(k, n) float32: random signs divided by √k, so that E[PᵀP] = I."""
    return (signs(key, k * n) * np.float32(1.0 / math.sqrt(k))).reshape(k, n)


def orthonormal(key: str, k: int, n: int) -> Float32:
    """(k, n) float32, k ≤ n: orthonormal rows times √(n/k), so that E[PᵀP] = I and PPᵀ = (n/k) I.

    Gram-Schmidt of gaussian rows in float64, with each row orthogonalised twice ("twice is enough", Giraud et al.,
    2005). It costs 4·k²·n elementwise operations, more than a LAPACK would, whose results differ between machines.
    """
    rows = gaussian(key, k, n).astype(np.float64)
    for j in range(k):
        row = rows[j]
        for _ in range(2):
            if j:
                coefficient = tree_sum(rows[:j] * row)
                row = row - tree_sum((rows[:j] * coefficient[:, None]).T)
        rows[j] = row / np.sqrt(tree_sum(row * row))
    return (rows * math.sqrt(n / k)).astype(np.float32)


KINDS: dict[str, Callable[[str, int, int], Float32]] = {
    "gaussian": gaussian,
    "rademacher": rademacher,
    "orthonormal": orthonormal,
}
"""Projection kinds by name. Each draws (k, n) float32 from (key, k, n) with E[PᵀP] = I."""


def permutation(key: str, count: int) -> NDArray[np.int64]:
    """(count,) int64: a random permutation of 0 … count-1, the order of random 64-bit words (equal ones by place)."""
    return np.argsort(bits(key, count), kind="stable").astype(np.int64)
