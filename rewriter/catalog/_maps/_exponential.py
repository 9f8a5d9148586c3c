"""The exponential of a skew matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def exponential(X: Tensor) -> Tensor:
    """Return the first k columns of ``exp(A)`` for the skew A that X stands for."""
    n, k = X.size(-2), X.size(-1)
    L = X.tril()
    if n != k:
        L = torch.nn.functional.pad(L, [0, n - k])
    Q: Tensor = torch.linalg.matrix_exp(L - L.mH)[..., :k]
    return Q
