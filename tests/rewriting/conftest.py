"""Models that everyday code contains, and ways to look at what rewriting made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class ElmanCell(nn.Module):
    """A recurrent cell written by hand: tensors read directly in the forward."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.randn(hidden, inputs) / inputs**0.5)
        self.weight_hh = nn.Parameter(torch.randn(hidden, hidden) / hidden**0.5)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight_ih.T + h @ self.weight_hh.T)


class Unrolled(nn.Module):
    """A recurrent network unrolled over `steps` time steps; `cell` is torch's or one's own."""

    def __init__(self, cell: nn.Module, hidden: int, steps: int = 7) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(hidden, 3)
        self.hidden = hidden
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), self.hidden)
        for t in range(self.steps):
            h = self.cell(x[:, t], h)
        return self.head(h)


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(self.second(x).mean((2, 3)))


class TiedLm(nn.Module):
    """An embedding whose weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(tokens))))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


class Own(nn.Module):
    """The root owns the tensor, beside a hook, a buffer and modes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.register_buffer("shift", torch.ones(5), persistent=False)
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.weight + self.shift)


Case = tuple[nn.Module, Tensor, str]
CASES: dict[str, Callable[[], Case]] = {
    "rnn cell": lambda: (Unrolled(nn.RNNCell(4, 5), 5), torch.randn(3, 7, 4), "cell.weight_hh"),
    "gru cell": lambda: (Unrolled(nn.GRUCell(4, 5), 5), torch.randn(3, 7, 4), "cell.weight_hh"),
    "own cell": lambda: (Unrolled(ElmanCell(4, 5), 5), torch.randn(3, 7, 4), "cell.weight_hh"),
    "cnn": lambda: (Cnn(), torch.randn(2, 2, 8, 8), "second.weight"),
    "tied embedding and head": lambda: (TiedLm(), torch.randint(11, (2, 9)), "embed.weight"),
    "tensor of the root": lambda: (Own(), torch.randn(3, 5), "weight"),
    "module called twice": lambda: (Twice(), torch.randn(3, 5), "layer.weight"),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """A float64 model, an input, and the name of one of its tensors."""
    model, x, name = CASES[request.param]()
    return model.double(), x.double() if x.is_floating_point() else x, name


@pytest.fixture
def make() -> dict[str, Any]:
    """The models above by name."""
    return {"Unrolled": Unrolled, "ElmanCell": ElmanCell, "Cnn": Cnn, "TiedLm": TiedLm, "Twice": Twice}


class Count:
    """How often a parametrization was evaluated."""

    total = 0


@pytest.fixture
def count() -> type[Count]:
    """How often `Counted` modules were evaluated."""
    Count.total = 0
    return Count


class Counted(nn.Module):
    """Half the tensor, counted."""

    def forward(self, X: Tensor) -> Tensor:
        Count.total += 1
        return X / 2


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def rule() -> Callable[..., dict[str, Any]]:
    """A spec with one rule."""

    def spec(select: Any, *chain: Any, **options: Any) -> dict[str, Any]:
        return {"reparam": 1, "rules": [{"name": "rule", "select": select, "chain": list(chain), **options}]}

    return spec
