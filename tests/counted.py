"""A network whose chains count their evaluations and their backwards."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter import rewrite


class Runs:
    forward = 0
    backward = 0


class Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, X: Tensor) -> Tensor:
        Runs.forward += 1
        return X.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Runs.backward += 1
        return gradient


class Chain(nn.Module):
    """Counts its evaluations and its backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, X: Tensor) -> Tensor:
        return torch.tanh(Watched.apply(X)) * self.gain


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def trained(capture: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    rule = {"name": "r", "select": "*.weight", "chain": [Chain()], "init": "raw", **options}
    return rewrite(Net().double(), {"reparam": 1, "rules": [rule]}, capture=capture)


X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)


def siamese(net: nn.Module) -> None:
    one, two, three = net(X), net(X + 0.1), net(X.flip(0))
    F.triplet_margin_loss(one, two, three).backward()
