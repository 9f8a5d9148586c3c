"""A comparison of a rewritten forward with the plain one."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from rewriter import bake, plan, rewrite


class Halved(nn.Module):
    """Exactly the weight again: halves and doubles lose nothing."""

    def forward(self, X: Tensor) -> Tensor:
        return X / 2

    def right_inverse(self, X: Tensor) -> Tensor:
        return X * 2


SPEC = {"reparam": 1, "rules": [{"name": "kept", "select": {"regex": "(.*[.])?weight"}, "chain": [Halved()]}]}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(4))


def model_of(forward: Callable[..., Any], **attributes: Any) -> nn.Module:
    """A model with one linear layer `fc`, a buffer `count`, and this forward."""
    model = type("Model", (Base,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def flat(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)


def assert_same(model: nn.Module, calls: list[Callable[[nn.Module], Any]], root: str | None = None) -> nn.Module:
    """The rewritten model does in each call what the plain one does, and leaves the same buffers; it bakes back."""
    before = copy.deepcopy(model)
    planned = plan(model, SPEC)
    assert root in (None, planned.root), planned.why
    new = rewrite(model, planned)
    for training in (True, False):
        before.train(training), new.train(training)
        for call in calls:
            torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
            expected = call(before)
            torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
            found = call(new)
            assert type(found) is type(expected)
            assert len(flat(found)) == len(flat(expected))
            for one, other in zip(flat(found), flat(expected), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
                if isinstance(one, Tensor):
                    assert one.requires_grad == other.requires_grad
    torch.testing.assert_close(dict(new.named_buffers()), dict(before.named_buffers()), rtol=0, atol=0)
    if not hasattr(new, "last") and not hasattr(getattr(new, "inner", None), "last"):  # else torch cannot copy it
        assert type(bake(new)) is type(model)
    return new


@pytest.fixture(name="spec")
def keeping_spec() -> dict[str, Any]:
    """A spec that parametrizes every weight and keeps its value."""
    return SPEC


@pytest.fixture(name="model_of")
def model_with_forward() -> Callable[..., nn.Module]:
    return model_of


@pytest.fixture(name="assert_same")
def same_in_each_call() -> Callable[..., nn.Module]:
    return assert_same


@pytest.fixture
def once() -> Callable[..., nn.Module]:
    """Compare calls with one input of shape (3, 4)."""

    def compare(model: nn.Module, root: str | None = None) -> nn.Module:
        x, y = torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(2, -1, 12).reshape(3, 4)
        return assert_same(model, [lambda m: m(x.clone()), lambda m: m(y.clone())], root)

    return compare


@pytest.fixture
def x() -> Tensor:
    """Return five rows of four numbers."""
    return torch.randn(5, 4)
