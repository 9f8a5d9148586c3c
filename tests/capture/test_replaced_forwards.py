"""Modules whose forward, or another method, was replaced on the object itself: what they do is what is rewritten."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewriter import bake, plan, rewrite
from rewriter.errors import CaptureError


class Flipped(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X / 2 + X.flip(0) / 4


SPEC = {
    "reparam": 1,
    "rules": [{"name": "r", "select": "inner.**weight", "chain": [Flipped()], "init": "raw"}],
}
X = torch.linspace(-1, 1, 24).reshape(2, 3, 4)


def tripled(self: Any, x: Tensor) -> Tensor:
    return 3 * F.linear(x, self.weight, self.bias)


def depends(self: Any, x: Tensor) -> Tensor:
    return 3 * F.linear(x, self.weight, self.bias) if x.sum() < 1e6 else x


class Model(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


def with_replaced(forward: Callable[..., Tensor]) -> Model:
    model = Model(nn.Linear(4, 4))
    model.inner.forward = types.MethodType(forward, model.inner)
    return model


def assert_equals_torch(model: nn.Module, capture: str, root: str) -> nn.Module:
    found = plan(model, SPEC, capture=capture)
    assert found.root == root, found.why
    plain = model(X)
    new = rewrite(model, SPEC, capture=capture, inplace=True)  # a bound method goes along with no copy
    changed = new(X)
    baked = bake(new, inplace=True)
    torch.testing.assert_close(baked(X), changed)
    assert not torch.allclose(changed, plain)
    return baked


@pytest.mark.parametrize("capture", ["auto", "graph", "module"])
def test_a_leaf_with_a_forward_of_its_own_runs_it(capture: str) -> None:
    model = with_replaced(tripled)
    weight = model.inner.weight.detach().clone()
    expected = model.last(3 * F.linear(X, weight / 2 + weight.flip(0) / 4, model.inner.bias))
    baked = assert_equals_torch(model, capture, "module" if capture == "module" else "graph")
    torch.testing.assert_close(baked(X), expected)


def test_one_that_cannot_be_traced_keeps_the_class() -> None:
    with pytest.raises(CaptureError, match=r"inner.*replaced on the object"):
        rewrite(with_replaced(depends), SPEC, capture="graph")
    assert_equals_torch(with_replaced(depends), "auto", "module")


def test_one_with_hooks_keeps_the_class_and_they_fire() -> None:
    model = with_replaced(tripled)
    seen: list[int] = []
    model.inner.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(CaptureError, match=r"inner.*replaced on the object"):
        rewrite(copy.copy(model), SPEC, capture="graph")
    assert_equals_torch(model, "auto", "module")
    assert len(seen) == 3


def test_in_a_graph_that_is_given_it_keeps_the_class() -> None:
    model = fx.symbolic_trace(Model(nn.Linear(4, 4)))
    model.inner.forward = types.MethodType(tripled, model.inner)
    with pytest.raises(CaptureError, match=r"inner.*replaced on the object"):
        plan(model, SPEC, capture="graph")
    assert_equals_torch(model, "auto", "module")


def test_one_that_owns_nothing_selected_is_called_as_it_is() -> None:
    model = Model(nn.Linear(4, 4))
    model.last.forward = types.MethodType(depends, model.last)
    assert_equals_torch(model, "auto", "graph")
