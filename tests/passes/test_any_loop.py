"""rows: whatever a loop does between its products, it computes what it computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter import bake, rewrite
from tests.passes.test_rows import BOTH, STEP, joined

STEPS = 8


class Loop(nn.Module):
    """Runs the named operations at every step.

    Arguments:
        operations: names of what is done, in order.
        first: whether time is the first dimension of the input, or the second.
    """

    def __init__(self, operations: list[str], first: bool) -> None:
        super().__init__()
        self.operations, self.first = operations, first
        self.input, self.other, self.step = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.norm, self.gate = nn.LayerNorm(4), nn.ReLU(inplace=True)

    def row(self, x: Tensor, index: int) -> Tensor:
        return x[index] if self.first else x[:, index, :]

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        state = torch.zeros_like(self.row(x, 0))
        product, kept = state, []
        for index in range(STEPS):
            for operation in self.operations:
                row = self.row(x, index)
                if operation == "input":
                    product = self.input(row)
                elif operation == "both":
                    product = self.input(row) * torch.sigmoid(self.other(row))
                elif operation == "next":
                    product = self.other(self.row(x, (index + 1) % STEPS))
                elif operation == "normed":
                    product = self.norm(self.input(row))
                elif operation == "parts":
                    one, two = self.input(row).chunk(2, -1)
                    product = torch.cat([two, one], -1)
                elif operation == "add":
                    state = torch.tanh(product + self.step(state))
                elif operation == "add in place":
                    product += self.step(state)
                    state = torch.tanh(product)
                elif operation == "gate":
                    state = self.gate(product) + state
                elif operation == "clamp":
                    product.clamp_(-0.5, 0.5)
                elif operation == "write to the input":
                    x = x.clone()
                    self.row(x, (index + 1) % STEPS).mul_(0.5)
                elif operation == "write to a row":
                    row.add_(0.25 * state.detach())
                else:
                    kept.append(F.softplus(product))
        return state + sum(kept, torch.zeros(())) + self.row(x, 0)


OPERATIONS = [
    "input", "both", "next", "normed", "parts", "add", "add in place", "gate", "clamp", "write to the input",
    "write to a row", "keep",
]  # fmt: skip


def _results(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    value = model(x)
    named = dict(model.named_parameters())
    wanted = [x, *(named[name] for name in sorted(named))]
    found = torch.autograd.grad(value.square().sum(), wanted, allow_unused=True)
    with torch.no_grad():
        again = model(x)
    # A matrix of no use has no gradient, or one of zeros.
    gradients = [torch.zeros_like(one) if g is None else g for one, g in zip(wanted, found, strict=True)]
    return [value.detach(), again, *gradients]


@pytest.mark.slow
@settings(max_examples=60)
@given(st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_any_loop_gives_what_it_gave(operations: list[str], first: bool, both: bool) -> None:
    torch.manual_seed(0)
    model, x = Loop([*operations, "add"], first).double(), torch.randn(STEPS, STEPS, 4, dtype=torch.float64)
    new, less = (rewrite(model, BOTH if both else STEP, without=out) for out in ((), "rows"))
    try:
        _results(model, x)
    except RuntimeError:  # torch cannot differentiate the loop as it is written
        reject()
    expected = _results(less, x)
    torch.testing.assert_close(_results(new, x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(_results(bake(new), x)[0], expected[0], rtol=1e-10, atol=1e-10)


def test_such_a_loop_is_joined_where_it_can_be() -> None:
    for operations, count in (["input"], 1), (["both"], 2), (["normed", "next"], 2), (["parts", "keep"], 1):
        assert joined(rewrite(Loop([*operations, "add"], True), STEP)) == count, operations
    for operation in "add in place", "gate", "clamp", "write to the input", "write to a row":
        assert joined(rewrite(Loop(["input", operation, "add"], True), STEP)) == 0, operation
