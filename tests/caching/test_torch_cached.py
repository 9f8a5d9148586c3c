"""What torch's `parametrize.cached()` gets wrong, and what happens here: each test shows both."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from rewriter import bake, evaluate_once, rewrite
from tests.threads import run_threads

KEY = "cell.parametrizations.weight_hh.original"


@pytest.fixture
def theirs(plain: Any, counted: nn.Module) -> nn.Module:
    """The model with torch's own parametrization."""
    model = plain().double()
    parametrize.register_parametrization(model.cell, "weight_hh", counted, unsafe=True)
    return model


@pytest.fixture(params=["forward", "version"])
def ours(request: pytest.FixtureRequest, recurrent: Any) -> Any:
    return recurrent(cache=request.param)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7, 4, dtype=torch.float64)


def _update(model: nn.Module) -> None:
    with torch.no_grad():
        model.cell.parametrizations.weight_hh.original.add_(1)


def test_a_value_after_an_update_in_place(theirs: nn.Module, ours: Any, x: Tensor) -> None:
    with torch.no_grad(), parametrize.cached():
        before = theirs(x)
        _update(theirs)
        assert torch.equal(theirs(x), before), "torch: stale"
    with torch.no_grad():
        before = ours.model(x)
        _update(ours.model)
        assert not torch.equal(ours.model(x), before)
        torch.testing.assert_close(ours.model(x), bake(ours.model)(x))


def test_a_model_made_where_a_dead_one_was(theirs: nn.Module, ours: Any, x: Tensor) -> None:
    wrong = 0
    with torch.no_grad(), parametrize.cached():
        for scale in range(1, 20):
            clone = copy.deepcopy(theirs)
            clone.cell.parametrizations.weight_hh.original.mul_(scale)
            got, parametrize._cache_enabled = clone(x), 0
            wrong += not torch.allclose(got, clone(x))
            parametrize._cache_enabled = 1
            del clone
    assert wrong, "torch: another model's weight, since its cache is keyed by id()"
    with torch.no_grad():
        for scale in range(1, 20):
            clone = copy.deepcopy(ours.model)
            clone.cell.parametrizations.weight_hh.original.mul_(scale)
            clone(x)
            torch.testing.assert_close(clone(x), bake(clone)(x))
            del clone


def test_gradients_after_a_first_use_without(theirs: nn.Module, ours: Any, x: Tensor) -> None:
    with parametrize.cached():
        with torch.no_grad():
            theirs(x)
        theirs(x).sum().backward()
    assert theirs.cell.parametrizations.weight_hh.original.grad is None, "torch: no gradient"
    with torch.no_grad():
        ours.model(x)
    ours.model(x).sum().backward()
    first = ours.site.original.grad.clone()
    with evaluate_once(ours.model):
        with torch.no_grad():
            ours.model(x)
        ours.model(x).sum().backward()
    torch.testing.assert_close(ours.site.original.grad, 2 * first)


def test_parameters_given_to_functional_call(theirs: nn.Module, ours: Any, x: Tensor) -> None:
    other = {KEY: torch.zeros(5, 5, dtype=torch.float64)}
    with torch.no_grad(), parametrize.cached():
        before = theirs(x)
        assert torch.equal(torch.func.functional_call(theirs, other, (x,)), before), "torch: ignored"
    with torch.no_grad():
        ours.model(x)
        got = torch.func.functional_call(ours.model, other, (x,))
        reference = copy.deepcopy(ours.model)
        reference.load_state_dict({**ours.model.state_dict(), **other})
        torch.testing.assert_close(got, reference(x))


def test_two_backwards(theirs: nn.Module, ours: Any, x: Tensor) -> None:
    with parametrize.cached():
        theirs(x).sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            theirs(x).sum().backward()
    ours.model(x).sum().backward()
    ours.model(x).sum().backward()
    with evaluate_once(ours.model):
        ours.model(x).sum().backward()
        ours.model(x).sum().backward()


def test_an_export_leaves_nothing_behind(theirs: nn.Module, ours: Any, x: Tensor) -> None:
    from torch._subclasses import FakeTensor

    with parametrize.cached():
        torch.export.export(theirs, (x,), strict=False)
        left = [value for value in parametrize._cache.values() if isinstance(value, FakeTensor)]
        parametrize._cache.clear()
    for strict in (False, True):
        program = torch.export.export(ours.model, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), ours.model(x))
        assert not ours.site.policy.cached
    assert left, "torch: fake tensors in its cache"


def test_mixed_autocast(plain: Any, recurrent: Any, capture: str, spec: Any, x: Tensor) -> None:
    class Product(nn.Module):
        def forward(self, X: Tensor) -> Tensor:
            return X @ X

    x = x.float()
    theirs = plain()
    parametrize.register_parametrization(theirs.cell, "weight_hh", Product())
    with torch.no_grad(), parametrize.cached():
        with torch.autocast("cpu", torch.bfloat16):
            theirs(x)
        # The value was rounded in the region and is used outside of it.
        with pytest.raises(RuntimeError, match=r"dtype|expected"):
            theirs(x)
    for cache in ("forward", "version"):
        new = rewrite(plain(), spec("cell.weight_hh", Product(), cache=cache, init="raw"), capture=capture)
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                assert new(x).dtype == torch.bfloat16
            torch.testing.assert_close(new(x), bake(new)(x))


def test_checkpointing(theirs: nn.Module, ours: Any, x: Tensor) -> None:
    with parametrize.cached():
        out = checkpoint(theirs, x, use_reentrant=False)
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            out.sum().backward()
    out = checkpoint(ours.model, x, use_reentrant=False)
    out.sum().backward()
    reentrant = copy.deepcopy(ours.model)
    reentrant.zero_grad()
    checkpoint(reentrant, x.clone().requires_grad_(), use_reentrant=True).sum().backward()
    expected = copy.deepcopy(ours.model)
    expected.zero_grad()
    expected(x).sum().backward()
    for model in (ours.model, reentrant):
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)


def test_two_threads(theirs: nn.Module, ours: Any, x: Tensor) -> None:
    """torch's switch is global: whoever leaves first empties the cache and switches it off for all."""
    entered, left = threading.Event(), threading.Event()
    cached_inside: list[bool] = []

    def other() -> None:
        with parametrize.cached():
            entered.set()
            left.wait()
            cached_inside.append(len(parametrize._cache) > 0)

    with torch.no_grad(), parametrize.cached():
        theirs(x)
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait()
        left.set()
        thread.join()
    assert cached_inside == [True], "torch: one thread's values are another's"
    expected = bake(ours.model)(x).detach()

    def run(grad: bool) -> None:
        for _ in range(20):
            with torch.set_grad_enabled(grad):
                out = ours.model(x)
            assert out.requires_grad == grad
            torch.testing.assert_close(out.detach(), expected)

    run_threads(*[lambda: run(True), lambda: run(False)] * 2)
