"""The Cayley map from skew matrices to orthogonal ones."""

from __future__ import annotations

import torch
from torch import Tensor


def cayley(X: Tensor) -> Tensor:
    """Return the first k columns of ``(I + A/2)(I - A/2)^-1``, for the skew A with the lower triangle of X.

    With ``A = (S, -B^H; B, 0)`` these columns are ``(2 Y - I; B Y)`` for the inverse Y of ``I - S/2 + B^H B/4``, so
    that one matrix of size k is inverted once, forward and backward.

    Arguments:
        X: of shape ``(..., n, k)`` with n >= k.
    """
    n, k = X.size(-2), X.size(-1)
    eye = torch.eye(k, dtype=X.dtype, device=X.device)
    S = X.tril() if n == k else X[..., :k, :].tril()
    M = torch.sub(eye, S - S.mH, alpha=0.5)
    if n == k:
        # The symmetric part of M is the identity: M is never singular.
        Q: Tensor = torch.linalg.inv_ex(M)[0] * 2 - eye
        return Q
    B = X[..., k:, :]
    Y = torch.linalg.inv_ex(torch.add(M, B.mH @ B, alpha=0.25))[0]
    return torch.cat([Y * 2 - eye, B @ Y], dim=-2)


def cayley_inverse(Q: Tensor) -> Tensor:
    """Return the X that :func:`cayley` maps to Q; entries are not finite where ``I + Q`` (its square) is singular."""
    n, k = Q.size(-2), Q.size(-1)
    eye = torch.eye(k, dtype=Q.dtype, device=Q.device)
    M = torch.linalg.inv_ex((Q[..., :k, :] + eye) / 2)[0]
    # M = I - S/2 + B^H B/4: the skew part of M is all that S needs.
    S = (M.mH - M).tril()
    if Q.is_complex():
        S = S - S.diagonal(dim1=-2, dim2=-1).diag_embed() / 2
    return S if n == k else torch.cat([S, Q[..., k:, :] @ M], dim=-2)
