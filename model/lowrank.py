"""The best approximation of a matrix by one of low rank (Eckart-Young), faster than an SVD.

The leading singular vectors of the short side are the leading eigenvectors of the Gram matrix.
Small ones come from `eigh`; large ones from subspace iteration with a Chebyshev filter (Zhou et
al. 2006), which is all matrix products, until the residual says that the error is the SVD's to
`EXCESS`. Where it does not get there, `eigh` does it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import acosh
from typing import Any

import torch
from torch import Tensor

LARGE = 512
"""Short sides from which iteration is faster than `eigh`."""
EXCESS = 7e-5
"""Of the error over the smallest possible one; an estimate, so it leaves room below 1e-4."""
SPARE = 1 / 11
"""More vectors than asked for, over the short side: they part the wanted from the rest."""
ROUNDS = 4
"""Filters before `eigh` takes over."""
DEGREE = 8
"""Largest degree of a filter."""
GROWTH = 17.0
"""Logarithm of the largest gain of a filter: beyond it, columns would become parallel."""
STRIP = 448
"""Rows of a Gram matrix that are computed at once."""
STEEP = 10.0
"""Energy kept over energy lost from which products of rounded factors are too rough."""


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a matrix with at most this rank, by projection.

    U·Uᵀ·A needs neither the singular vectors of the long side nor the singular values. Half
    precision is carried in float32; the result has that precision.
    """
    if rank >= min(matrix.shape):
        return matrix
    if matrix.shape[0] < matrix.shape[1]:
        return truncated(matrix.T, rank).T
    exact = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    large = exact.dtype == torch.float32 and exact.shape[1] >= LARGE
    vectors = iterated(exact, rank) if large and 3 * rank <= exact.shape[1] else None
    if vectors is None:
        long = exact.double()
        vectors = torch.linalg.eigh(long.T @ long).eigenvectors[:, -rank:].to(exact.dtype)
    return projected(exact, vectors, rough=large)


def projected(matrix: Tensor, vectors: Tensor, rough: bool) -> Tensor:
    """A·V·Vᵀ; `rough`: by bfloat16 factors, unless their rounding would count in the error."""
    if rough:
        with half_products():
            parts = matrix @ vectors
            captured = energy(parts)
            if captured < STEEP * (energy(matrix) - captured):
                return parts @ vectors.T
    return (matrix @ vectors) @ vectors.T


def energy(matrix: Tensor) -> float:
    """Sum of squares."""
    return float(torch.linalg.vector_norm(matrix)) ** 2


@contextmanager
def half_products() -> Iterator[None]:
    """Products of float32 matrices from bfloat16 factors, where the CPU is faster at them.

    Sums stay in float32; products of matrices that were bfloat16 are exact.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def iterated(matrix: Tensor, rank: int) -> Tensor | None:
    """Leading right singular vectors (D, rank) of a (F, D) matrix; None if they do not settle."""
    width = matrix.shape[1]
    count = rank + round(SPARE * width)
    generator = torch.Generator().manual_seed(0)
    with half_products():
        gram = gram_of(matrix)
        whole = float(gram.diagonal().sum())
        start = torch.randn(width, count, generator=generator)
        values, vectors, _ = ritz(gram, orthonormal(gram @ start))
        for _ in range(ROUNDS):
            found = filtered(gram, vectors, values)
            if found is None:
                return None
            values, vectors, residual = ritz(gram, orthonormal(found))
            top, wanted = values[-rank:], vectors[:, -rank:]
            gap = (top - values[0]).clamp(min=1e-6 * float(values[-1]))
            lost = float((residual[-rank:].square() / gap).sum())
            rest = whole - float(top.sum())
            if lost <= 2 * EXCESS * rest:
                return wanted.contiguous()
    return None


def gram_of(matrix: Tensor) -> Tensor:
    """AᵀA, the half below the diagonal copied from above it."""
    gram = matrix.new_empty(matrix.shape[1], matrix.shape[1])
    for first in range(0, len(gram), STRIP):
        strip = slice(first, first + STRIP)
        gram[strip, first:] = matrix[:, strip].T @ matrix[:, first:]
        gram[first:, strip] = gram[strip, first:].T
    return gram


def ritz(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate eigenvalues in ascending order, their vectors, and norms of the residuals."""
    image = gram @ basis
    values, turn = torch.linalg.eigh(basis.T @ image)
    vectors = basis @ turn
    return values, vectors, torch.linalg.vector_norm(image @ turn - vectors * values, dim=0)


def orthonormal(vectors: Tensor) -> Tensor:
    """A basis of what the columns span."""
    basis: Tensor = torch.linalg.qr(vectors).Q
    return basis


def filtered(gram: Tensor, vectors: Tensor, values: Tensor) -> Tensor | None:
    """Columns after a Chebyshev polynomial that is small below the smallest of the values."""
    half = float(values[len(values) // 10]) / 2
    largest = float(values[-1])
    if half <= 1e-6 * largest:
        return None
    gain = acosh(max(largest / half - 1, 1 + 1e-6))
    degree = max(2, min(DEGREE, int(GROWTH / gain)))
    before, now = vectors, torch.addmm(vectors, gram, vectors, beta=-1, alpha=1 / half)
    for _ in range(degree - 1):
        step = torch.addmm(now, gram, now, beta=-2, alpha=2 / half)
        before, now = now, step.sub_(before)
    return now
