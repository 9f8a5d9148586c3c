"""What bake cannot do right, it says."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import bake, rewrite
from rewriter.state import freeze, unfreeze


class Noise(nn.Module):
    """Draws in every mode, and does not declare it."""

    def forward(self, X: Tensor) -> Tensor:
        return X + 0.1 * torch.randn_like(X)


def test_a_baked_draw_is_named(capture: str) -> None:
    rule = {"name": "n", "select": "0.weight", "chain": [Noise()]}
    new = rewrite(nn.Sequential(nn.Linear(3, 3)), {"reparam": 1, "rules": [rule]}, capture=capture)
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"0\.weight: Noise draws random numbers .*baked tensor is one draw") as found:
        bake(new)
    assert found[0].filename == __file__
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_of_a_weight_bakes_without_a_warning() -> None:
    rule = {"name": "n", "select": "0.weight", "chain": [{"weight_dropout": {"p": 0.5}}]}
    new = rewrite(nn.Sequential(nn.Linear(3, 3)), {"reparam": 1, "rules": [rule]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bake(new)


@pytest.mark.parametrize("verb", [bake, freeze, unfreeze])
def test_a_verb_for_computed_tensors_warns_of_a_plain_model(verb: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=f"{verb.__name__} found no computed tensor") as found:
        again = verb(model)
    assert found[0].filename == __file__
    torch.testing.assert_close((again or model).state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
