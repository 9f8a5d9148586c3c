"""Classes of torch and geotorch by name: half precision is computed in float32."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import bake, rewrite
from rewriter.parametrizations._registry import construct, find
from rewriter.state import get_value

STEPS: list[tuple[str, dict[str, Any]]] = [
    *[("torch.Orthogonal", {"orthogonal_map": map}) for map in ("matrix_exp", "cayley", "householder")],
    ("torch.SpectralNorm", {}),
    ("torch.WeightNorm", {}),
    ("geotorch.SO", {}),
    ("geotorch.Stiefel", {}),
    ("geotorch.LowRank", {"rank": 2}),
    ("geotorch.PSD", {}),
    ("geotorch.Sphere", {}),
]


def value_of(step: Any, weight: Tensor) -> Tensor:
    stored = step.right_inverse(weight)
    value: Tensor = step(*stored) if isinstance(stored, (tuple, list)) else step(stored)
    return value.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "arguments"), STEPS, ids=str)
def test_half_precision_is_computed_in_float32(name: str, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    if name.startswith("geotorch"):
        pytest.importorskip("geotorch")
    model = nn.Sequential(nn.Linear(8, 8)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
    if name == "geotorch.LowRank":
        model[0].weight.data[2:] = 0
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "0.weight", "chain": [{name: arguments}]}]}
    new = rewrite(model, spec)
    value = get_value(new, "0.weight")
    assert value.dtype == dtype and value.isfinite().all()
    new(torch.randn(2, 8, dtype=dtype)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in new.parameters())
    assert bake(new)[0].weight.dtype == dtype


@pytest.mark.parametrize(("name", "arguments"), STEPS, ids=str)
def test_a_model_converted_later_is_computed_in_float32(name: str, arguments: dict[str, Any]) -> None:
    if name.startswith("geotorch"):
        pytest.importorskip("geotorch")
    weight = torch.eye(6)
    if name == "geotorch.LowRank":
        weight[2:] = 0
    step = construct(find(name), weight, arguments).eval()
    expected = value_of(copy.deepcopy(step), weight)
    half: Any = step.bfloat16()
    torch.testing.assert_close(value_of(half, weight.bfloat16()).float(), expected, rtol=0.02, atol=0.02)


def test_a_class_of_geotorch_can_be_pickled() -> None:
    geotorch = pytest.importorskip("geotorch")
    factory = find("geotorch.SO")
    assert isinstance(factory, type) and issubclass(factory, geotorch.SO)
    step = construct(factory, torch.eye(3), {})
    again = pickle.loads(pickle.dumps(step))
    assert type(again) is factory
    torch.testing.assert_close(again(torch.ones(3, 3)), step(torch.ones(3, 3)))


def test_torchs_weight_norm_scripts() -> None:
    step: Any = construct(find("torch.WeightNorm"), torch.ones(3, 2), {})
    g, v = step.right_inverse(torch.randn(3, 2))
    torch.testing.assert_close(torch.jit.script(step)(g, v), step(g, v))
