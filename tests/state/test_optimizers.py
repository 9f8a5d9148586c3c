"""Optimizers that lack parameters of a rewritten model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from rewriter import RewriterError, _optimizers, bake, rewrite
from rewriter.state import check_optimizer, freeze, named_sites, remap_optimizer
from tests.state.conftest import Net

X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> list[str]:
    """Train once with each optimizer in turn; the warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for optimizer in optimizers:
            model(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(one.message) for one in seen]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_an_optimizer_built_before_is_warned_of_once_by_name(capture: str, spec: Callable[..., Any], kind: Any) -> None:
    model = Net().double()
    optimizer = kind(model.parameters(), lr=0.01)
    new = rewrite(model, spec("first.weight", {"low_rank": {"rank": 2}}), capture=capture, inplace=True)
    (text,) = step(new, optimizer)
    for part in (kind.__name__, "first.parametrizations.weight.original0", "original1", "remap_optimizer"):
        assert part in text
    assert step(new, optimizer) == []


def test_an_optimizer_of_the_model_before_is_warned_of(capture: str, spec: Callable[..., Any]) -> None:
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    new = rewrite(model, spec("first.weight", "weight_norm"), capture=capture)
    (text,) = step(new, optimizer)
    assert "first.parametrizations.weight.original0" in text
    assert "before it was rewritten" in text


def test_an_optimizer_that_holds_all_is_not(rewritten: Callable[..., nn.Module]) -> None:
    new = rewritten({"lora": {"r": 2}})
    assert step(new, torch.optim.SGD(new.parameters(), lr=0.01)) == []
    trained = [parameter for parameter in new.parameters() if parameter.requires_grad]
    assert step(new, torch.optim.SGD(trained, lr=0.01)) == []


@pytest.mark.parametrize("froze", ["freeze", "requires_grad_"])
def test_frozen_parameters_need_no_optimizer(rewritten: Callable[..., nn.Module], froze: str) -> None:
    new = rewritten("weight_norm")
    if froze == "freeze":
        freeze(new)
    else:
        new.get_submodule("first").requires_grad_(False)
    assert step(new, torch.optim.SGD(new.get_submodule("second").parameters(), lr=0.01)) == []


def test_optimizers_that_alternate_on_one_model_share_it(capture: str, spec: Callable[..., Any]) -> None:
    new = rewrite(Net().double(), spec("*.weight", "weight_norm"), capture=capture)
    one = torch.optim.SGD(new.get_submodule("first").parameters(), lr=0.01)
    other = torch.optim.SGD([*new.get_submodule("second").parameters(), new.scale], lr=0.01)
    assert step(new, one, one, one, other, one) == []


def test_two_models_with_an_optimizer_each_are_right(capture: str, spec: Callable[..., Any]) -> None:
    rules = spec("first.weight", "weight_norm")
    generator, critic = (rewrite(Net().double(), rules, capture=capture) for _ in range(2))
    one, other = (torch.optim.SGD(model.parameters(), lr=0.01) for model in (generator, critic))
    both = nn.Sequential(generator, critic)
    assert step(both, one, other, one, other) == []


def test_a_teacher_that_is_trained_apart_is_no_model_before(capture: str, spec: Callable[..., Any]) -> None:
    teacher = Net().double()
    student = rewrite(teacher, spec("first.weight", "weight_norm"), capture=capture)
    one, other = (torch.optim.SGD(model.parameters(), lr=0.01) for model in (teacher, student))
    assert step(nn.Sequential(teacher, student), one, other, one) == []


def test_an_optimizer_of_something_else_says_nothing(rewritten: Callable[..., nn.Module]) -> None:
    new, head = rewritten("weight_norm"), nn.Linear(4, 1).double()
    assert step(nn.Sequential(new, head), torch.optim.SGD(head.parameters(), lr=0.01)) == []


def test_a_remapped_optimizer_is_right(capture: str, spec: Callable[..., Any]) -> None:
    model = Net().double()
    optimizer = torch.optim.Adam(model.parameters())
    new = rewrite(model, spec("first.weight", "weight_norm"), capture=capture)
    remapped = remap_optimizer(optimizer, model, new)
    assert check_optimizer(remapped, new) == []
    assert step(new, remapped) == []


def test_hooks_of_others_run_when_a_watch_ends(rewritten: Callable[..., nn.Module]) -> None:
    new = rewritten("weight_norm")
    called: list[int] = []
    hook = torch_optimizer.register_optimizer_step_post_hook(lambda *_: called.append(1))
    try:
        assert step(new, torch.optim.SGD(new.parameters(), lr=0.01)) == []
        assert all(watched.model() is not new for watched in _optimizers._watched)
    finally:
        hook.remove()
    assert called == [1]


def test_parameters_that_are_used_later_are_warned_of_then(capture: str, spec: Callable[..., Any]) -> None:
    new = rewrite(Net().double(), spec("*.weight", "weight_norm"), capture=capture)
    optimizer = torch.optim.SGD(new.get_submodule("second").parameters(), lr=0.01)
    new.get_submodule("second")(X).square().sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    (text,) = step(new, optimizer)
    assert "first.parametrizations.weight.original0" in text
    assert "second" not in text


def test_copies_and_files_know_nothing_of_it(rewritten: Callable[..., nn.Module]) -> None:
    new = rewritten("weight_norm")
    clone = copy.deepcopy(new)
    assert step(clone, torch.optim.SGD([clone.scale], lr=0.01)) == []


@pytest.mark.parametrize("named", [False, True])
def test_check_lists_lacking_parameters_and_foreign_ones(capture: str, spec: Callable[..., Any], named: bool) -> None:
    model = Net().double()
    optimizer = torch.optim.SGD(model.named_parameters() if named else model.parameters(), lr=0.1)
    assert check_optimizer(optimizer, model) == []
    new = rewrite(model, spec("first.weight", {"low_rank": {"rank": 2}}), capture=capture, inplace=True)
    lacks = [f"first.parametrizations.weight.original{index}: a trained parameter" for index in (0, 1)]
    found = check_optimizer(optimizer, new)
    assert [one.partition(" that")[0] for one in found[:2]] == lacks
    (gone,) = found[2:]
    assert ("first.weight" if named else "parameter 1 of group 0") in gone
    assert "[4, 4]" in gone
    built = torch.optim.SGD(new.named_parameters() if named else new.parameters(), lr=0.1)
    baked = bake(new, inplace=True)
    lacks_weight, *gone = check_optimizer(built, baked)
    assert lacks_weight.startswith("first.weight: a trained parameter")
    assert len(gone) == 2
    assert not named or gone[0].startswith("first.parametrizations.weight.original0")


def test_check_of_frozen_parameters_has_nothing_to_say(rewritten: Callable[..., nn.Module]) -> None:
    new = rewritten({"lora": {"r": 2}})
    optimizer = torch.optim.SGD([p for p in new.parameters() if p.requires_grad], lr=0.1)
    assert check_optimizer(optimizer, new) == []


def test_wrong_calls_are_refused(rewritten: Callable[..., nn.Module]) -> None:
    new = rewritten("weight_norm")
    with pytest.raises(RewriterError, match="optimizer first"):
        check_optimizer(new, torch.optim.SGD(new.parameters(), lr=0.1))  # type: ignore[arg-type]


def test_named_sites_gives_the_parameters_of_each_site_by_name(capture: str, spec: Callable[..., Any]) -> None:
    rules = spec("second.weight", {"lora": {"r": 2}})
    rules["rules"] += [{"name": "norm", "select": "first.weight", "chain": ["weight_norm"]}]
    new = rewrite(Net().double(), rules, capture=capture)
    found = named_sites(new)
    named = dict(new.named_parameters())
    assert list(found) == ["first.weight", "second.weight"]
    assert [*found["first.weight"]] == [f"first.parametrizations.weight.original{index}" for index in (0, 1)]
    assert all(named[name] is parameter for site in found.values() for name, parameter in site.items())
    assert sum(len(site) for site in found.values()) == sum("parametrizations" in name for name in named)
    outer = nn.ModuleDict({"inner": new})
    assert list(named_sites(outer)) == ["inner.first.weight", "inner.second.weight"]
    assert all(name in dict(outer.named_parameters()) for site in named_sites(outer).values() for name in site)
    assert named_sites(Net()) == {}
