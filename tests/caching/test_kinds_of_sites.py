"""Joint, shared, tied, chunked and derived sites are cached like any other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import evaluate_once, rewrite
from rewriter.state import freeze, unfreeze


class _Fold(nn.Module):
    """Weight and bias, computed together."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight * self.gain, torch.tanh(bias) * self.gain

    def right_inverse(self, value: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return value


class _Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, X: Tensor) -> Tensor:
        return torch.sin(X) * self.gain


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(x))))


SPECS: dict[str, Any] = {
    "joint": {"select": "body.*", "joint": ["weight", "bias"], "chain": [_Fold()], "init": "raw"},
    "shared": {"select": ["body.weight", "other.weight"], "share": True, "chain": [_Gain()], "init": "raw"},
    "tied": {"select": "embed.weight", "chain": ["weight_norm"]},
    "chunked": {"select": "body.weight", "chain": ["weight_norm"], "per": {"dim": 0, "chunks": 2}},
    "derived": {"select": "body.weight", "from": "other.weight", "chain": ["transpose"]},
}


class _Model(_Tied):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.other(self.body(self.embed(x)))))


@pytest.fixture(params=SPECS)
def rule(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"name": "r", **SPECS[request.param]}


def _rewritten(rule: dict[str, Any], capture: str, **options: Any) -> tuple[nn.Module, Tensor]:
    model = rewrite(_Model().double(), {"reparam": 1, "rules": [{**rule, **options}]}, capture=capture)
    return model, torch.randint(11, (2, 5))


def test_evaluate_once_gives_the_same_gradients(rule: Any, capture: str) -> None:
    model, x = _rewritten(rule, capture)
    reference = copy.deepcopy(model)
    for _ in range(3):
        reference(x).square().sum().backward()
    with evaluate_once(model):
        for _ in range(3):
            model(x).square().sum().backward()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-12)


def test_cached_values_follow_every_parameter(rule: Any, capture: str) -> None:
    model, x = _rewritten(rule, capture, cache="version")
    with torch.no_grad():
        for parameter in model.parameters():
            model(x)
            parameter.mul_(1.5)
            torch.testing.assert_close(model(x), copy.deepcopy(model)(x))


def test_frozen_values_are_cached_and_unfrozen(rule: Any, capture: str) -> None:
    model, x = _rewritten(rule, capture)
    expected, trained = model(x), [parameter.requires_grad for parameter in model.parameters()]
    freeze(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.add_(1)
    torch.testing.assert_close(model(x), expected)
    unfreeze(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
