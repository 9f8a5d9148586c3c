"""However often a forward uses a tensor, its chain runs once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from rewriter import bake, plan, rewrite


def test_one_evaluation_for_each_forward(
    case: Any, capture: str, rule: Callable[..., dict[str, Any]], counted: nn.Module, count: Any
) -> None:
    model, x, name = case
    new = rewrite(model, rule(name, counted), capture=capture)
    count.total = 0
    new(x)
    assert count.total == 1
    new(x).sum().backward()
    assert count.total == 2


def test_never_evaluates_once_for_each_use(
    capture: str, make: dict[str, Any], rule: Callable[..., dict[str, Any]], counted: nn.Module, count: Any
) -> None:
    model = make["Unrolled"](make["ElmanCell"](4, 5), 5)
    new = rewrite(model, rule("cell.weight_hh", counted, cache="never"), capture=capture)
    count.total = 0
    new(torch.randn(3, 7, 4))
    assert count.total == 7


def test_state_advances_once_for_each_training_forward_and_never_otherwise(
    capture: str, make: dict[str, Any], rule: Callable[..., dict[str, Any]]
) -> None:
    model = make["Unrolled"](nn.RNNCell(4, 5), 5)
    spec = rule("cell.weight_hh", "spectral_norm")
    x = torch.randn(3, 7, 4)
    before = torch.random.get_rng_state()
    plan(model, spec)
    assert torch.equal(torch.random.get_rng_state(), before)
    new = rewrite(model, spec, capture=capture)
    step = getattr(new.cell.parametrizations.weight_hh, "0")
    u = step._u.clone()
    bake(new), plan(new, spec), copy.deepcopy(new), new.cell.weight_hh
    assert torch.equal(step._u, u)
    reference = copy.deepcopy(step)
    reference(new.cell.parametrizations.weight_hh.original)
    new(x)
    assert torch.equal(step._u, reference._u)
    assert not torch.equal(step._u, u)
    new.eval()(x)
    assert torch.equal(step._u, reference._u)


def test_random_steps_draw_where_the_model_first_read_the_tensor(rule: Callable[..., dict[str, Any]]) -> None:
    class Noise(nn.Module):
        def forward(self, X: torch.Tensor) -> torch.Tensor:
            return X + torch.rand_like(X)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.drop(self.a(x)))

    model, x = Net(), torch.randn(3, 4)
    new = rewrite(model, rule("*.weight", Noise(), init="raw"))
    reference = copy.deepcopy(model)
    for layer in (reference.a, reference.b):
        parametrize.register_parametrization(layer, "weight", Noise())
    torch.manual_seed(5)
    expected = reference(x)
    torch.manual_seed(5)
    torch.testing.assert_close(new(x), expected)
