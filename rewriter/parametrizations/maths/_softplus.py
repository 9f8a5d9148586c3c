"""The inverse of the softplus function."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_softplus(y: Tensor) -> Tensor:
    """Return x with ``log(1 + exp(x)) = y``, for positive y, without overflow or cancellation."""
    return y + torch.log(-torch.expm1(-y))
