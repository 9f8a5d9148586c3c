"""Precision: values are computed in at least float32 and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(X: Tensor) -> Tensor:
    """Return X in float32 where it is float16 or bfloat16, else X itself."""
    if X.dtype == torch.float16 or X.dtype == torch.bfloat16:
        return X.float()
    return X


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that :func:`widen` gives."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
