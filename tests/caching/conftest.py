"""Models whose chains are counted, in both captures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import rewrite
from tests.maps import Smooth


class Count:
    """How often a chain was evaluated."""

    total = 0


class Counted(Smooth):
    """The same, counted."""

    def forward(self, X: Tensor) -> Tensor:
        Count.total += 1
        return super().forward(X)


class Recurrent(nn.Module):
    """Seven steps with one recurrent weight, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), 5)
        for t in range(7):
            h = self.cell(x[:, t], h)
        return self.head(h)


class Rewritten:
    """A rewritten recurrent model with what tests look at.

    Arguments:
        model: the rewritten model.
        x: an input.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model = model
        self.x = x
        self.site = model.cell.parametrizations.weight_hh

    def fresh(self) -> Tensor:
        """The output without a cached value: what every other way has to equal."""
        total = Count.total
        with torch.no_grad():
            out = copy.deepcopy(self.model)(self.x)
        Count.total = total
        return out

    def evaluations(self, run: Callable[[], Any] | None = None) -> int:
        """How often the chain was evaluated in a forward, or in `run`."""
        before = Count.total
        (run or (lambda: self.model(self.x)))()
        return Count.total - before


@pytest.fixture
def counted() -> nn.Module:
    return Counted()


@pytest.fixture
def count() -> type[Count]:
    Count.total = 0
    return Count


@pytest.fixture
def recurrent(capture: str, spec: Callable[..., dict[str, Any]]) -> Callable[..., Rewritten]:
    """Makes a rewritten recurrent model in float64."""

    def make(*chain: Any, select: str = "cell.weight_hh", **options: Any) -> Rewritten:
        chosen = spec(select, *(chain or (Counted(),)), **{"init": "raw", **options})
        model = rewrite(Recurrent().double(), chosen, capture=capture)
        return Rewritten(model, torch.randn(3, 7, 4, dtype=torch.float64))

    return make


@pytest.fixture
def plain() -> type[Recurrent]:
    return Recurrent
