"""Calls that cannot be meant so are refused in words, before anything is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import PlanError, RewriterError, SpecError, absorb, bake, evaluate_once, plan, rewrite, state
from rewriter.export import export_model
from rewriter.io import save_model

SPEC: dict[str, Any] = {"reparam": 1, "rules": [{"name": "kernels", "select": "*.weight", "chain": ["weight_norm"]}]}
VERBS: dict[str, Callable[[Any], Any]] = {
    "rewrite": lambda model: rewrite(model, SPEC),
    "plan": lambda model: plan(model, SPEC),
    "bake": bake,
    "absorb": absorb,
    "save_model": lambda model: save_model(model, "never-written.pt"),
    "export_model": lambda model: export_model(model, "never-written.pt"),
}
FOR_MODULES: dict[str, Callable[[Any], Any]] = {
    "evaluate_once": lambda model: evaluate_once(model).__enter__(),
    "freeze": state.freeze,
    "unfreeze": state.unfreeze,
    "invalidate": state.invalidate,
    "get_value": lambda model: state.get_value(model, "0.weight"),
    "set_value": lambda model: state.set_value(model, "0.weight", torch.eye(2)),
    "remap_optimizer": lambda model: state.remap_optimizer(_optimizer(), nn.Linear(2, 2), model),
}
NO_MODELS: dict[str, tuple[Any, str]] = {
    "a path": ("model.pt", r"not a str; rewriter\.io\.load_model reads one"),
    "weights": (nn.Linear(2, 2).state_dict(), "not an OrderedDict; load the weights into their model first"),
    "a class": (nn.Linear, r"not the class Linear; make one: Linear\(…\)"),
    "nothing": (None, "not a NoneType"),
}


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


def _program() -> torch.export.ExportedProgram:
    return torch.export.export(nn.Sequential(nn.Linear(2, 2)), (torch.ones(1, 2),))


@pytest.mark.parametrize("given", NO_MODELS)
@pytest.mark.parametrize("verb", [*VERBS, *FOR_MODULES])
def test_what_is_no_model_is_refused(verb: str, given: str) -> None:
    model, message = NO_MODELS[given]
    with pytest.raises(RewriterError, match=f"{verb} takes a torch.nn.Module.*{message}"):
        (VERBS | FOR_MODULES)[verb](model)


@pytest.mark.parametrize("verb", FOR_MODULES)
def test_a_program_is_refused_by_what_holds_values_between_calls(verb: str) -> None:
    with pytest.raises(RewriterError, match=f"{verb} takes a torch.nn.Module, not an ExportedProgram"):
        FOR_MODULES[verb](_program())


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(RewriterError, match="takes a torch optimizer first, not a list"):
        state.remap_optimizer([], nn.Linear(2, 2), nn.Linear(2, 2))  # type: ignore[type-var]


@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
def test_a_value_that_is_no_tensor_is_refused(name: str) -> None:
    new = rewrite(nn.Sequential(nn.Linear(2, 2)), SPEC)
    before = copy.deepcopy(new.state_dict())
    with pytest.raises(PlanError, match=rf"0\.{name[2:]} has shape .* cannot be set to an int"):
        state.set_value(new, name, 3)  # type: ignore[arg-type]
    assert all(torch.equal(before[key], value) for key, value in new.state_dict().items())


@pytest.mark.parametrize("verb", [rewrite, plan])
def test_a_way_of_capturing_that_there_is_not(verb: Any) -> None:
    with pytest.raises(rewriter.CaptureError, match="'module' or 'export', not 'moduel'"):
        verb(nn.Sequential(nn.Linear(2, 2)), SPEC, capture="moduel")


@pytest.mark.parametrize("verb", [rewrite, plan])
@pytest.mark.parametrize(
    "given",
    [
        {"dynamic_shapes": ({0: None},)},
        {"dynamic_shapes": ({0: None},), "capture": "export"},
        {"dynamic_shapes": ({0: None},), "example_inputs": (torch.ones(1, 2),)},
    ],
    ids=["alone", "no examples", "not exported"],
)
def test_sizes_that_vary_are_for_torch_export(verb: Any, given: dict[str, Any]) -> None:
    with pytest.raises(rewriter.CaptureError, match="capture='export', with example_inputs"):
        verb(nn.Sequential(nn.Linear(2, 2)), SPEC, **given)


@pytest.mark.parametrize("verb", [rewrite, plan])
@pytest.mark.parametrize("given", [{"example_inputs": (torch.ones(1, 2),)}, {"dynamic_shapes": ({0: None},)}])
def test_a_program_is_captured_already(verb: Any, given: dict[str, Any]) -> None:
    with pytest.raises(rewriter.CaptureError, match="takes no examples and no sizes"):
        verb(_program(), SPEC, **given)


@pytest.mark.parametrize(
    ("key", "value"), [("cache", "never"), ("cache", "version"), ("memory", "recompute"), ("batch", "always")]
)
def test_a_program_refuses_what_it_cannot_do(key: str, value: str) -> None:
    spec = {"reparam": 1, "rules": [{**SPEC["rules"][0], key: value}]}
    for verb in (rewrite, plan):
        with pytest.raises(PlanError, match=f"'kernels': an ExportedProgram has no `{key}: {value}`"):
            verb(_program(), spec)


def test_one_pass_to_leave_out_may_be_a_text() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    rule = {"name": "kernels", "select": "*.weight", "chain": ["skew"], "init": "raw", "batch": "always"}
    spec = {"reparam": 1, "rules": [rule]}
    assert "batch" in str(rewrite(model, spec).graph)
    assert "batch" not in str(rewrite(model, spec, without="batch").graph)


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
