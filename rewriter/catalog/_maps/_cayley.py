"""The Cayley map of a skew matrix, without forming more of it than the columns asked for."""

from __future__ import annotations

import torch
from torch import Tensor


def cayley(X: Tensor) -> Tensor:
    """Return the first k columns of ``(I + A/2)(I - A/2)^-1`` for the skew A that X stands for."""
    n, k = X.size(-2), X.size(-1)
    S = X[..., :k, :].tril()
    M = torch.eye(k, dtype=X.dtype, device=X.device) - (S - S.mH) / 2
    if n == k:
        Q: Tensor = 2 * torch.linalg.inv(M) - torch.eye(k, dtype=X.dtype, device=X.device)
        return Q
    B = X[..., k:, :]
    Y = torch.linalg.inv(M + B.mH @ B / 4)
    return torch.cat([2 * Y - torch.eye(k, dtype=X.dtype, device=X.device), B @ Y], dim=-2)
