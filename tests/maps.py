"""Maps for chains of tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Smooth(nn.Module):
    """A smooth map that depends on a parameter, a buffer and a setting of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.register_buffer("shift", torch.tensor(0.25, dtype=torch.float64))
        self.power = 2.0

    def forward(self, X: Tensor) -> Tensor:
        return torch.sin(X) * self.scale.to(X.dtype) + self.shift.to(X.dtype) * self.power
