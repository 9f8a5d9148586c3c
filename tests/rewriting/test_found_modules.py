"""A graph finds its modules where they are when it uses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import RewriterError, bake, rewrite

SPEC = {"reparam": 1, "rules": [{"name": "r", "select": "**.weight", "chain": ["weight_norm"]}]}


class PassesOn(nn.Module):
    """Has a module, and its attributes, as FSDP's wrapper does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["module"], name)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def model() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2, bias=False))


def test_a_module_may_be_put_into_one_that_passes_on_its_attributes() -> None:
    new, x = rewrite(model(), SPEC, capture="graph"), torch.randn(5, 3)
    expected = new(x)
    new[0] = PassesOn(new[0])
    assert torch.equal(new(x), expected)


def test_a_layer_that_is_called_may_be_replaced() -> None:
    new, x = rewrite(model(), SPEC, capture="graph"), torch.randn(5, 3)
    new.get_submodule("0")._modules["1"] = nn.Identity()
    plain = bake(new)
    torch.testing.assert_close(new(x), plain[1](plain[0][0](x)))


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        x = self.second(self.first(x))
        return torch.tanh(x)


def test_a_hook_may_replace_a_layer_that_runs_later_in_the_same_forward() -> None:
    model, other, x = Halves(), nn.Linear(3, 3), torch.randn(5, 3)
    for layer in (model.act, model.second):
        layer.register_forward_hook(lambda *_: None)  # so that the graph calls it
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "first.weight", "chain": ["weight_norm"]}]}
    new = rewrite(model, spec, capture="graph")
    for one in (model, new):
        one.act.register_forward_hook(lambda *_, one=one: setattr(one, "second", other))
    torch.testing.assert_close(new(x), model(x))


def test_a_replaced_layer_of_a_computed_tensor_is_named() -> None:
    new = rewrite(model(), SPEC, capture="graph")
    new._modules["1"] = nn.Linear(4, 2)
    with pytest.raises(RewriterError, match="1 was replaced or removed"):
        new(torch.randn(5, 3))
