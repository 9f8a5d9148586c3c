"""`evaluate_once` in the loops that people write: the same gradients, and one evaluation and backward of each chain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from rewriter import RewriterError, evaluate_once, rewrite
from tests.counted import Net, Runs, X, siamese, trained


def _generator_and_discriminator(net: nn.Module) -> None:
    fake = net(X)
    net(fake.detach()).square().mean().backward()
    net(fake).mean().backward()


def _losses_on_parts(net: nn.Module) -> None:
    hidden = net.get_submodule("first")(X) if isinstance(net, Net) else net(X)
    out = net(X)
    hidden.square().sum().backward(retain_graph=True)
    out.sum().backward(retain_graph=True)
    out.square().mean().backward()


def _accumulated_and_scaled(net: nn.Module) -> None:
    for micro in X.split(2):
        (net(micro).square().sum() / 3).backward()


def _teacher_and_student(net: nn.Module) -> None:
    with torch.no_grad():
        teacher = net(X)
    F.mse_loss(net(X * 0.9), teacher).backward()
    with torch.inference_mode():
        net(X)


def _sequential_checkpoints(net: nn.Module) -> None:
    x = X.clone().requires_grad_()
    checkpoint(net, x, use_reentrant=False).sum().backward()
    checkpoint(net, x, use_reentrant=True).sum().backward()
    checkpoint_sequential([net, net], 2, x, use_reentrant=False).sum().backward()


def _gradient_of_the_input_only(net: nn.Module) -> None:
    x = X.clone().requires_grad_()
    torch.autograd.grad(net(x).sum(), x)
    net(x).sum().backward()


def _nothing_at_all(net: nn.Module) -> None:
    return None


def _forward_only(net: nn.Module) -> None:
    net(X)


RUNS = [
    siamese,
    _generator_and_discriminator,
    _losses_on_parts,
    _accumulated_and_scaled,
    _teacher_and_student,
    _sequential_checkpoints,
    _gradient_of_the_input_only,
    _nothing_at_all,
    _forward_only,
]


def _counted(run: Callable[[], Any]) -> tuple[int, int]:
    Runs.forward = Runs.backward = 0
    run()
    return Runs.forward, Runs.backward


@pytest.mark.parametrize(("cache", "memory"), [("forward", "keep"), ("version", "recompute")])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__.strip("_"))
def test_one_evaluation_and_one_backward_of_each_chain(capture: str, run: Any, cache: str, memory: str) -> None:
    net = trained(capture, cache=cache, memory=memory)
    reference = copy.deepcopy(net)
    run(reference)

    def once() -> None:
        with evaluate_once(net):
            run(net)

    forwards, backwards = _counted(once)
    used = 0 if run is _nothing_at_all else 2
    differentiated = 0 if run in (_nothing_at_all, _forward_only) else 2
    again = differentiated if memory == "recompute" else 0
    assert (forwards, backwards) == (used + again, differentiated)
    for (name, one), (_, other) in zip(net.named_parameters(), reference.named_parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None, name
        else:
            assert (one.grad - other.grad).norm() <= 1e-6 * other.grad.norm(), name


def test_a_gradient_scaler_scales_what_arrives_at_the_end(capture: str) -> None:
    """In float64 nothing is rounded, so that the steps are equal to 1e-6; one of them overflows and is left out."""
    models = [trained(capture) for _ in range(2)]
    for once, net in zip((True, False), models, strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        for step in range(4):
            optimizer.zero_grad()

            def micro_batches(net: nn.Module = net, scaler: Any = scaler, step: int = step) -> None:
                for micro in X.split(2):
                    with torch.autocast("cpu", torch.bfloat16, enabled=False):
                        loss = net(micro).square().mean() * (float("inf") if step == 1 else 1.0)
                    scaler.scale(loss).backward()

            if once:
                with evaluate_once(net):
                    micro_batches()
            else:
                micro_batches()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        models[0 if once else 1] = net
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)


def test_hooks_of_every_kind_fire_once_on_every_stored_tensor(capture: str) -> None:
    net = trained(capture)
    calls: dict[str, int] = {}
    accumulators: list[Any] = []

    def note(name: str) -> None:
        calls[name] = calls.get(name, 0) + 1

    for name, parameter in net.named_parameters():
        parameter.register_hook(lambda gradient, name=name: note(f"{name} hook"))
        parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: note(f"{name} accumulated"))
        accumulators.append(torch.autograd.graph.get_gradient_edge(parameter).node)
        accumulators[-1].register_hook(lambda *gradients, name=name: note(f"{name} node"))
    with evaluate_once(net):
        _accumulated_and_scaled(net)
        inside = {name for name in calls if "parametrizations" in name}
    assert not inside
    stored = [name for name in calls if "parametrizations" in name]
    assert len(stored) == 3 * sum("parametrizations" in name for name, _ in net.named_parameters())
    assert {calls[name] for name in stored} == {1}


@pytest.mark.parametrize("moment", ["forward", "backward", "hook", "chain backward"])
def test_an_exception_anywhere_leaves_the_model_as_it_was(capture: str, moment: str) -> None:
    net = trained(capture)
    expected = trained(capture)
    siamese(expected)
    sites = [module for module in net.modules() if hasattr(module, "policy")]
    armed = [True]

    def fail(*_: Any) -> None:
        if armed[0]:
            raise KeyError(moment)

    handles: list[Any] = []
    if moment == "hook":
        handles.append(sites[0].original.register_hook(fail))
    if moment == "chain backward":
        handles.append(next(net.parameters()).register_hook(fail))
    with pytest.raises(KeyError), evaluate_once(net):
        out = net(X)
        if moment == "forward":
            fail()
        if moment == "backward":
            out.register_hook(fail)
        out.sum().backward()
    armed[0] = False
    assert not any(site.policy.busy for site in sites)
    net.zero_grad()
    for once in (False, True):
        net.zero_grad()
        if once:
            with evaluate_once(net):
                siamese(net)
        else:
            siamese(net)
        for one, other in zip(net.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-12)


def test_autograd_grad_of_originals_gives_their_gradients(capture: str) -> None:
    net = trained(capture)
    originals = list(net.parameters())
    expected = torch.autograd.grad(net(X).sum(), originals)
    with evaluate_once(net):
        inside = torch.autograd.grad(net(X).sum(), originals, allow_unused=True)
        net(X).sum().backward(inputs=[originals[0]])
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(originals[0].grad, expected[0])


def test_autograd_grad_of_originals_with_hooks_is_an_error(capture: str) -> None:
    net = trained(capture)
    original = net.get_submodule("first").parametrizations.weight.original
    original.register_hook(lambda gradient: gradient)
    with pytest.raises(RuntimeError, match="not have been used"), evaluate_once(net):
        torch.autograd.grad(net(X).sum(), original)


def test_a_site_that_is_trained_later_in_the_block_gets_its_gradient(capture: str) -> None:
    """A GAN's step: the critic is frozen for the generator, then trained."""
    net, reference = trained(capture), trained(capture)
    x = X.clone().requires_grad_()
    reference(X).square().sum().backward()
    with evaluate_once(net):
        net.requires_grad_(False)
        net(x).sum().backward()
        net.requires_grad_(True)
        net(X).square().sum().backward()
    for one, other in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_site_that_is_frozen_later_in_the_block_gets_its_gradient(capture: str) -> None:
    """A GAN's step: the critic is trained, then frozen for the generator, and trained again after the block."""
    net, reference = trained(capture), trained(capture)
    x = X.clone().requires_grad_()
    reference(X).square().sum().backward()
    with evaluate_once(net):
        net(X).square().sum().backward()
        net.requires_grad_(False)
        net(x).sum().backward()
    assert not any(parameter.requires_grad for parameter in net.parameters())
    for one, other in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("change", ["scale", "load"])
def test_a_teacher_that_changes_in_the_block_is_not_stale(capture: str, change: str) -> None:
    net = trained(capture).requires_grad_(False)
    with evaluate_once(net):
        net(X)
        if change == "scale":
            for parameter in net.parameters():
                parameter.mul_(3)
        else:
            net.load_state_dict({name: 0.5 * tensor for name, tensor in net.state_dict().items()})
        inside = net(X)
    torch.testing.assert_close(inside, net(X))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_double_backward_is_refused_with_what_to_do(capture: str) -> None:
    net = trained(capture)
    refused = pytest.raises(RewriterError, match="take create_graph=True out, or do this backward outside")
    with refused, evaluate_once(net):
        net(X).square().sum().backward(create_graph=True)
    gradients = torch.autograd.grad(net(X).square().sum(), list(net.parameters()), create_graph=True)
    sum(gradient.square().sum() for gradient in gradients).backward()


def test_the_hessian_of_the_input_is_allowed(capture: str) -> None:
    """A gradient penalty differentiates twice, but not through the chain."""
    net, reference = trained(capture), trained(capture)

    def penalty(net: nn.Module) -> None:
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()

    penalty(reference)
    with evaluate_once(net):
        penalty(net)
    for one, other in zip(net.parameters(), reference.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-12)


def test_two_models_of_which_one_is_inside(capture: str) -> None:
    net, other = trained(capture), trained(capture)
    expected = copy.deepcopy(other)
    expected(X).sum().backward()
    with evaluate_once(net):
        other(net(X)).sum().backward()
        other.zero_grad()
        other(X).sum().backward()
        for one, wanted in zip(other.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one.grad, wanted.grad)


def test_blocks_of_parts_end_by_themselves(capture: str) -> None:
    net, reference = trained(capture), trained(capture)
    siamese(reference)
    part = nn.ModuleList([net.get_submodule("first")])
    with evaluate_once(part):
        with evaluate_once(net):
            siamese(net)
        assert net.get_submodule("second").parametrizations.weight.original.grad is not None
        assert not net.get_submodule("first").parametrizations.weight.original.grad.any()
    for one, other in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-12)


def test_a_block_inside_autocast_differentiates_in_the_chains_own_precision(capture: str) -> None:
    chain = [{"orthogonal": {"map": "cayley"}}]
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        rule = {"name": "q", "select": "*.weight", "chain": chain, "init": "sample"}
        nets.append(rewrite(plain, {"reparam": 1, "rules": [rule]}, capture=capture, without=["batch"]))
    x = torch.linspace(-1, 1, 64).reshape(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        nets[0](x).float().square().sum().backward()
        with evaluate_once(nets[1]):
            nets[1](x).float().square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nets[0](x).float().square().sum()
    nets[0].zero_grad()
    loss.backward()
    for one, other in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-6)
