"""Products of Householder reflections, by matrix products only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def householder(X: Tensor, positive: float = 0.0, width: int = 128) -> Tensor:
    """Return the first k columns of the product of k reflections, with the signs on the diagonal of X.

    Reflection j has the vector of column j of X below the diagonal, under a one. In the compact WY form the product
    of a block is ``I - V T^-1 V^T`` with the upper triangle T of ``V^T V``, its diagonal halved (Joffrin, Puglisi
    and others; see Schreiber and Van Loan, "A storage-efficient WY representation", 1989). The diagonal of X only
    has a sign, so that a zero or a decayed weight still gives an orthogonal matrix.

    Arguments:
        X: real, of shape ``(..., n, k)`` with n >= k.
        positive: the least entry of the diagonal that counts as the sign plus.
        width: the most reflections in one block. Wider blocks spend more on triangles, narrower ones on overhead.
    """
    k = X.size(-1)
    blocks = (k + width - 1) // width
    width = (k + blocks - 1) // blocks if blocks > 0 else 1
    Q = X
    for i in range(blocks):
        start = (blocks - 1 - i) * width
        stop = min(start + width, k)
        Q = _reflect(X[..., start:, start:stop], Q, i == 0)
    sign = torch.where(X.detach().diagonal(dim1=-2, dim2=-1) < positive, -1.0, 1.0).to(X.dtype)
    signed: Tensor = Q * sign.unsqueeze(-2)
    return signed


def _reflect(X: Tensor, trailing: Tensor, last: bool) -> Tensor:
    """Return the reflections of one block times ``(I, 0; 0, trailing)``; the last block has nothing behind it."""
    n, b = X.size(-2), X.size(-1)
    eye = torch.eye(n, b, dtype=X.dtype, device=X.device)
    V = X.tril(-1) + eye
    # solve_triangular reads the upper triangle only, so entries below need no clearing. This is -T, so that the result
    # is added, by a fused operation if torch has one.
    T = (V.mT @ V) * (0.5 * eye[:b] - 1.0)
    top = V[..., :b, :].mT
    if last:
        S = torch.linalg.solve_triangular(T, top, upper=True)
        if V.ndim == 3:
            return torch.baddbmm(eye, V, S)
        return torch.addmm(eye, V, S) if V.ndim == 2 else eye + V @ S
    right = torch.cat([top, V[..., b:, :].mT @ trailing], dim=-1)
    moved = V @ torch.linalg.solve_triangular(T, right, upper=True)
    return torch.cat([eye + moved[..., :b], functional.pad(trailing, [0, 0, b, 0]) + moved[..., b:]], dim=-1)


@torch.no_grad()
def frame(base: Tensor) -> Tensor:
    """Return the square orthogonal matrix that starts with the columns ``householder(base)``, by one product.

    Arguments:
        base: real, of shape ``(..., n, k)``.
    """
    V, T, sign = _factors(base)
    right = torch.linalg.solve_triangular(T, V.mT, upper=True)
    k = base.size(-1)
    right[..., :k] *= sign.unsqueeze(-2)
    F: Tensor = (V @ right).neg_()
    diagonal = F.diagonal(dim1=-2, dim2=-1)
    diagonal[..., :k] += sign
    diagonal[..., k:] += 1
    return F


def reflected(base: Tensor, M: Tensor) -> Tensor:
    """Return ``frame(base) @ M`` without forming the square matrix.

    Arguments:
        base: real, of shape ``(..., n, k)``.
        M: of shape ``(..., n, p)``.
    """
    k = base.size(-1)
    V, T, sign = _factors(base)
    signed = torch.cat([M[..., :k, :] * sign.unsqueeze(-1), M[..., k:, :]], dim=-2)
    moved: Tensor = V @ torch.linalg.solve_triangular(T, V.mT @ signed, upper=True)
    return signed - moved


def _factors(base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return V, T and the signs of the reflections in `base`."""
    k = base.size(-1)
    eye = torch.eye(base.size(-2), k, dtype=base.dtype, device=base.device)
    V = base.tril(-1) + eye
    T = (V.mT @ V) * (1 - eye[:k] / 2)
    return V, T, torch.where(base.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(base.dtype)
