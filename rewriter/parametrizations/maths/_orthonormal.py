"""Orthonormal matrices: the nearest ones, a test for them, completions and random ones."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.parametrizations.maths._householder import frame


def is_orthonormal(W: Tensor) -> bool:
    """Return whether the columns of W are orthonormal, up to rounding."""
    eps = 10.0 * W.size(-2) * torch.finfo(W.dtype).eps
    eye = torch.eye(W.size(-1), dtype=W.dtype, device=W.device)
    return torch.allclose(W.mH @ W, eye, atol=eps)


def orthonormal(W: Tensor) -> Tensor:
    """Return W where its columns are orthonormal, else its Q factor (R with a real, non-negative diagonal)."""
    if is_orthonormal(W):
        return W.clone()
    packed, tau = torch.geqrf(W)
    Q: Tensor = torch.linalg.householder_product(packed, tau)
    return Q * _phase(packed.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)


def completed(W: Tensor) -> Tensor:
    """Return a square orthogonal matrix that starts with the columns of :func:`orthonormal` W.

    The completion comes from the reflections of W, so that it costs O(n^2 k) and draws no random numbers.
    """
    n, k = W.size(-2), W.size(-1)
    Q = orthonormal(W)
    if n == k:
        return Q
    if W.is_complex():
        eye = torch.eye(n, dtype=W.dtype, device=W.device).expand(*W.shape[:-2], n, n)
        full: Tensor = torch.ormqr(*torch.geqrf(Q), eye)
    else:
        full = frame(reflectors(Q))
    full[..., :k] = Q
    return full


def reflectors(W: Tensor) -> Tensor:
    """Return the tensor that :func:`householder` maps to the Q factor of the real matrix W."""
    packed, tau = torch.geqrf(W)
    diagonal = packed.diagonal(dim1=-2, dim2=-1)
    sign = _phase(diagonal)
    # LAPACK omits the reflection of a column that is done (tau = 0); the map always reflects.
    diagonal.copy_(torch.where(tau == 0, -sign, sign))
    return packed


def rotation(W: Tensor) -> Tensor:
    """Return W if it is a rotation, else its Q factor, the last column negated if that makes it one.

    Raises:
        ValueError: W is orthogonal and its determinant is -1.
    """
    Q = orthonormal(W)
    if W.is_complex():
        return Q
    turned = torch.linalg.det(Q) < 0
    if turned.any() and is_orthonormal(W):
        raise ValueError("its determinant is -1")
    Q[..., -1] *= torch.where(turned, -1.0, 1.0).to(Q.dtype).unsqueeze(-1)
    return Q


def haar(Z: Tensor) -> Tensor:
    """Return orthonormal columns (rows where Z is wide); uniformly distributed if Z is standard normal."""
    wide = Z.size(-2) < Z.size(-1)
    Q = orthonormal(Z.mT if wide else Z)
    return Q.mT if wide else Q


def _phase(x: Tensor) -> Tensor:
    """Return ``x / |x|``, and one where x is zero."""
    return torch.where(x == 0, torch.ones_like(x), x.sgn())
