"""The check after a rewrite finds values that differ from the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewriter import NumericError, plan, rewrite
from rewriter.capture import Call
from rewriter.cli._verify import verify_rewritten

SPEC = {"reparam": 1, "rules": [{"name": "w", "select": "0.weight", "chain": ["weight_norm"]}]}
X = torch.ones(1, 3)


@pytest.fixture
def checked() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    new = rewrite(model, SPEC)

    def check(new: nn.Module = new) -> Any:
        return verify_rewritten(model, new, plan(model, SPEC), Call((X,)))

    return new, check


def test_correct_rewrite_passes_the_check(checked: Any) -> None:
    _, check = checked
    found = check().to_dict()
    assert found["outputs"] is not None and found["outputs"] < 1e-6


@torch.no_grad()
def test_changed_tensor_without_a_rule_fails_the_check(checked: Any) -> None:
    new, check = checked
    new.get_parameter("1.bias").add_(1e-3)
    with pytest.raises(NumericError, match=r"1\.bias changed, though no rule owns it"):
        check()


@torch.no_grad()
def test_moved_value_fails_the_check(checked: Any) -> None:
    new, check = checked
    new.get_submodule("0").parametrizations.weight.original0.mul_(1.01)
    with pytest.raises(NumericError, match=r"0\.weight must keep its value and differs by 1\.0e-02"):
        check()


def test_missing_tensor_fails_the_check(checked: Any) -> None:
    new, check = checked
    new.get_submodule("1").register_parameter("bias", None)
    with pytest.raises(NumericError, match=r"has other tensors: \['1\.bias'\]"):
        check()


def test_different_outputs_fail_the_check(checked: Any) -> None:
    new, check = checked

    class Shifted(type(new.get_submodule("0").parametrizations.weight)):  # type: ignore[misc]
        def forward(self, *inputs: Any, **options: Any) -> Any:
            return super().forward(*inputs, **options) + 1

    new.get_submodule("0").parametrizations.weight.__class__ = Shifted
    with pytest.raises(NumericError, match=r"outputs"):
        check()
