"""Parametrizations written for torch's protocol work unchanged: torch's own, geotorch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from rewriter import bake, rewrite

Rule = Callable[..., dict[str, Any]]


def assert_equal_to_torch(step: nn.Module, model: nn.Module, x: torch.Tensor, spec: dict[str, Any]) -> None:
    reference = copy.deepcopy(model)
    parametrize.register_parametrization(reference[0], "weight", step)
    new = rewrite(model, spec)
    new.load_state_dict(reference.state_dict())
    for mode in (True, False):
        new.train(mode), reference.train(mode)
        with parametrize.cached():
            expected = reference(x)
        torch.testing.assert_close(new(x), expected, rtol=1e-10, atol=1e-10)
    expected.sum().backward()
    new(x).sum().backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(new.get_parameter(name).grad, parameter.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(bake(new)(x), new(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["_Orthogonal", "_SpectralNorm", "_WeightNorm"])
def test_instances_of_torchs_own_classes(name: str, rule: Rule) -> None:
    model, x = nn.Sequential(nn.Linear(5, 5)).double(), torch.randn(3, 5, dtype=torch.float64)
    weight = model[0].weight
    step = {
        "_Orthogonal": lambda: parametrizations._Orthogonal(weight, parametrizations._OrthMaps.cayley),
        "_SpectralNorm": lambda: parametrizations._SpectralNorm(weight),
        "_WeightNorm": lambda: parametrizations._WeightNorm(0),
    }[name]()
    assert_equal_to_torch(copy.deepcopy(step), model, x, rule("0.weight", step))


@pytest.mark.parametrize("name", ["Sphere", "SO", "Stiefel", "LowRank", "PSD", "Symmetric", "Skew"])
def test_instances_and_names_of_geotorch(name: str, rule: Rule) -> None:
    geotorch = pytest.importorskip("geotorch")
    model, x = nn.Sequential(nn.Linear(4, 4)).double(), torch.randn(3, 4, dtype=torch.float64)
    arguments = {"rank": 2} if name == "LowRank" else {}
    factory = getattr(geotorch, name)
    step = factory(torch.Size([4, 4]), **arguments).double()
    with torch.no_grad():
        value = step.sample().double() if hasattr(step, "sample") else step(torch.randn(4, 4, dtype=torch.float64))
        model[0].weight.copy_(value)
    assert_equal_to_torch(copy.deepcopy(step), model, x, rule("0.weight", step))
    named = rewrite(model, rule("0.weight", {f"geotorch.{name}": arguments}))
    torch.testing.assert_close(named(x), model(x), rtol=1e-5, atol=1e-5)
