"""Linear, Bilinear and PReLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from rewriter.capture._leaves import Opened, Own, opens

_LINEAR = Opened(F.linear, (Own("weight"), Own("bias")))


@opens(nn.Linear)
def linear(module: nn.Linear) -> Opened:
    return _LINEAR


@opens(nn.Bilinear)
def bilinear(module: nn.Bilinear) -> Opened:
    return Opened(F.bilinear, (Own("weight"), Own("bias")))


@opens(nn.PReLU)
def prelu(module: nn.PReLU) -> Opened:
    return Opened(F.prelu, (Own("weight"),))
