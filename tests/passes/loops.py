"""Recurrent models whose linear calls on rows are joined into one call, and models where they are not."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

STEPS = 9


class Recurrent(nn.Module):
    """An RNN over the first dimension of its input."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.input = nn.Linear(4, 4, bias=bias)
        self.step = nn.Linear(4, 4, bias=False)

    def row(self, x: Tensor, index: int) -> Tensor:
        return x[index]

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(self.row(x, 0))
        for index in range(STEPS):
            state = torch.tanh(self.input(self.row(x, index)) + self.step(state))
        return state


class BatchFirst(Recurrent):
    def row(self, x: Tensor, index: int) -> Tensor:
        return x[:, index]


class AllNamed(Recurrent):
    def row(self, x: Tensor, index: int) -> Tensor:
        return x[:, index, :]


class Flattened(BatchFirst):
    """Views its products as vectors, which only what lies in one piece can be viewed as."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(self.row(x, 0))
        for index in range(STEPS):
            state = torch.tanh(self.input(self.row(x, index)).view(-1).view(state.shape) + self.step(state))
        return state


class Later(Recurrent):
    def row(self, x: Tensor, index: int) -> Tensor:
        return x[index + 1]


class Backwards(Recurrent):
    def row(self, x: Tensor, index: int) -> Tensor:
        return x[STEPS - 1 - index]


class RowsAhead(Recurrent):
    """Takes all rows before it uses the first, and two of them again at the end."""

    def forward(self, x: Tensor) -> Tensor:
        rows = [x[index] for index in range(STEPS)]
        state = torch.zeros_like(rows[0])
        for row in rows:
            state = torch.tanh(self.step(state) + self.input(row))
        return state + torch.sigmoid(self.input(x[3])) * rows[1]


class Gates(Recurrent):
    """Looks at its products in parts."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[0])
        for index in range(STEPS):
            one, other = self.input(x[index]).chunk(2, -1)
            state = torch.tanh(torch.cat([one * torch.sigmoid(other), one], -1) + self.step(state))
        return state


JOINED: list[Callable[[], nn.Module]] = [
    Recurrent, lambda: Recurrent(bias=False), BatchFirst, AllNamed, Flattened, Later, Backwards, RowsAhead, Gates,
]  # fmt: skip
"""Models of which the calls of `input` are one."""
NAMES = ["rows", "without bias", "batch first", "all named", "flattened", "later", "backwards", "rows ahead", "gates"]


class Few(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return sum((self.input(x[index]) + self.step(x[0]) for index in range(7)), torch.zeros(()))


class FromTheEnd(Recurrent):
    def row(self, x: Tensor, index: int) -> Tensor:
        return x[index - STEPS]


class Scattered(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return sum((self.input(x[index]) + self.step(x[0]) for index in (*range(7), 8, 9)), torch.zeros(()))


class Overwritten(Recurrent):
    """Writes to its input as it goes."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        state = torch.zeros_like(x[0])
        for index in range(STEPS):
            state = torch.tanh(self.input(x[index]) + self.step(state))
            x[index + 1] = x[index + 1] + state
        return state


class Added(Recurrent):
    """Adds to its products in place."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[0])
        for index in range(STEPS):
            product = self.input(x[index])
            product += self.step(state)
            state = torch.tanh(product)
        return state


class AddedToParts(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[0])
        for index in range(STEPS):
            product = self.input(x[index])
            product.narrow(-1, 0, 2).add_(1.0)
            state = torch.tanh(product + self.step(state))
        return state


class Clipped(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[0])
        for index in range(STEPS):
            state = F.relu(self.input(x[index]), inplace=True) + self.step(state)
        return state


class Returned(Recurrent):
    """Returns its products, so that the caller may write to them."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [*[self.input(x[index]) for index in range(STEPS)], self.step(x[0])]


class Unknown(Recurrent):
    """Calls an unknown function between its products."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[0])
        for index in range(STEPS):
            state = torch.tanh(self.input(x[index]) + self.step(state))
            state = fx_opaque(state, x)
        return state


@fx.wrap
def fx_opaque(state: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        x *= 0.9
    return state


OTHERS = [Few, FromTheEnd, Scattered, Overwritten, Added, AddedToParts, Clipped, Returned, Unknown]
"""Models of which each call stays a call."""
