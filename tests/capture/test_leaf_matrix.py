"""Every torch.nn module that owns tensors computes, rewritten, what torch's own mechanism makes of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._pytree import tree_leaves

from rewriter import bake, plan, rewrite
from rewriter.io import load_model, save_model
from rewriter.sites import PASSED, Site
from tests.capture.configurations import CONFIGURATIONS, Configuration


class Symmetric(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.triu() + X.triu(1).mT


class Mask(nn.Module):
    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep)

    def forward(self, X: Tensor) -> Tensor:
        return X * self.keep


def _mask(weight: Tensor) -> Tensor:
    return (torch.arange(weight.numel()).reshape(weight.shape) % 3 != 0).to(weight.dtype)


CHAINS: dict[str, tuple[Callable[[Tensor], Any], Callable[[nn.Module, str], Any], Callable[[Tensor], bool]]] = {
    "orthogonal": (
        lambda w: {"orthogonal": {"map": "cayley"}},
        lambda m, n: parametrizations.orthogonal(m, n, "cayley"),
        lambda w: w.dim() == 2,
    ),
    "weight_norm": (lambda w: "weight_norm", parametrizations.weight_norm, lambda w: True),
    "spectral_norm": (
        lambda w: "spectral_norm",
        parametrizations.spectral_norm,  # dimension 1 for transposed convolutions
        lambda w: w.dim() > 1,
    ),
    "symmetric": (
        lambda w: "symmetric",
        lambda m, n: parametrize.register_parametrization(m, n, Symmetric()),
        lambda w: w.dim() > 1 and w.shape[-1] == w.shape[-2],
    ),
    "mask": (
        lambda w: Mask(_mask(w)),
        lambda m, n: parametrize.register_parametrization(m, n, Mask(_mask(getattr(m, n)))),
        lambda w: True,
    ),
}


def spec_of(model: nn.Module, names: list[str], chain: str) -> dict[str, Any]:
    entry = CHAINS[chain][0]
    rules: list[dict[str, Any]] = []
    for index, name in enumerate(names):
        weight = model.get_parameter(name)
        rules.append({"name": f"rule{index}", "select": name, "chain": [entry(weight)]})
        if chain == "symmetric" and weight.dim() > 2:  # torch's form acts on each slice, which a spec has to ask for
            rules[-1]["reshape"] = [-1, *weight.shape[-2:]]
    return {"reparam": 1, "rules": rules}


def with_torch(model: nn.Module, names: list[str], chain: str) -> nn.Module:
    model = copy.deepcopy(model)
    for name in names:
        path, _, tensor = name.rpartition(".")
        CHAINS[chain][1](model.get_submodule(path), tensor)
    return model


def run(model: nn.Module, arguments: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the outputs and the gradients of inputs and parameters, with the same random numbers each time."""
    given = [x.clone().requires_grad_() if x.is_floating_point() else x for x in arguments]
    model.zero_grad()
    torch.manual_seed(5)
    with parametrize.cached():
        outputs = [value for value in tree_leaves(model(*given)) if isinstance(value, Tensor)]
    weights = [torch.linspace(0.5, 1.5, max(out.numel(), 1), dtype=out.dtype).reshape(out.shape) for out in outputs]
    sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True)).backward()
    grads = {f"input {index}": x.grad for index, x in enumerate(given) if x.grad is not None}
    grads |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [out.detach() for out in outputs], grads


def assert_near(found: dict[Any, Tensor], expected: dict[Any, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.allclose(value, expected[name], rtol=tolerance, atol=tolerance), name


def sites_of(model: nn.Module) -> list[Site]:
    return [module for module in model.modules() if isinstance(module, Site)]


def evaluations(model: nn.Module) -> list[int]:
    """Count the evaluations of every site from now on."""
    counts = [0] * len(sites_of(model))
    for index, site in enumerate(sites_of(model)):

        def count(*_: Any, index: int = index) -> None:
            counts[index] += 1

        site.steps[0].register_forward_hook(count)
    return counts


def prepared(configuration: Configuration, chain: str, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = configuration.model().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    names = [f"layer.{name}" for name in configuration.names]
    return model, [name for name in names if CHAINS[chain][2](model.get_parameter(name))]


# One configuration of each kind: the other chains, captures and dtypes run on these; on all of them in the slow tests.
KINDS = (
    "linear", "conv2d circular", "conv transpose 2d", "batch norm 1d sequence", "embedding bag weighted",
    "lstm deep", "gru packed", "gru cell", "attention", "encoder layer masked",
)  # fmt: skip


def sampled(name: str, *others: Any, default: bool = False) -> Any:
    """Parameters that run by default on one configuration of each kind, or wherever `default` says so."""
    marks = () if default or name in KINDS else pytest.mark.slow
    return pytest.param(name, *others, marks=marks)


KIND = pytest.mark.parametrize("name", [sampled(name) for name in CONFIGURATIONS])
WAYS = [*((chain, "auto", torch.float64) for chain in CHAINS), ("weight_norm", "module", torch.float64)]
CASES = [sampled(name, *way, default=way == WAYS[1]) for name in CONFIGURATIONS for way in WAYS]
CASES += [pytest.param(name, "weight_norm", "auto", torch.float32, marks=pytest.mark.slow) for name in CONFIGURATIONS]


@pytest.mark.parametrize(("name", "chain", "capture", "dtype"), CASES)
def test_equals_torch_in_train_and_eval_and_bakes_back(name: str, chain: str, capture: str, dtype: torch.dtype) -> None:
    configuration, tolerance = CONFIGURATIONS[name], 1e-10 if dtype is torch.float64 else 1e-5
    model, names = prepared(configuration, chain, dtype)
    if not names:
        pytest.skip("no tensor of that shape")
    arguments = configuration.arguments(dtype)
    found = plan(model, spec_of(model, names, chain), capture=capture)
    new = rewrite(model, found)
    if capture == "auto":
        assert {site.capture for site in found} == {configuration.capture}, str(found)
    if found.root == "graph":
        called = any(PASSED in node.kwargs for node in new.graph.nodes)
        assert called == (configuration.capture == "called")
    reference = with_torch(model, names, chain)
    assert list(new.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(new.state_dict())
    counts = evaluations(new)
    for training in (True, False):
        new.train(training), reference.train(training)
        counts[:] = [0] * len(counts)
        outputs, grads = run(new, arguments)
        assert counts == [1] * len(names)
        expected_outputs, expected = run(reference, arguments)
        assert_near(dict(enumerate(outputs)), dict(enumerate(expected_outputs)), tolerance)
        assert_near(grads, expected, tolerance)
        assert_near(dict(new.named_buffers()), dict(reference.named_buffers()), tolerance)
    if dtype is torch.float32:
        return
    baked = bake(new)
    assert [type(module) for module in baked.modules()] == [type(module) for module in model.modules()]
    assert list(baked.state_dict()) == list(model.state_dict())
    assert_near(dict(enumerate(run(baked, arguments)[0])), dict(enumerate(outputs)), tolerance)


@KIND
def test_scripts_when_the_plain_module_does(name: str) -> None:
    configuration = CONFIGURATIONS[name]
    model, names = prepared(configuration, "weight_norm", torch.float64)
    if configuration.capture == "module":
        pytest.skip("TorchScript compiles no packed sequences")
    arguments = configuration.arguments(torch.float64)
    new = rewrite(model, spec_of(model, names, "weight_norm")).eval()
    if configuration.capture == "called":
        new = bake(new).layer
    try:
        scripted = torch.jit.script(new)
    except Exception:
        with pytest.raises(Exception, match=r"."):
            torch.jit.script(model.layer)
        return
    if "masked" not in name:  # that host makes the mask
        torch.testing.assert_close(run(scripted, arguments)[0], run(new, arguments)[0], rtol=1e-12, atol=1e-12)


@KIND
def test_saved_and_loaded_as_data(name: str, tmp_path: Any) -> None:
    configuration = CONFIGURATIONS[name]
    model, names = prepared(configuration, "weight_norm", torch.float64)
    arguments = configuration.arguments(torch.float64)
    new = rewrite(model, spec_of(model, names, "weight_norm")).eval()
    save_model(new, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt", allow=["conftest.*", "tests.*", type(model).__module__ + ".*"])
    torch.testing.assert_close(run(loaded, arguments)[0], run(new, arguments)[0], rtol=1e-12, atol=1e-12)
