"""Models in both captures, and the forms in which other tools save a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import rewrite


class Net(nn.Module):
    """Two square layers and a tensor of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale


class Tied(nn.Module):
    """A tensor with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


@pytest.fixture
def net() -> type[Net]:
    return Net


@pytest.fixture
def rewritten(capture: str, spec: Callable[..., dict[str, Any]]) -> Callable[..., nn.Module]:
    """Rewrites a float64 `Net`."""

    def make(*chain: Any, select: Any = "first.weight", **options: Any) -> nn.Module:
        return rewrite(Net().double(), spec(select, *chain, **options), capture=capture)

    return make


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of the model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Compare a model's tensors with copies of them, bit by bit."""
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
