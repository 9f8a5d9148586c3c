"""Linear layers in a model that keeps its class: the weight's transpose is kept for the forward, and never too long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewriter import rewrite

SPEC = {"reparam": 1, "rules": [{"name": "r", "select": "step.weight", "chain": ["symmetric"]}]}


class Net(nn.Module):
    """Calls its layer ten times, in the middle with something in between."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            x = torch.tanh(self.step(x))
        x = self.between(self, x)
        for _ in range(5):
            x = torch.tanh(self.step(x))
        return x


def _no_grad(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        shift = net.step(x)
    return x + shift


def _keyword(net: Net, x: Tensor) -> Tensor:
    return net.step(input=x)  # type: ignore[no-any-return]


def _checkpointed(net: Net, x: Tensor) -> Tensor:
    return checkpoint(lambda y: torch.tanh(net.step(net.step(y))), x, use_reentrant=False)  # type: ignore[no-any-return]


def _reentrant(net: Net, x: Tensor) -> Tensor:
    return checkpoint(lambda y: torch.tanh(net.step(net.step(y))), x, use_reentrant=True)  # type: ignore[no-any-return]


def _mapped(net: Net, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: net.step(row.unsqueeze(0)).squeeze(0))(x)  # type: ignore[no-any-return]


def _differentiated(net: Net, x: Tensor) -> Tensor:
    gradient: Tensor = torch.func.grad(lambda y: net.step(net.step(net.step(y))).square().sum())(x)
    return gradient


def _batched(net: Net, x: Tensor) -> Tensor:
    return net.step(x.unsqueeze(1)).squeeze(1)  # type: ignore[no-any-return]


BETWEEN = [_no_grad, _keyword, _checkpointed, _reentrant, _mapped, _differentiated, _batched]


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    value = model(x)
    value.square().sum().backward()
    found = [value.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]
    assert all(gradient is not None for gradient in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("between", BETWEEN, ids=lambda function: function.__name__.strip("_"))
def test_equal_to_evaluating_every_time(between: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Net(between).double(), torch.randn(3, 4, dtype=torch.float64)
    never = {"reparam": 1, "rules": [{**SPEC["rules"][0], "cache": "never"}]}  # type: ignore[index,dict-item]
    once, each = (rewrite(model, spec, capture="module") for spec in (SPEC, never))
    for ours, theirs in zip(_gradients(once, x), _gradients(each, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_first_used_without_gradients() -> None:
    class First(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                for _ in range(4):
                    x = self.step(x)
            return super().forward(x)

    torch.manual_seed(0)
    new = rewrite(First(lambda net, x: x), SPEC, capture="module")
    new(torch.randn(3, 4)).sum().backward()
    assert new.step.parametrizations.weight.original.grad.abs().sum() > 0


def test_an_assignment_in_the_forward_counts_from_then_on() -> None:
    def assign(net: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            net.step.weight = torch.eye(4)  # type: ignore[assignment]
        return x

    torch.manual_seed(0)
    new, x = rewrite(Net(assign), SPEC, capture="module"), torch.randn(3, 4)
    with torch.no_grad():
        expected = x
        weight = new.step.weight.clone()
        for index in range(10):
            expected = torch.tanh(expected @ (weight if index < 5 else torch.eye(4)).T + new.step.bias)
        torch.testing.assert_close(new(x), expected)


def test_hooks_on_the_layer_see_every_call() -> None:
    new = rewrite(Net(lambda net, x: x), SPEC, capture="module")
    calls: list[Tensor] = []
    new.step.register_forward_hook(lambda module, args, result: calls.append(result))
    new(torch.randn(3, 4))
    assert len(calls) == 10


def test_a_computed_bias_is_used() -> None:
    rules = [{"name": "r", "select": "step.weight", "chain": ["symmetric"]}]
    rules += [{"name": "b", "select": "step.bias", "chain": [{"scale": {"factor": 3.0}}]}]  # type: ignore[dict-item]
    torch.manual_seed(0)
    model, x = Net(lambda net, x: x), torch.randn(3, 4)
    with torch.no_grad():
        model.step.weight.copy_(model.step.weight + model.step.weight.T)
    new = rewrite(model, {"reparam": 1, "rules": rules}, capture="module")
    torch.testing.assert_close(new(x), model(x))
    with torch.no_grad():
        new.step.parametrizations.bias.original.zero_()
        model.step.bias.zero_()
    torch.testing.assert_close(new(x), model(x))
