"""SyncBatchNorm as a function of its tensors, alone and among several processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm
from torch.nn.utils import parametrize

from rewriter import bake, plan, rewrite


class Doubled(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X * 2


SPEC = {
    "reparam": 1,
    "rules": [{"name": "r", "select": "norm.{weight,bias}", "chain": [Doubled()], "init": "raw"}],
}
X = torch.linspace(-2, 3, 24, dtype=torch.float64).reshape(4, 3, 2).cos()


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.SyncBatchNorm(3, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    model = Model(**options).double()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    reference = copy.deepcopy(model)
    for tensor in ("weight", "bias"):
        parametrize.register_parametrization(reference.norm, tensor, Doubled())
    assert {site.capture for site in plan(model, SPEC)} == {"opened"}
    return rewrite(model, SPEC), reference


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    given = x.clone().requires_grad_()
    model(given).pow(3).sum().backward()
    return {"x": given.grad, **{name: p.grad for name, p in model.named_parameters()}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-2}, {"track_running_stats": False}], ids=str
)
def test_without_processes_it_is_a_batch_norm_that_tracks(options: dict[str, Any]) -> None:
    new, reference = pair(**options)
    for training in (True, True, False):
        new.train(training), reference.train(training)
        torch.testing.assert_close(gradients(new, X), gradients(reference, X), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dict(new.named_buffers()), dict(reference.named_buffers()), rtol=1e-10, atol=1e-10)
    baked = bake(new)
    assert type(baked.norm) is nn.SyncBatchNorm
    torch.testing.assert_close(baked(X), reference(X), rtol=1e-10, atol=1e-10)


def test_what_torch_refuses_is_refused_in_its_words() -> None:
    new, reference = pair()
    for x in (X[0, 0], X[:, :0]):
        with pytest.raises(ValueError) as expected:
            reference(x)
        with pytest.raises(ValueError) as found:
            new(x)
        assert str(found.value) == str(expected.value)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two processes, as far as a module can tell; what it would synchronize is written down."""
    seen: dict[str, Any] = {}

    def apply(input: Tensor, *args: Any) -> Tensor:
        seen["input"], seen["args"] = input, args
        return input * 3

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(SyncBatchNorm, "apply", apply)
    return seen


def test_among_processes_the_statistics_are_synchronized(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    new, reference = pair(momentum=None)
    with pytest.raises(ValueError, match="expected input tensor to be on GPU") as expected:
        reference(X)
    with pytest.raises(ValueError) as found:
        new(X)
    assert str(found.value) == str(expected.value)
    for model in (new, reference):
        model.norm.reset_running_stats()
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "cpu")
    calls = []
    for model in (reference, new):
        torch.testing.assert_close(model(X), X * 3)
        calls.append(world["args"])
    for one, other in zip(*calls, strict=True):
        torch.testing.assert_close(one, other) if isinstance(one, Tensor) else None
        assert isinstance(one, Tensor) or one == other
    assert calls[1][2] is new.norm.running_mean
    assert calls[1][-1] == 2
    torch.testing.assert_close(new.eval()(X), reference.eval()(X))


def test_its_own_group_of_processes_is_asked(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "cpu")
    new, _ = pair(process_group="ours")
    new(X)
    assert world["args"][-2:] == ("ours", 2)
