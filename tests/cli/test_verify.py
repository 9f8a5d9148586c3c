"""The check after a rewriting finds what is not as the plan said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewriter import NumericError, plan, rewrite
from rewriter.cli._verify import verify_rewritten

SPEC = {"reparam": 1, "rules": [{"name": "w", "select": "0.weight", "chain": ["weight_norm"]}]}
X = torch.ones(1, 3)


@pytest.fixture
def checked() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    new = rewrite(model, SPEC)

    def check(new: nn.Module = new) -> Any:
        return verify_rewritten(model, new, plan(model, SPEC), (X,))

    return new, check


def test_a_rewriting_that_is_right(checked: Any) -> None:
    _, check = checked
    found = check().to_dict()
    assert found["outputs"] is not None and found["outputs"] < 1e-6


@torch.no_grad()
def test_a_tensor_that_no_rule_owns_has_changed(checked: Any) -> None:
    new, check = checked
    new.get_parameter("1.bias").add_(1e-3)
    with pytest.raises(NumericError, match=r"1\.bias changed, though no rule owns it"):
        check()


@torch.no_grad()
def test_a_value_that_should_have_been_kept_has_moved(checked: Any) -> None:
    new, check = checked
    new.get_submodule("0").parametrizations.weight.original0.mul_(1.01)
    with pytest.raises(NumericError, match=r"0\.weight should have kept its value and differs by 1\.0e-02"):
        check()


def test_a_tensor_is_missing(checked: Any) -> None:
    new, check = checked
    new.get_submodule("1").register_parameter("bias", None)
    with pytest.raises(NumericError, match=r"has other tensors: \['1\.bias'\]"):
        check()


def test_outputs_that_differ_are_told_apart(checked: Any) -> None:
    new, check = checked

    class Shifted(type(new.get_submodule("0").parametrizations.weight)):  # type: ignore[misc]
        def forward(self, *inputs: Any, **options: Any) -> Any:
            return super().forward(*inputs, **options) + 1

    new.get_submodule("0").parametrizations.weight.__class__ = Shifted
    with pytest.raises(NumericError, match=r"outputs"):
        check()
