"""Equal chains on many tensors are fitted as one, and it shows in nothing but the time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import RewriterError, bake, rewrite
from rewriter.parametrizations import Symmetric, WeightNorm, _registry
from tests.rules import one_rule


def _layers(count: int, size: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(size, size) for _ in range(count))).double()


@pytest.mark.parametrize(
    "step",
    [
        {"orthogonal": {"map": "householder"}},
        {"orthogonal": {"map": "matrix_exp"}},
        {"orthogonal": {"map": "cayley"}},
        {"orthogonal": {"map": "householder", "trivialization": False}},
        {"scale": {"factor": 0.5}},
        "symmetric",
        "skew",
        "triangular",
        "psd",
        "weight_norm",
        {"weight_norm": {"dim": 1}},
        "positive",
    ],
    ids=str,
)
def test_many_are_fitted_to_what_each_is_fitted_to_alone(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    many = _layers(20)
    if step in ("symmetric", "skew", "psd"):
        for layer in many:
            square = layer.weight.data
            layer.weight.data = {
                "symmetric": square + square.T,
                "skew": square - square.T,
                "psd": square @ square.T + torch.eye(5, dtype=torch.float64),
            }[step]
    torch.manual_seed(1)
    together = rewrite(many, one_rule(step))
    torch.manual_seed(1)
    monkeypatch.setattr("rewriter.planning._fit.FEWEST", 1000)
    alone = rewrite(many, one_rule(step))
    assert together.state_dict().keys() == alone.state_dict().keys()
    for key, tensor in together.state_dict().items():
        torch.testing.assert_close(tensor, alone.state_dict()[key], rtol=1e-9, atol=1e-9)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, key
    for one, other in zip(together.modules(), alone.modules(), strict=True):
        assert one.__dict__.get("shape") == other.__dict__.get("shape")
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(together(x), bake(alone)(x))


class _Counted(nn.Module):
    batched = True
    fits = 0

    def forward(self, X: Tensor) -> Tensor:
        return 2 * X

    def right_inverse(self, value: Tensor) -> Tensor:
        _Counted.fits += 1
        return value / 2


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes of this file, usable in specs."""
    monkeypatch.setitem(_registry._registered, "counted", _Counted)
    monkeypatch.setitem(_registry._registered, "falls", _Falls)


@pytest.mark.usefixtures("known")
def test_fitting_takes_no_more_calls_for_many_than_for_some() -> None:
    def fits(count: int) -> int:
        _Counted.fits = 0
        site = rewrite(_layers(count), one_rule("counted")).get_submodule("0.parametrizations.weight")
        torch.testing.assert_close(site.original * 2, _layers(count)[0].weight)
        return _Counted.fits

    assert fits(50) == fits(200) < 10
    assert fits(3) == 3


@pytest.mark.parametrize("member", [WeightNorm, Symmetric])
def test_members_of_the_catalog_are_fitted_together(member: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    invert = member.right_inverse
    monkeypatch.setattr(member, "right_inverse", lambda step, value: (calls.append(1), invert(step, value))[1])
    rewrite(_layers(50), one_rule(member.name))
    assert len(calls) < 10


class _Falls(_Counted):
    """Each of these is no function of one tensor at a time, or not what it seems."""

    kind = "mean"

    def right_inverse(self, value: Tensor) -> Tensor:
        if self.kind == "mean":
            return value / 2 + (value - value.mean(0) if value.ndim == 3 else 0)
        if self.kind == "setting":
            self.seen = value.ndim
            return value / 2
        if self.kind == "random":
            return value / 2 + torch.rand_like(value)
        if self.kind == "fails" and value.ndim == 3:
            raise RuntimeError("no batch")
        return value / 2


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("kind", ["mean", "setting", "random", "fails"])
def test_what_cannot_be_fitted_together_is_fitted_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Falls, "kind", kind)
    torch.manual_seed(3)
    new = rewrite(_layers(40), one_rule("falls"))
    torch.manual_seed(3)
    monkeypatch.setattr("rewriter.planning._fit.FEWEST", 1000)
    alone = rewrite(_layers(40), one_rule("falls"))
    torch.testing.assert_close(new.state_dict(), alone.state_dict(), rtol=0, atol=0)
    if kind == "setting":
        assert new.get_submodule("7.parametrizations.weight.0").seen == 2


def test_the_tensor_that_cannot_be_fitted_is_named() -> None:
    model = _layers(40)
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.eye(5))
        model[17].weight[0, 0] = -1
    with pytest.raises(RewriterError, match=r"on 17\.weight: .*no rotation"):
        rewrite(model, one_rule("special_orthogonal"))
