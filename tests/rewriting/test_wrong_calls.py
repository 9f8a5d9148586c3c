"""Calls that cannot be meant so are refused in words, before anything is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import PlanError, RewriterError, SpecError, absorb, bake, evaluate_once, plan, rewrite

SPEC = {"reparam": 1, "rules": [{"name": "kernels", "select": "*.weight", "chain": ["weight_norm"]}]}
VERBS: dict[str, Callable[[Any], Any]] = {
    "rewrite": lambda model: rewrite(model, SPEC),
    "plan": lambda model: plan(model, SPEC),
    "bake": bake,
    "absorb": absorb,
    "evaluate_once": lambda model: evaluate_once(model).__enter__(),
}
NO_MODELS: dict[str, tuple[Any, str]] = {
    "a path": ("model.pt", r"not a str; rewriter\.io\.load_model reads one"),
    "weights": (nn.Linear(2, 2).state_dict(), "not an OrderedDict; load the weights into their model first"),
    "a class": (nn.Linear, r"not the class Linear; make one: Linear\(…\)"),
    "nothing": (None, "not a NoneType"),
}


@pytest.mark.parametrize("given", NO_MODELS)
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_no_model_is_refused(verb: str, given: str) -> None:
    model, message = NO_MODELS[given]
    with pytest.raises(RewriterError, match=f"{verb} takes a torch.nn.Module.*{message}"):
        VERBS[verb](model)


@pytest.mark.parametrize("verb", [rewrite, plan])
def test_a_way_of_capturing_that_there_is_not(verb: Any) -> None:
    with pytest.raises(rewriter.CaptureError, match="'module' or 'export', not 'moduel'"):
        verb(nn.Sequential(nn.Linear(2, 2)), SPEC, capture="moduel")


def test_one_pass_to_leave_out_may_be_a_text() -> None:
    rewrite(nn.Sequential(nn.Linear(2, 2)), SPEC, without="batch")


@pytest.mark.parametrize(
    ("step", "hint"), [(nn.Tanh, r"give an instance: Tanh\(…\)"), (lambda X: X, "put a function into the forward")]
)
def test_a_step_that_is_no_module(step: Any, hint: str) -> None:
    rule = {"name": "kernels", "select": "*.weight", "chain": [step]}
    with pytest.raises(SpecError, match=hint):
        rewrite(nn.Sequential(nn.Linear(2, 2)), {"reparam": 1, "rules": [rule]})


def test_a_part_to_bake_that_there_is_not_suggests_one() -> None:
    new = rewrite(nn.Sequential(nn.Linear(2, 2)), SPEC)
    with pytest.raises(PlanError, match=r"did you mean '0\.weight'"):
        bake(new, only=["0.wieght"])
    with pytest.raises(PlanError, match="did you mean 'kernels'"):
        bake(new, only="kernel")


class Doubling(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.mul_(2)


def test_a_chain_that_writes_to_what_it_is_given() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    before = model[0].weight.clone()
    rule = {"name": "kernels", "select": "*.weight", "chain": [Doubling()]}
    with pytest.raises(PlanError, match=r"rule 'kernels' on 0\.weight.*in place; it has to return a new one"):
        rewrite(model, {"reparam": 1, "rules": [rule]}, inplace=True)
    assert torch.equal(model[0].weight, before)
