"""Gradients inside `evaluate_once`, where those of the stored tensors only arrive at the end."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import RewriterError, evaluate_once, rewrite
from tests.counted import Net, X, siamese, trained


@pytest.mark.parametrize("reset", ["model", "optimizer", "one tensor"])
@pytest.mark.parametrize("moment", ["between", "at the end"])
def test_gradients_that_are_reset_inside_are_refused(capture: str, reset: str, moment: str) -> None:
    """What was gathered before would be in the sum all the same: a wrong gradient that nothing shows."""
    net = trained(capture)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    stored = net.get_submodule("first").parametrizations.weight.original

    def zero() -> None:
        if reset == "one tensor":
            stored.grad = None
        else:
            (net if reset == "model" else optimizer).zero_grad()

    with pytest.raises(RewriterError, match=r"was reset inside.*zero_grad\(\) before the block"), evaluate_once(net):
        zero()
        net(X).sum().backward()
        net(X).sum().backward()
        zero()
        if moment == "between":
            net(X).sum().backward()
    assert all(p.grad is None for name, p in net.named_parameters() if name.endswith(("original", "gain")))


def test_gradients_from_before_the_block_are_added_to(capture: str) -> None:
    net, reference = trained(capture), trained(capture)
    for model in (net, reference):
        siamese(model)
    before = [parameter.grad for parameter in net.parameters()]
    siamese(reference)
    with evaluate_once(net):
        siamese(net)
    for one, other, kept in zip(net.parameters(), reference.parameters(), before, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-12)
        assert one.grad is kept


def test_zeros_stand_for_a_gradient_only_inside(capture: str) -> None:
    net = trained(capture)
    stored = net.get_submodule("first").parametrizations.weight.original
    with pytest.raises(KeyError), evaluate_once(net):
        net(X).sum().backward()
        assert not stored.grad.any()
        raise KeyError
    assert stored.grad is None


def _unscale(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)


WORK: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "clipped": lambda net, optimizer: nn.utils.clip_grad_norm_(net.parameters(), 1e-3),
    "clipped by value": lambda net, optimizer: nn.utils.clip_grad_value_(net.parameters(), 1e-3),
    "unscaled": _unscale,
    "set to zero": lambda net, optimizer: optimizer.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("accumulated", [False, True])
def test_work_on_gradients_inside_is_refused(capture: str, work: str, accumulated: bool) -> None:
    """The gradients are not there yet, or not all of them: they would come unclipped."""
    net = trained(capture)
    if accumulated:
        net(X).sum().backward()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(RewriterError, match=r"changed inside.*clip and unscale gradients after"), evaluate_once(net):
        net(X).sum().backward()
        WORK[work](net, optimizer)
    stored = net.get_submodule("first").parametrizations.weight.original
    assert not stored._post_accumulate_grad_hooks


def test_gradients_from_before_are_ordinary_again_after_a_problem(capture: str) -> None:
    net = trained(capture)
    stored = net.get_submodule("first").parametrizations.weight.original
    net(X).sum().backward()
    before, value = stored.grad, stored.grad.clone()
    with pytest.raises(KeyError), evaluate_once(net):
        net(X).sum().backward()
        torch.testing.assert_close(stored.grad + 0, value)
        raise KeyError
    assert stored.grad is before and type(before) is Tensor and torch.equal(before, value)


def test_gradients_may_be_looked_at_and_copied_inside(capture: str) -> None:
    net = trained(capture)
    stored = net.get_submodule("first").parametrizations.weight.original
    with evaluate_once(net):
        net(X).sum().backward()
        assert stored.grad.norm() == 0 and stored.grad.device == stored.device and "0." in repr(stored.grad)
        for other in (
            copy.deepcopy(net),
            pickle.loads(pickle.dumps(stored.grad)),
            stored.grad + 1,
            stored.grad.clone(),
        ):
            tensors = [other] if isinstance(other, Tensor) else [p.grad for p in other.parameters()]
            assert {type(tensor) for tensor in tensors} <= {Tensor, type(None)}
    assert type(stored.grad) is Tensor
    assert stored.grad.norm() > 0


def test_gradients_that_come_another_way_inside_are_added(capture: str) -> None:
    """From a compiled model and from a penalty: these backwards reach the stored tensors before the block ends."""
    rule = {"name": "r", "select": "*.weight", "chain": [{"scale": {"factor": 2}}]}
    net = rewrite(Net().double(), {"reparam": 1, "rules": [rule]}, capture=capture)
    reference = copy.deepcopy(net)
    torch._dynamo.reset()
    compiled: Any = torch.compile(net, backend="eager", fullgraph=True)
    for model, run in ((reference, reference), (net, compiled)):
        with contextlib.nullcontext() if model is reference else evaluate_once(net):
            for _ in range(2):
                model(X).sum().backward()
                run(X).square().sum().backward()
                stored = model.get_submodule("first").parametrizations.weight.original
                stored.square().sum().backward()
    for one, other in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-12)


@pytest.fixture
def swapping() -> Iterator[None]:
    """Conversions swap the tensors, as they do by themselves for tensors of other classes."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("hooked", [False, True], ids=["", "with a hook that is gone"])
def test_gradients_arrive_after_a_conversion_that_swaps_tensors(capture: str, swapping: None, hooked: bool) -> None:
    """torch calls no hook any more on a tensor that had one before a swap."""
    model = trained(capture)
    if hooked:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(print).remove()
    for dtype in (torch.float64, torch.float32, torch.float64):
        model.to(dtype).zero_grad()
        x = X.to(dtype)
        wanted = torch.autograd.grad(model(x).square().sum() + model(x[:2]).sum(), list(model.parameters()))
        with evaluate_once(model):
            model(x).square().sum().backward()
            model(x[:2]).sum().backward()
        torch.testing.assert_close([parameter.grad for parameter in model.parameters()], list(wanted))


def test_no_trace_of_watching_is_left(capture: str) -> None:
    model = trained(capture)
    with evaluate_once(model):
        model(X).sum().backward()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    called: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda tensor: called.append(1))
    model(X).sum().backward()
    assert len(called) == len(list(model.parameters()))
