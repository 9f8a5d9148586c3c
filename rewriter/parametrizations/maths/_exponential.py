"""The exponential map from skew matrices to orthogonal ones.

Up to an error of one rounding, the exponential of a matrix of norm below a threshold is a polynomial of low degree,
made of few matrix products. Larger matrices are scaled down and the result is squared. Everything is differentiated
as it stands: three products backward or forward for one of the forward, where :func:`torch.linalg.matrix_exp` works
on a matrix of twice the size.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.parametrizations.maths._eager import readable
from rewriter.parametrizations.maths._polynomials import (
    EIGHT,
    EIGHT_LAST,
    EIGHTEEN,
    LIMITS,
    TWELVE,
    Rows,
    add_identity,
    fma,
)


def exponential(X: Tensor) -> Tensor:
    """Return the first k columns of ``exp(A)``, for the skew A whose first k columns' lower triangle is that of X.

    Arguments:
        X: of shape ``(..., n, k)`` with n >= k.
    """
    n, k = X.size(-2), X.size(-1)
    if n <= 2 * k:
        L = X.tril()
        if n != k:
            L = functional.pad(L, [0, n - k])
        return matrix_exponential(L - L.mH, skew=True)[..., :k]
    # A moves E = (I; 0) within the span of E and of B, the part of X below its square. So with Y = (a; B c),
    # Y' = A Y becomes a' = S a - B^H B c and c' = a: an exponential of size 2k, whatever n is.
    S, B = X[..., :k, :].tril(), X[..., k:, :]
    G = B.mH @ B
    # Both couplings of a and c get the same size; any scale gives the same value, so it is no part of the graph.
    scale = torch.linalg.matrix_norm(G.detach(), keepdim=True).sqrt().clamp_min(1.0)
    coupling = torch.eye(k, dtype=X.dtype, device=X.device) * scale
    top = torch.cat([S - S.mH, -G / scale], dim=-1)
    bottom = torch.cat([coupling, torch.zeros_like(coupling)], dim=-1)
    flow = matrix_exponential(torch.cat([top, bottom], dim=-2))[..., :k]
    return torch.cat([flow[..., :k, :], B @ (flow[..., k:, :] / scale)], dim=-2)


def matrix_exponential(A: Tensor, skew: bool = False) -> Tensor:
    """Return ``exp(A)`` of square matrices ``(..., n, n)``; of skew-symmetric or skew-Hermitian ones with `skew`."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return torch.matrix_exp(A)
    else:
        return _series(A, skew) if readable(A) else torch.matrix_exp(A)


def _series(A: Tensor, skew: bool) -> Tensor:
    first, second, third, fourth = LIMITS[A.dtype in (torch.float64, torch.complex128)]
    # The eigenvalues of a real skew matrix come in pairs, which halves what a sum over them says of the largest.
    pairs = 2.0 if skew and not A.is_complex() else 1.0
    A2 = A @ A
    # The norm of a normal matrix is at most |A^p|^(1/p), and the larger p, the closer.
    size = _norm(A2, pairs) ** (1 / 2) if skew else _norm(A)
    if size <= first:
        return fma(add_identity(torch.add(A, A2, alpha=1 / 2), 1.0), A2, torch.add(A / 6, A2, alpha=1 / 24))
    if size <= second:
        B1, B2, B3 = _combinations(EIGHT, 1.0, A, A2)
        A4 = A2 @ B1
        return fma(B3, torch.add(A4, A2, alpha=2 / 3), torch.add(B2, A4, alpha=EIGHT_LAST))
    A3 = A2 @ A
    if not skew:
        # Of other matrices, two neighbouring powers bound what the series adds (Al-Mohy and Higham, 2009).
        size = min(size, max(_norm(A2) ** (1 / 2), _norm(A3) ** (1 / 3)))
    elif size > third:
        size = min(size, _norm(A3, pairs) ** (1 / 3))
    if size <= third:
        B1, B2, B3, B4 = _combinations(TWELVE, 1.0, A, A2, A3)
        A6 = fma(B3, B4, B4)
        return fma(B1, B2 + A6, A6)
    A6 = A3 @ A3
    if skew and size > fourth:
        size = min(size, _norm(A6, pairs) ** (1 / 6))
    squarings = _halvings(size, fourth)
    B1, B2, B3, B4, B5 = _combinations(EIGHTEEN, 0.5**squarings, A, A2, A3, A6)
    A9 = fma(B4, B1, B5)
    Q = fma(B2, B3 + A9, A9)
    for _ in range(squarings):
        Q = Q @ Q
    return Q


def _halvings(size: float, limit: float) -> int:
    """Return how often to halve a matrix of norm `size` to come below `limit`; none where it is no number."""
    return math.ceil(math.log2(size / limit)) if limit < size < math.inf else 0


def _combinations(rows: Rows, scale: float, *powers: Tensor) -> tuple[Tensor, ...]:
    """Return one polynomial per row: its factors of I, sA, s^2 A^2, s^3 A^3, s^6 A^6, as far as given, for the scale s.

    One product with a small matrix of factors, where a sum for each would be several times as many operations.
    """
    A = powers[0]
    factors = _factors(rows, scale, len(powers) + 1, A.dtype, A.device)
    sums = factors[:, 1:] @ torch.stack(powers).view(len(powers), -1)
    shape = (len(rows), *A.shape)
    add_identity(sums.view(shape), factors[:, :1].view(-1, *[1] * (A.ndim - 1)))
    return sums.view(shape).unbind()  # not the view from before, whose node autograd would replace by a slower one


@functools.lru_cache(maxsize=128)
def _factors(rows: Rows, scale: float, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the first `count` factors of each row, each for its power of sA: made once, and copied to a GPU once."""
    scales = [scale**p for p in (0, 1, 2, 3, 6)]
    with torch.inference_mode(False):
        return torch.tensor(
            [[f * s for f, s in zip(row, scales, strict=False)][:count] for row in rows], dtype=dtype, device=device
        )


def _norm(A: Tensor, pairs: float = 1.0) -> float:
    """Return the largest Frobenius norm of a batch; of one eigenvalue out of each `pairs` equal ones."""
    norms = torch.linalg.vector_norm(A.detach(), dim=(-2, -1))
    return float(norms if norms.ndim == 0 else norms.max()) / math.sqrt(pairs)
