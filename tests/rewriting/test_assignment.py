"""Assigning, overriding and writing to computed tensors: the right value, an error or a warning, never silence."""

from __future__ import annotations

import copy
import gc
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rewriter import PlanError, RewriterError, bake, rewrite
from rewriter.state import get_value, set_value


class Exp(nn.Module):
    """Has no right inverse."""

    def forward(self, X: Tensor) -> Tensor:
        return X.exp()


def rewritten(chain: Any, capture: str, model: nn.Module | None = None, select: str = "0.weight") -> Any:
    torch.manual_seed(0)
    rule = {"name": "r", "select": select, "chain": [chain]}
    return rewrite(model or nn.Sequential(nn.Linear(4, 4)), {"reparam": 1, "rules": [rule]}, capture=capture)


OFF_SPACE = {
    "no right inverse": (Exp(), torch.full((4, 4), 3.0)),
    "not orthogonal": ({"orthogonal": {"map": "cayley"}}, torch.arange(16.0).reshape(4, 4)),
    "NaN": ({"orthogonal": {"map": "cayley"}}, torch.full((4, 4), float("nan"))),
    "NaN of a scale": ("weight_norm", torch.full((4, 4), float("nan"))),
    "not symmetric": ("symmetric", torch.arange(16.0).reshape(4, 4)),
}


@pytest.mark.parametrize("kind", OFF_SPACE)
@pytest.mark.parametrize("way", ["attribute", "parameter", "set_value"])
def test_a_value_that_the_chain_cannot_give_is_refused(kind: str, way: str, capture: str) -> None:
    chain, value = OFF_SPACE[kind]
    new = rewritten(chain, capture)
    before = copy.deepcopy(new.state_dict())
    with pytest.raises(PlanError, match=r"0\.weight cannot be set"):
        if way == "set_value":
            set_value(new, "0.weight", value)
        else:
            new[0].weight = nn.Parameter(value) if way == "parameter" else value
    for name, tensor in new.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["attribute", "load"])
def test_one_entry_that_a_mask_would_drop_is_refused(dtype: torch.dtype, way: str) -> None:
    """By the norm of the whole tensor it is within the rounding of its type."""
    size = 40 if dtype is torch.bfloat16 else 2000
    model = nn.Sequential(nn.Linear(size, size, bias=False)).to(dtype)
    new = rewritten({"l1_unstructured": {"amount": 1}}, "graph", model)
    value = get_value(new, "0.weight")
    dropped = value == 0
    new[0].weight = value
    value[dropped] = value.abs().max() / 4
    with pytest.raises(RewriterError, match=r"0\.weight.* gives one that is .* of its largest entry, away"):
        if way == "load":
            new.load_state_dict({"0.weight": value})
        else:
            new[0].weight = value
    assert not get_value(new, "0.weight")[dropped].any()


def test_a_counter_in_the_place_of_a_buffer_counts(capture: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_buffer("counter", torch.zeros(3))
    new = rewritten({"shift": {"offset": 1.0}}, capture, model, "0.counter")
    before = get_value(new, "0.counter")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        new[0].counter += 1
        gc.collect()
    assert not told
    torch.testing.assert_close(get_value(new, "0.counter"), before + 1)


@pytest.mark.parametrize("fill", [lambda data: nn.init.normal_(data, 0, 0.02), lambda data: data.zero_()])
def test_a_write_through_data_warns_at_its_line(fill: Any, capture: str) -> None:
    new = rewritten("weight_norm", capture)
    line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
    fill(new[0].weight.data)
    with pytest.warns(UserWarning, match=r"0\.weight was changed in place.*is lost.*set_value") as told:
        new(torch.ones(1, 4))
    assert (told[0].filename, told[0].lineno) == (__file__, line)
    fill(new[0].weight.data)
    with pytest.warns(UserWarning, match="is lost"):
        new[0].weight  # noqa: B018
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new(torch.ones(1, 4))


def test_fusing_a_computed_convolution_is_refused_before_bake(capture: str) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.running_var, 0.1, 0.5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval()
    new = rewritten("spectral_norm", capture, model).eval()
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(RewriterError, match="cannot be set"):
        fuse_conv_bn_eval(new[0], new[1])
    plain: Any = bake(new)
    torch.testing.assert_close(fuse_conv_bn_eval(plain[0], plain[1])(x), new(x), atol=1e-5, rtol=1e-5)


def test_functional_call_takes_originals_and_refuses_values(capture: str) -> None:
    new = rewritten("symmetric", capture)
    x = torch.randn(2, 4)
    zero = {"0.parametrizations.weight.original": torch.zeros(4, 4), "0.bias": torch.zeros(4)}
    assert not torch.func.functional_call(new, zero, (x,)).any()
    with pytest.raises(RewriterError, match="weight is computed by a chain, and functional_call cannot"):
        torch.func.functional_call(new, {"0.weight": torch.zeros(4, 4)}, (x,))
    new(x)


class Root(nn.Module):
    """A model with a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.table


@pytest.mark.parametrize("kind", [lambda value: value, nn.Parameter], ids=["tensor", "Parameter"])
def test_a_tensor_of_the_model_itself_is_assigned(kind: Any, capture: str) -> None:
    rule = {"name": "s", "select": "table", "chain": ["symmetric"]}
    new = rewrite(Root(), {"reparam": 1, "rules": [rule]}, capture=capture)
    value = torch.arange(9.0).reshape(3, 3)
    new.table = kind(value + value.T)
    assert torch.equal(new(torch.eye(3)).detach(), value + value.T)
    assert list(new.state_dict()) == ["parametrizations.table.original"]
    with pytest.raises(PlanError, match="table cannot be set"):
        new.table = kind(value)
    assert torch.equal(bake(new).table.detach(), value + value.T)
