"""hoist: first steps that depend on nothing trained are not evaluated in every forward, and are never stale."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import bake, rewrite
from rewriter.passes import print_graph


class _Work(nn.Module):
    """Something dear that is not trained."""

    done = 0

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))

    def forward(self, X: Tensor) -> Tensor:
        _Work.done += 1
        return torch.sin(X) * self.scale


class _Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, X: Tensor) -> Tensor:
        return X * self.gain


def _model(frozen: bool = True) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[0].weight.requires_grad_(not frozen)
    return model


def _rewritten(frozen: bool = True, capture: str = "graph", **options: Any) -> nn.Module:
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "0.weight", "chain": [_Work(), _Trained()], "init": "raw"}]}
    new = rewrite(_model(frozen), spec, capture=capture, without=["hoist"])
    site = new.get_submodule("0").parametrizations.weight
    getattr(site, "1").gain.requires_grad_()
    if "hoist" not in options.get("without", ()):
        from rewriter.passes import hoist

        hoist([site])
    return new


def _work(model: nn.Module, x: Tensor) -> int:
    before = _Work.done
    model(x)
    return _Work.done - before


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64)


def test_the_first_step_runs_once_while_the_rest_is_trained(capture: str, x: Tensor) -> None:
    new = _rewritten(capture=capture)
    assert [_work(new, x) for _ in range(3)] == [1, 0, 0]
    optimizer = torch.optim.SGD((p for p in new.parameters() if p.requires_grad), lr=0.1)
    new(x).sum().backward()
    optimizer.step()
    assert _work(new, x) == 0
    torch.testing.assert_close(new(x), bake(new)(x))


def test_the_graph_says_so() -> None:
    lines = print_graph(_rewritten()).splitlines()
    assert lines[1] == "%2 = evaluate 0.weight [first 1 hoisted]: original >> _Work >> _Trained"
    assert print_graph(_rewritten(without=["hoist"])).splitlines()[1] == (
        "%2 = evaluate 0.weight: original >> _Work >> _Trained"
    )


def test_a_mask_under_an_adapter_is_hoisted(x: Tensor) -> None:
    model = _model(frozen=False)
    chain = [{"scale": {"factor": 0.5}}, {"lora": {"r": 2}}]
    rule = {"name": "r", "select": "0.weight", "chain": chain}
    new = rewrite(model, {"reparam": 1, "rules": [rule]})
    assert new.get_submodule("0").parametrizations.weight.hoisted == 1
    new(x).sum().backward()
    torch.testing.assert_close(new(x), bake(new)(x))


def test_nothing_is_hoisted_that_is_trained() -> None:
    assert _rewritten(frozen=False).get_submodule("0").parametrizations.weight.hoisted == 0


def test_loading_changing_and_training_again_are_seen(x: Tensor) -> None:
    new = _rewritten()
    site = new.get_submodule("0").parametrizations.weight
    new(x)
    new.load_state_dict({key: value * 2 for key, value in new.state_dict().items()})
    torch.testing.assert_close(new(x), bake(new)(x))
    getattr(site, "0").scale.fill_(5)
    torch.testing.assert_close(new(x), bake(new)(x))
    new.float()
    torch.testing.assert_close(new(x.float()), bake(new)(x.float()))
    new.double()
    site.original.requires_grad_()
    new(x).sum().backward()
    assert site.original.grad is not None
    assert _work(new, x) == 1


def test_copies_start_afresh(x: Tensor) -> None:
    new = _rewritten()
    new(x)
    clone = copy.deepcopy(new)
    with torch.no_grad():
        clone.get_submodule("0").parametrizations.weight.original.add_(1)
    torch.testing.assert_close(clone(x), bake(clone)(x))
    torch.testing.assert_close(new(x), bake(new)(x))


class _Unpack(nn.Module):
    """A compressed tensor, made big again."""

    def forward(self, X: Tensor) -> Tensor:
        return X.to(torch.float64)


def test_a_compressed_weight_is_not_cached_unpacked(x: Tensor) -> None:
    model = _model()
    model.get_submodule("0").weight.data = model.get_submodule("0").weight.data.half()
    chain = [_Unpack(), _Trained()]
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "0.weight", "chain": chain, "init": "raw", "unsafe": True}]}
    site = rewrite(model, spec).get_submodule("0").parametrizations.weight
    getattr(site, "1").gain.requires_grad_()
    from rewriter.passes import hoist

    assert not hoist([site])
