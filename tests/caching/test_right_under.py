"""Values stay right whatever runs the model: transforms, compilers, replicas, copies, exceptions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import bake, evaluate_once, rewrite
from rewriter.sites import Site
from rewriter.state import freeze
from tests.threads import run_threads


@pytest.fixture(params=["forward", "version"])
def made(request: pytest.FixtureRequest, recurrent: Any) -> Any:
    return recurrent(cache=request.param)


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    ["spectral_norm", "weight_norm", *({"orthogonal": {"map": m}} for m in ("matrix_exp", "cayley", "householder"))],
)
def test_a_feed_forward_network_compiles_once_for_twenty_steps(step: Any) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    init = "keep" if isinstance(step, str) else "sample"
    rule = {"name": "w", "select": "*.weight", "chain": [step], "init": init}
    new = rewrite(model, {"reparam": 1, "rules": [rule]}, capture="graph")
    reference, x = copy.deepcopy(new), torch.randn(4, 6, dtype=torch.float64)
    compiled: Callable[..., Any] = torch.compile(new, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for trained, run in ((new, compiled), (reference, reference)):
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
            for _ in range(20):
                optimizer.zero_grad()
                run(x).square().sum().backward()
                optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(new(x), reference(x))


def test_compiled_without_gradients_follows_updates(recurrent: Any) -> None:
    torch._dynamo.reset()
    made = recurrent(cache="version")
    with torch.no_grad():
        made.model(made.x)
        compiled: Callable[..., Any] = torch.compile(made.model, backend="eager", fullgraph=True)
        for _ in range(2):
            made.site.original.add_(1)
            torch.testing.assert_close(compiled(made.x), made.fresh())


def test_compiled_while_frozen_uses_the_cached_value(recurrent: Any) -> None:
    torch._dynamo.reset()
    made = recurrent("spectral_norm")
    freeze(made.model)
    before = copy.deepcopy(made.model.state_dict())
    compiled: Callable[..., Any] = torch.compile(made.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(made.x), made.model(made.x))
    torch.testing.assert_close(made.model.state_dict(), before)


def test_compiled_inside_evaluate_once_is_right(recurrent: Any) -> None:
    torch._dynamo.reset()
    made = recurrent()
    compiled: Callable[..., Any] = torch.compile(made.model, backend="eager", fullgraph=True)
    reference = copy.deepcopy(made.model)
    with evaluate_once(made.model):
        compiled(made.x).sum().backward()
        made.model(made.x).sum().backward()
    for _ in range(2):
        reference(made.x).sum().backward()
    for one, other in zip(made.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


class _Fails(nn.Module):
    """A layer that fails when it is told to, or copies the model it is part of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.action: list[Callable[[], None]] = []

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight
        for action in self.action:
            action()
        return x @ self.weight


def _two(spec: Any, capture: str) -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(4, 4), _Fails())
    return rewrite(model, spec("*.weight", "symmetric", init="raw"), capture=capture), torch.randn(2, 4)


def test_a_copy_made_inside_a_forward_is_a_model_of_its_own(spec: Any) -> None:
    model, x = _two(spec, "module")
    inner, copies = model.get_submodule("1"), []

    def copy_now() -> None:
        inner.action.clear()
        copies.append(copy.deepcopy(model))

    inner.action.append(copy_now)
    with evaluate_once(model):
        out = model(x)
    (clone,) = copies
    with torch.no_grad():
        clone.get_submodule("1").parametrizations.weight.original.add_(1)
    torch.testing.assert_close(model(x), out)
    torch.testing.assert_close(clone(x), bake(clone)(x))
    assert not torch.allclose(clone(x), out)
    clone(x).sum().backward()
    assert inner.parametrizations.weight.original.grad is None


def _replicate(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """One replica as torch.nn.parallel.replicate makes it, which itself wants accelerators."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    names = dict(model.named_modules())
    for path, module in names.items():
        replica = copies[module]
        replica._former_parameters = {}
        for key, child in module._modules.items():
            if child is None:
                replica._modules[key] = None
            else:
                setattr(replica, key, copies[child])
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                tensor = tensors[f"{path}.{key}" if path else key]
                setattr(replica, key, tensor)
                replica._former_parameters[key] = tensor
        for key, buffer in module._buffers.items():
            if buffer is not None:
                setattr(replica, key, buffer)
    return copies[model]


@pytest.mark.parametrize("cache", ["forward", "version"])
def test_replicas_compute_with_their_own_tensors(capture: str, spec: Any, cache: str) -> None:
    layers = [nn.Linear(6, 6) for _ in range(4)]
    chain = spec("*.weight", {"orthogonal": {"map": "cayley"}}, cache=cache)
    model = rewrite(nn.Sequential(*layers).double(), chain, capture=capture)
    x = torch.randn(2, 6, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    reference = copy.deepcopy(model)
    before = {path: module for path, module in model.named_modules()}
    broadcast = [
        {name: parameter * 1.0 for name, parameter in model.named_parameters()},
        {name: parameter * 1.0 for name, parameter in model.named_parameters()},
    ]
    replicas = [_replicate(model, tensors) for tensors in broadcast]
    assert {path: module for path, module in model.named_modules()} == before
    outs: list[Any] = [None, None]

    def run(index: int) -> None:
        outs[index] = replicas[index](x * (index + 1))

    run_threads(lambda: run(0), lambda: run(1))
    (outs[0].sum() + outs[1].sum()).backward()
    (reference(x).sum() + reference(2 * x).sum()).backward()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(model(x), reference(x))


def test_replicas_of_a_frozen_model(capture: str, spec: Any) -> None:
    model = rewrite(nn.Sequential(nn.Linear(4, 4)), spec("0.weight", "symmetric", init="raw"), capture=capture)
    freeze(model)
    x = torch.randn(2, 4)
    replica = _replicate(model, {name: parameter * 1.0 for name, parameter in model.named_parameters()})
    torch.testing.assert_close(replica(x), model(x))


def test_no_cached_value_is_part_of_the_state(made: Any) -> None:
    keys = list(made.model.state_dict())
    with torch.no_grad():
        made.model(made.x)
    assert list(made.model.state_dict()) == keys
    assert all("policy" not in site.__getstate__() for site in made.model.modules() if _is_site(site))


def _is_site(module: nn.Module) -> bool:
    return isinstance(module, Site)
