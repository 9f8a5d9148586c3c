"""`optimizer=` of rewrite and bake: the optimizer that exists trains the changed model, with the state it had."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rewriter import RewriterError, absorb, bake, rewrite
from rewriter.state import check_optimizer, remap_optimizer
from tests.state.conftest import Net

X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.05),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.05, amsgrad=True),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, lr=0.05, foreach=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=0.05, fused=True),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()


def names(optimizer: torch.optim.Optimizer) -> list[list[str]]:
    return [group["param_names"] for group in optimizer.param_groups]


def assert_names_are_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    named = dict(model.named_parameters())
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert named[name] is parameter


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_as_if_masked_by_hand(
    capture: str, spec: Callable[..., Any], kind: str, inplace: bool
) -> None:
    """A mask of ones changes nothing: rewrite, steps and bake give the steps of the plain model."""
    plain, model = (Net().double() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    reference, optimizer = KINDS[kind](plain.parameters()), KINDS[kind](model.parameters())
    train(plain, reference)
    train(model, optimizer)
    rules = spec("first.weight", {"l1_unstructured": {"amount": 0}})
    new = rewrite(model, rules, capture=capture, inplace=inplace, optimizer=optimizer)
    assert check_optimizer(optimizer, new) == []
    train(plain, reference)
    train(new, optimizer)
    baked = bake(new, inplace=inplace, optimizer=optimizer)
    assert check_optimizer(optimizer, baked) == []
    train(plain, reference)
    train(baked, optimizer)
    torch.testing.assert_close(baked.state_dict(), plain.state_dict(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("step", ["weight_norm", "symmetric", "spectral_norm", {"random_unstructured": {"amount": 3}}])
def test_state_is_kept_where_the_original_is_the_weight(
    capture: str, spec: Callable[..., Any], step: Any, inplace: bool
) -> None:
    model = Net().double()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    moment = optimizer.state[model.first.weight]["exp_avg"].clone()
    new = rewrite(model, spec("first.weight", step), capture=capture, inplace=inplace, optimizer=optimizer)
    site = new.get_submodule("first.parametrizations.weight")
    stored = site.original1 if step == "weight_norm" else site.original
    torch.testing.assert_close(optimizer.state[stored]["exp_avg"], moment)
    assert len(optimizer.state) == 5
    baked = bake(new, inplace=inplace, optimizer=optimizer)
    torch.testing.assert_close(optimizer.state[baked.first.weight]["exp_avg"], moment)
    assert {id(parameter) for parameter in optimizer.state} <= {id(parameter) for parameter in baked.parameters()}
    train(baked, optimizer)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "step", [{"orthogonal": {"map": "cayley"}}, {"low_rank": {"rank": 2}}, {"scale": {"factor": 2.0}}]
)
def test_state_in_other_coordinates_is_dropped_by_name(
    capture: str, spec: Callable[..., Any], step: Any, inplace: bool
) -> None:
    model = Net().double()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    with pytest.warns(UserWarning, match=r"Adam starts without state for first\.weight: .*coordinates"):
        new = rewrite(model, spec("first.weight", step), capture=capture, inplace=inplace, optimizer=optimizer)
    site = new.get_submodule("first.parametrizations.weight")
    assert not any(parameter in optimizer.state for parameter in site.parameters())
    assert len(optimizer.state) == 4
    train(new, optimizer)
    assert all(parameter in optimizer.state for parameter in new.parameters())
    with pytest.warns(UserWarning, match=r"starts without state for first\.weight"):
        baked = bake(new, inplace=inplace, optimizer=optimizer)
    assert check_optimizer(optimizer, baked) == []
    assert baked.first.weight not in optimizer.state
    train(baked, optimizer)


def test_an_optimizer_without_state_loses_nothing(capture: str, spec: Callable[..., Any]) -> None:
    model = Net().double()
    optimizer = torch.optim.Adam(model.parameters())
    new = rewrite(model, spec("*.weight", {"orthogonal": {"map": "cayley"}}), capture=capture, optimizer=optimizer)
    assert check_optimizer(optimizer, new) == []
    train(new, optimizer)


@pytest.mark.parametrize("follow", ["optimizer=", "remap_optimizer"])
def test_groups_keep_their_settings_and_names(capture: str, spec: Callable[..., Any], follow: str) -> None:
    model = Net().double()
    decayed = [(name, one) for name, one in model.named_parameters() if name.endswith("weight")]
    others = [(name, one) for name, one in model.named_parameters() if not name.endswith("weight")]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.5}], lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer)
    before = copy.deepcopy(names(optimizer))
    rules = spec("first.weight", "weight_norm")
    if follow == "optimizer=":
        new = rewrite(model, rules, capture=capture, optimizer=optimizer)
    else:
        new = rewrite(model, rules, capture=capture)
        optimizer = remap_optimizer(optimizer, model, new)
    assert_names_are_of(optimizer, new)
    first, second = names(optimizer)
    assert set(first) == {*(f"first.parametrizations.weight.original{index}" for index in (0, 1)), "second.weight"}
    assert second == before[1]
    assert [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [(0.1, 0.01), (0.01, 0.5)]
    if follow == "optimizer=":
        schedule.step()
        assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.25]
        baked = bake(new, optimizer=optimizer)
        assert names(optimizer) == before
        assert_names_are_of(optimizer, baked)


def test_names_of_an_outer_module_keep_their_prefix(capture: str, spec: Callable[..., Any]) -> None:
    outer = nn.ModuleDict({"inner": Net().double()})
    optimizer = torch.optim.SGD(outer.named_parameters(), lr=0.1)
    outer["inner"] = rewrite(outer["inner"], spec("first.weight", "weight_norm"), capture=capture, optimizer=optimizer)
    assert_names_are_of(optimizer, outer)


def test_parameters_of_other_models_stay(capture: str, spec: Callable[..., Any]) -> None:
    model, head = Net().double(), nn.Linear(4, 1).double()
    optimizer = torch.optim.Adam([*head.parameters(), *model.parameters()])
    train(nn.Sequential(model, head), optimizer)
    new = rewrite(model, spec("first.weight", "symmetric"), capture=capture, optimizer=optimizer)
    assert check_optimizer(optimizer, nn.Sequential(new, head)) == []
    assert head.weight in optimizer.state


@pytest.mark.parametrize("groups", [1, 2])
def test_adapters_on_a_frozen_tensor_join(capture: str, spec: Callable[..., Any], groups: int) -> None:
    model = Net().double()
    model.first.weight.requires_grad_(False)
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    split = [{"params": trained}] if groups == 1 else [{"params": trained[:2]}, {"params": trained[2:]}]
    optimizer = torch.optim.AdamW(split, lr=0.01)
    train(model, optimizer)
    rules = spec("first.weight", {"lora": {"r": 2}})
    if groups == 1:
        new = rewrite(model, rules, capture=capture, optimizer=optimizer)
    else:
        with pytest.warns(UserWarning, match=r"AdamW has a new group, with its default settings, for first\.param"):
            new = rewrite(model, rules, capture=capture, optimizer=optimizer)
        assert len(optimizer.param_groups) == 3
    assert check_optimizer(optimizer, new) == []
    assert_names_are_of(optimizer, new)
    train(new, optimizer)
    baked = bake(new, optimizer=optimizer)
    assert len(optimizer.state) == len(trained)
    assert check_optimizer(optimizer, baked) == []
    train(baked, optimizer)


def test_tensors_that_were_left_out_stay_out(capture: str, spec: Callable[..., Any]) -> None:
    model = Net().double()
    optimizer = torch.optim.SGD(model.second.parameters(), lr=0.1)
    new = rewrite(model, spec("first.weight", "weight_norm"), capture=capture, optimizer=optimizer)
    assert {id(one) for one in optimizer.param_groups[0]["params"]} == {
        id(p) for p in new.get_submodule("second").parameters()
    }


def test_a_partial_bake_keeps_the_state_of_what_stays(capture: str, spec: Callable[..., Any]) -> None:
    model = Net().double()
    rules = spec("first.weight", {"orthogonal": {"map": "cayley"}})
    rules["rules"] += [{"name": "other", "select": "second.weight", "chain": [{"lora": {"r": 2}}]}]
    new = rewrite(model, rules, capture=capture)
    optimizer = torch.optim.Adam([one for one in new.parameters() if one.requires_grad])
    train(new, optimizer)
    moment = optimizer.state[new.get_parameter("first.parametrizations.weight.original")]["exp_avg"].clone()
    with pytest.warns(UserWarning, match=r"without state for second\.weight:"):
        part = bake(new, only=["other"], optimizer=optimizer)
    stored = part.get_parameter("first.parametrizations.weight.original")
    torch.testing.assert_close(optimizer.state[stored]["exp_avg"], moment)


def test_an_absorbed_parametrization_keeps_its_state() -> None:
    model = Net().double()
    torch.nn.utils.parametrizations.weight_norm(model.first)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    moment = optimizer.state[model.first.parametrizations.weight.original0]["exp_avg"].clone()
    new = rewrite(model, {"reparam": 1, "absorb": True, "rules": []}, optimizer=optimizer)
    assert check_optimizer(optimizer, new) == []
    stored = new.get_parameter("first.parametrizations.weight.original0")
    torch.testing.assert_close(optimizer.state[stored]["exp_avg"], moment)
    again = remap_optimizer(torch.optim.Adam(model.parameters()), model, absorb(model))
    assert len(again.param_groups[0]["params"]) == 6


def test_a_failed_rewrite_leaves_the_optimizer(capture: str, spec: Callable[..., Any]) -> None:
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RewriterError):
        rewrite(model, spec("absent", "symmetric"), capture=capture, inplace=True, optimizer=optimizer)
    assert check_optimizer(optimizer, model) == []


@pytest.mark.parametrize("verb", ["rewrite", "bake"])
def test_an_optimizer_that_cannot_follow_is_refused(verb: str, spec: Callable[..., Any]) -> None:
    def run(optimizer: Any) -> None:
        model, rules = Net().double(), spec("first.weight", "symmetric")
        if verb == "rewrite":
            rewrite(model, rules, optimizer=optimizer)
        else:
            bake(rewrite(model, rules), optimizer=optimizer)

    with pytest.raises(RewriterError, match=f"optimizer= of {verb} takes a torch optimizer, not a list"):
        run([])
    with pytest.raises(RewriterError, match=f"optimizer= of {verb} has no parameter of the model"):
        run(torch.optim.SGD(Net().parameters(), lr=0.1))


def test_a_program_takes_no_optimizer(spec: Callable[..., Any]) -> None:
    model = Net().double()
    program = torch.export.export(model, (X,))
    with pytest.raises(RewriterError, match="ExportedProgram takes no optimizer"):
        rewrite(program, spec("first.weight", "symmetric"), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_saved_state_loads_into_an_optimizer_that_is_built_anew(
    capture: str, spec: Callable[..., Any], frozen: bool
) -> None:
    """Torch matches parameters by their place in the groups."""
    model = Net().double()
    model.first.weight.requires_grad_(not frozen)
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad])
    train(model, optimizer)
    rules = spec("first.weight", {"lora": {"r": 2}} if frozen else "weight_norm")
    new = rewrite(model, rules, capture=capture, optimizer=optimizer)
    train(new, optimizer)
    fresh = torch.optim.Adam([one for one in new.parameters() if one.requires_grad])
    fresh.load_state_dict(optimizer.state_dict())
    for one, other in zip(optimizer.param_groups[0]["params"], fresh.param_groups[0]["params"], strict=True):
        assert one is other
        torch.testing.assert_close(fresh.state[other]["exp_avg"], optimizer.state[one]["exp_avg"])
    baked = bake(new, optimizer=optimizer)
    wanted = [id(one) for one in baked.parameters() if one.requires_grad]
    assert [id(one) for one in optimizer.param_groups[0]["params"]] == wanted
