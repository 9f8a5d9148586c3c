"""Products of Householder reflections in the compact WY form."""

from __future__ import annotations

import torch
from torch import Tensor


def householder(X: Tensor) -> Tensor:
    """Return the first k columns of the product of the reflections that X holds, times its signs."""
    n, k = X.size(-2), X.size(-1)
    eye = torch.eye(n, k, dtype=X.dtype, device=X.device)
    V = X.tril(-1) + eye
    G = V.mH @ V
    T = G.triu(1) + (G.diagonal(dim1=-2, dim2=-1) / 2).diag_embed()
    Q = eye - V @ torch.linalg.solve_triangular(T, V[..., :k, :].mH, upper=True)
    sign = torch.where(X.detach().diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(X.dtype)
    signed: Tensor = Q * sign.unsqueeze(-2)
    return signed
