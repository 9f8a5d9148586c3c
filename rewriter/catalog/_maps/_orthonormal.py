"""Making matrices orthonormal, telling whether they are, and drawing them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewriter.catalog._maps._precision import wide_dtype


def is_orthonormal(W: Tensor) -> bool:
    """Return whether the columns of W are orthonormal, up to rounding."""
    eps = 10.0 * W.size(-2) * torch.finfo(W.dtype).eps
    eye = torch.eye(W.size(-1), dtype=W.dtype, device=W.device)
    return torch.allclose(W.mH @ W, eye, atol=eps)


def orthonormal(W: Tensor) -> Tensor:
    """Return the Q factor of ``W = QR`` with a real, non-negative diagonal of R."""
    packed, tau = torch.geqrf(W)
    Q: Tensor = torch.linalg.householder_product(packed, tau)
    return Q * phase(packed.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)


def reflectors(W: Tensor) -> Tensor:
    """Return the lower triangle and signs that :func:`householder` maps to the Q factor of W."""
    packed, tau = torch.geqrf(W)
    diagonal = packed.diagonal(dim1=-2, dim2=-1)
    sign = phase(diagonal)
    # LAPACK leaves out a reflection (tau = 0) where the column is already done; the map always reflects.
    diagonal.copy_(torch.where(tau == 0, -sign, sign))
    return packed


def phase(x: Tensor) -> Tensor:
    """Return ``x / |x|``, and one where x is zero."""
    return torch.where(x == 0, torch.ones_like(x), x.sgn())


def haar(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a random tensor of orthonormal columns (rows where it is wide), drawn uniformly."""
    Z = torch.randn(*shape, dtype=wide_dtype(dtype), device=device)
    wide = Z.size(-2) < Z.size(-1)
    Q = orthonormal(Z.mT if wide else Z)
    return (Q.mT if wide else Q).to(dtype)
