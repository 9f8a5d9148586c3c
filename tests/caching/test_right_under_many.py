"""Batched, hoisted, fused and recurrent chains under transforms, compilers and threads, against naive evaluation."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import bake, evaluate_once, rewrite
from rewriter.state import freeze
from tests.threads import run_threads

SPEC = {
    "reparam": 1,
    "rules": [
        {"name": "alike", "select": "layers.*.weight", "chain": [{"orthogonal": {"map": "cayley"}}]},
        {"name": "fused", "select": "cell.weight_hh", "chain": [{"scale": {"factor": 2}}, {"scale": {"factor": 0.3}}]},
        {"name": "hoisted", "select": "base.weight", "chain": [{"scale": {"factor": 0.5}}, {"lora": {"r": 2}}]},
        {"name": "kept", "select": "kept.weight", "chain": ["weight_norm"], "cache": "version"},
        {"name": "state", "select": "state.weight", "chain": ["spectral_norm"]},
        {"name": "again", "select": "again.weight", "chain": ["symmetric"], "memory": "recompute", "init": "raw"},
    ],
}


class _Net(nn.Module):
    """One layer for every kind of chain."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(5, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
        self.base, self.kept = nn.Linear(5, 5), nn.Linear(5, 5)
        self.state, self.again = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for _ in range(3):
            h = self.cell(x, h)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return self.again(self.state(self.kept(self.base(h))))


X = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(4, 5)


@pytest.fixture
def net(capture: str) -> nn.Module:
    torch.manual_seed(0)
    model = rewrite(_Net().double(), SPEC, capture=capture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or parameter.norm() == 0:
                parameter.normal_(std=0.3)
    return model.eval()


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_each_input_on_its_own_by_vmap_of_grad(net: nn.Module) -> None:
    parameters = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (x[None],)).square().sum()

    for _ in range(2):
        each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, X)
        for index, x in enumerate(X):
            for name, gradient in _gradients(net, x[None]).items():
                torch.testing.assert_close(each[name][index], gradient)
        with torch.no_grad():
            torch.testing.assert_close(net(X), copy.deepcopy(net)(X))


def test_an_ensemble(net: nn.Module) -> None:
    models = [copy.deepcopy(net) for _ in range(3)]
    for scale, model in enumerate(models):
        with torch.no_grad():
            model(X)
            for parameter in model.parameters():
                parameter.mul_(1 + 0.1 * scale)
    parameters, buffers = torch.func.stack_module_state(models)

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, (parameters, buffers), (X,))

    for out, model in zip(torch.vmap(run)(parameters, buffers), models, strict=True):
        torch.testing.assert_close(out, model(X))


@pytest.mark.parametrize("layer", ["layers.1", "kept"])
def test_jacobians_hessians_and_forward_mode(net: nn.Module, layer: str) -> None:
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    key = next(name for name in names if name.startswith(f"{layer}.") and name.endswith(("original", "original1")))
    start = net.get_parameter(key).detach()

    def run(original: Tensor) -> Tensor:
        return torch.func.functional_call(net, {key: original}, (X,)).square().sum()

    gradient = _gradients(net, X)[key]
    torch.testing.assert_close(torch.func.jacrev(run)(start), gradient)
    torch.testing.assert_close(torch.func.jacfwd(run)(start), gradient)
    hessian = torch.func.hessian(run)(start)
    step = 1e-5
    for place in ((0, 1), (3, 2)):
        moved = torch.zeros_like(start)
        moved[place] = step
        numeric = (torch.func.grad(run)(start + moved) - torch.func.grad(run)(start - moved)) / (2 * step)
        torch.testing.assert_close(hessian[(..., *place)], numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_once_for_all_steps_of_a_training(net: nn.Module, backend: str, training: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net.train(training)
    reference = copy.deepcopy(net)
    compiled: Callable[..., Any] = torch.compile(net, backend=backend, fullgraph=True)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in (net, reference)]
    for _ in range(4):
        for run, optimizer in zip((compiled, reference), optimizers, strict=True):
            optimizer.zero_grad()
            run(X).square().sum().backward()
            optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(net.state_dict(), reference.state_dict())
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(X), reference(X))
            net.get_submodule("base").bias.add_(1)
            reference.get_submodule("base").bias.add_(1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False])
def test_exported_while_values_are_cached(net: nn.Module, strict: bool) -> None:
    with torch.no_grad():
        expected = net(X)
        program = torch.export.export(net, (X,), strict=strict)
        torch.testing.assert_close(program.module()(X), expected)
    with evaluate_once(net):
        net(X).sum().backward()
        inside = torch.export.export(net, (X,), strict=strict)
        net(X).sum().backward()
    torch.testing.assert_close(inside.module()(X), expected)
    frozen = copy.deepcopy(net)
    freeze(frozen)
    torch.testing.assert_close(torch.export.export(frozen, (X,), strict=strict).module()(X), expected)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
        torch.testing.assert_close(net(X), bake(net)(X))


def test_threads_that_train_look_and_copy_at_once(net: nn.Module) -> None:
    """Values never move here, so whoever computes anything else has read what another thread was doing."""
    with torch.no_grad():
        expected = net(X)
    gradients = _gradients(copy.deepcopy(net), X)
    start = threading.Barrier(5)

    def look() -> None:
        with torch.no_grad():
            torch.testing.assert_close(net(X), expected)

    def train() -> None:
        found = torch.autograd.grad(net(X).square().sum(), [p for p in net.parameters() if p.requires_grad])
        names = [name for name, p in net.named_parameters() if p.requires_grad]
        torch.testing.assert_close(dict(zip(names, found, strict=True)), gradients)

    def copied() -> None:
        clone = copy.deepcopy(net)
        with torch.no_grad():
            next(clone.parameters()).add_(1)
        torch.testing.assert_close(clone(X), bake(clone)(X))

    def infer() -> None:
        with torch.inference_mode():
            assert net(X).is_inference()

    def cast() -> None:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert net(X).shape == expected.shape

    def run(work: Callable[[], None]) -> None:
        start.wait()
        for _ in range(15):
            work()

    run_threads(*(functools.partial(run, work) for work in (look, train, copied, infer, cast)))


def test_blocks_of_two_threads_on_one_model(net: nn.Module) -> None:
    expected = _gradients(copy.deepcopy(net), X)
    adding = threading.Lock()
    start = threading.Barrier(2)

    def run() -> None:
        start.wait()
        block = evaluate_once(net)
        block.__enter__()
        for _ in range(3):
            loss = net(X).square().sum()
            with adding:
                loss.backward()
        with adding:
            block.__exit__(None, None, None)

    net.zero_grad()
    run_threads(run, run)
    for name, gradient in expected.items():
        torch.testing.assert_close(net.get_parameter(name).grad, 6 * gradient)


@pytest.mark.parametrize("where", ["layers.2", "kept", "again"])
def test_an_exception_in_any_module_leaves_nothing(net: nn.Module, where: str) -> None:
    nn.init.zeros_(net.get_submodule(where).bias)
    expected, gradients = net(X).detach(), _gradients(copy.deepcopy(net), X)
    bias = net.get_submodule(where).bias
    shape = bias.shape
    bias.data = bias.data.new_zeros(7)  # which its layer cannot add
    for once in (False, True):
        with pytest.raises(RuntimeError), evaluate_once(net) if once else contextlib.nullcontext():
            net(X)
    bias.data = bias.data.new_zeros(shape)
    with torch.no_grad():
        torch.testing.assert_close(net(X), expected)
    torch.testing.assert_close(_gradients(net, X), gradients)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.9)
        torch.testing.assert_close(net(X), bake(net)(X))
