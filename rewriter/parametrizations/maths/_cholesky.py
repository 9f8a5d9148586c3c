"""Lower triangles with a positive diagonal, and the positive definite matrices they stand for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def inverse_softplus(y: Tensor) -> Tensor:
    """Return x with ``log(1 + exp(x)) = y``, for positive y, without overflow or cancellation."""
    return y + torch.log(-torch.expm1(-y))


def gram(F: Tensor) -> Tensor:
    """Return ``F F^H``, exactly Hermitian: a product of rounded sums alone is not."""
    W = F @ F.mH
    return (W + W.mH) / 2


def positive_triangle(X: Tensor) -> Tensor:
    """Return the lower triangle of X with the softplus of its (real) diagonal; X is not wide."""
    diagonal = X.diagonal(dim1=-2, dim2=-1)
    if X.is_complex():
        diagonal = diagonal.real
    positive = functional.softplus(diagonal).to(X.dtype).diag_embed()
    return X.tril(-1) + functional.pad(positive, [0, 0, 0, X.size(-2) - X.size(-1)])


def positive_triangle_inverse(L: Tensor) -> Tensor:
    """Return the X that :func:`positive_triangle` maps to L."""
    diagonal = L.diagonal(dim1=-2, dim2=-1)
    real = diagonal.real if L.is_complex() else diagonal
    stored = inverse_softplus(real).to(L.dtype).diag_embed()
    return L.tril(-1) + functional.pad(stored, [0, 0, 0, L.size(-2) - L.size(-1)])


def cholesky(W: Tensor) -> Tensor:
    """Return the Cholesky factor of W, or of the positive definite matrix nearby where W is not one.

    Nearby: the symmetric part, with its eigenvalues raised to 1e-4 of the largest in size.
    """
    S = (W + W.mH) / 2
    L: Tensor
    L, failed = torch.linalg.cholesky_ex(S)
    if not failed.any():
        return L
    values, Q = torch.linalg.eigh(S)
    least = 1e-4 * values.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny ** 0.5)
    raised: Tensor = torch.linalg.cholesky((Q * torch.maximum(values, least).unsqueeze(-2)) @ Q.mH)
    return torch.where((failed == 0)[..., None, None], L, raised)
