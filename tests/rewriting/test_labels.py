"""A labelled step is baked or removed by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rewriter import PlanError, bake, rewrite

Rule = Callable[..., dict[str, Any]]


def test_baking_a_step_keeps_the_value_and_the_other_steps(capture: str, rule: Rule) -> None:
    model, x = nn.Sequential(nn.Linear(5, 4)).double(), torch.randn(2, 5, dtype=torch.float64)
    chain = "weight_norm", {"scale": {"factor": 2.0, "label": "double"}}
    new = rewrite(model, rule("0.weight", *chain), capture=capture)
    with torch.no_grad():
        new.get_submodule("0.parametrizations.weight").original0.mul_(1.5)
    y = new(x)
    shorter = bake(new, only=["double"])
    assert new.get_submodule("0.parametrizations.weight").spec.chain == ("weight_norm", "scale(factor=2.0)")
    assert shorter.get_submodule("0.parametrizations.weight").spec.chain == ("weight_norm",)
    torch.testing.assert_close(shorter(x), y)
    assert [key for key in shorter.state_dict() if "original" in key] == [
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
    ]
    torch.testing.assert_close(bake(shorter)(x), y)
    assert type(bake(shorter)) is nn.Sequential


def test_removing_a_step_gives_what_the_others_alone_give(capture: str, rule: Rule) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)).double(), torch.randn(2, 4, dtype=torch.float64)
    new = rewrite(
        model, rule("0.weight", "symmetric", {"scale": {"factor": 3.0, "label": "s"}}, init="raw"), capture=capture
    )
    removed = bake(new, only=["s"], keep="original")
    torch.testing.assert_close(removed(x), rewrite(model, rule("0.weight", "symmetric", init="raw"))(x))


def test_the_first_step_can_go_too(rule: Rule) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)).double(), torch.randn(2, 4, dtype=torch.float64)
    new = rewrite(model, rule("0.weight", {"symmetric": {"label": "first"}}, {"scale": {"factor": 3.0}}))
    shorter = bake(new, only=["first"])
    torch.testing.assert_close(shorter(x), new(x))
    assert shorter.get_submodule("0.parametrizations.weight").spec.chain == ("scale(factor=3.0)",)


def test_a_value_that_the_rest_cannot_give_is_refused(rule: Rule) -> None:
    model = nn.Sequential(nn.Linear(4, 4)).double()
    bump = {"shift": {"label": "bump", "offset": 1.0}}
    new = rewrite(model, rule("0.weight", "skew", bump, init="raw"))
    before = {key: value.clone() for key, value in new.state_dict().items()}
    with pytest.raises(PlanError, match="without 'bump' the other steps cannot give the same value"):
        bake(new, only=["bump"], inplace=True)
    assert all(torch.equal(new.state_dict()[key], value) for key, value in before.items())


def test_a_chain_of_one_labelled_step_is_baked_whole(rule: Rule) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    new = rewrite(model, rule("0.weight", {"symmetric": {"label": "only"}}))
    assert type(bake(new, only=["only"])) is nn.Sequential
