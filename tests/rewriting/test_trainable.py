"""`trainable:` of a rule and of a spec: which parameters of a rewritten model are trained, and what bake gives back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import PlanError, bake, load_spec, plan, rewrite
from rewriter.io import load_model, save_model
from rewriter.state import check_optimizer, extend


class Net(nn.Module):
    """Two layers, a tensor of the root, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.rand(3) + 1)
        self.second.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale


X = torch.linspace(-1, 1, 6).reshape(2, 3)


def spec(*chain: Any, top: str | None = None, **options: Any) -> dict[str, Any]:
    rules = [{"name": "rule", "select": "first.weight", "chain": list(chain), **options}]
    return {"reparam": 1, "rules": rules, **({"trainable": top} if top else {})}


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("step", "stored"), [("weight_norm", ["original0", "original1"]), ({"lora": {"r": 1}}, ["0.lora_A", "0.lora_B"])]
)
def test_only_what_is_rewritten_is_trained(capture: str, inplace: bool, step: Any, stored: list[str]) -> None:
    model = Net()
    before = flags(model)
    rules = spec(step, top="rewritten")
    planned = plan(model, rules, capture=capture)
    assert planned.frozen == ("scale", "first.bias", "second.weight")
    assert planned.to_dict()["frozen"] == list(planned.frozen)
    assert "frozen until bake: 3" in str(planned)
    assert flags(model) == before
    new = rewrite(model, rules, capture=capture, inplace=inplace)
    assert trained(new) == [f"first.parametrizations.weight.{name}" for name in stored]
    new(X).sum().backward()
    assert all(parameter.grad is not None for name, parameter in new.named_parameters() if parameter.requires_grad)
    again = rewrite(new, rules, inplace=inplace)
    assert trained(again) == trained(new)
    baked = bake(again, inplace=inplace)
    assert flags(baked) == before
    assert not any("reparam" in name for module in baked.modules() for name in vars(module))


def test_the_rest_stays_frozen_until_the_last_site_is_baked(capture: str) -> None:
    model, rules = Net(), spec("weight_norm", top="rewritten")
    rules["rules"] += [{"name": "other", "select": "second.weight", "chain": ["symmetric"]}]
    new = rewrite(model, rules, capture=capture)
    part = bake(new, only=["other"])
    assert "scale" not in trained(part)
    assert flags(bake(part)) == flags(model)


@pytest.mark.parametrize("top", ["as_is", "rewritten"])
def test_sites_of_earlier_rules_belong_to_the_rest(capture: str, top: str) -> None:
    model = Net()
    new = rewrite(model, {"reparam": 1, "rules": [{"name": "old", "select": "second.weight", "chain": ["symmetric"]}]})
    both = extend(new, spec("weight_norm", top=top), capture=capture)
    assert ("second.parametrizations.weight.original" in trained(both)) == (top == "as_is")
    assert flags(bake(both)) == flags(model)


def test_copies_and_files_keep_what_is_frozen(capture: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    rules = {
        "reparam": 1,
        "trainable": "rewritten",
        "rules": [{"name": "a", "select": "0.weight", "chain": ["symmetric"]}],
    }
    new = rewrite(model, rules, capture=capture)
    save_model(new, tmp_path / "model.pt")
    for one in (copy.deepcopy(new), load_model(tmp_path / "model.pt")):
        assert isinstance(one, nn.Module)
        assert trained(one) == ["0.parametrizations.weight.original"]
        assert trained(bake(one)) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("wanted", [None, False, True])
@pytest.mark.parametrize(("step", "adapter"), [("weight_norm", False), ({"lora": {"r": 1}}, True)])
def test_a_rule_decides_for_its_chain(
    capture: str, step: Any, adapter: bool, wanted: bool | None, before: bool
) -> None:
    model = Net()
    model.first.weight.requires_grad_(before)
    options = {} if wanted is None else {"trainable": wanted}
    rules = spec(step, **options)
    shown = plan(model, rules, capture=capture)
    assert shown.to_dict()["sites"][0]["trainable"] is wanted
    assert [word for word in ("(frozen)", "(trained)") if word in str(shown)] == {
        None: [],
        False: ["(frozen)"],
        True: ["(trained)"],
    }[wanted]
    new = rewrite(model, rules, capture=capture)
    expected = wanted if wanted is not None else before or adapter
    site = new.get_submodule("first.parametrizations.weight")
    assert any(parameter.requires_grad for parameter in site.parameters()) is expected
    if adapter:
        assert not site.original.requires_grad
    assert flags(bake(new)) == flags(model)
    changed = {"trainable": not wanted} if wanted is not None else {"trainable": True}
    with pytest.raises(PlanError, match="already parametrized"):
        rewrite(new, spec(step, **changed))


def test_the_state_of_a_frozen_chain_loads_into_a_trained_one(capture: str) -> None:
    model = Net()
    frozen = rewrite(model, spec("weight_norm", trainable=False), capture=capture)
    rewrite(model, spec("weight_norm"), capture=capture).load_state_dict(frozen.state_dict())


def test_gradients_from_before_move_nothing_that_is_frozen(capture: str) -> None:
    model = Net()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    model(X).sum().backward()
    rules = spec("symmetric", top="rewritten")
    new = rewrite(model, rules, capture=capture, inplace=True, optimizer=optimizer)
    scale = new.get_parameter("scale").clone()
    optimizer.step()
    torch.testing.assert_close(new.get_parameter("scale"), scale, rtol=0, atol=0)
    assert check_optimizer(optimizer, new) == []


def test_a_buffer_cannot_be_trained() -> None:
    model = Net()
    model.register_buffer("table", torch.rand(3))
    rules = spec({"scale": {"factor": 2.0}}, trainable=True)
    rules["rules"][0]["select"] = "table"
    with pytest.raises(PlanError, match="`trainable: true` needs a floating-point parameter, and this is a buffer"):
        plan(model, rules)


@pytest.mark.parametrize("wanted", [None, False, True])
def test_programs_take_a_rules_own(make_program: Callable[[nn.Module], Any], wanted: bool | None) -> None:
    model = Net()
    options = {} if wanted is None else {"trainable": wanted}
    new = rewrite(make_program(model), spec("weight_norm", **options))
    expected = wanted is not False
    stored = {name: one for name, one in new.named_parameters() if "original" in name}
    assert [one.requires_grad for one in stored.values()] == [expected, expected]
    assert dict(bake(new).named_parameters())["first.weight"].requires_grad
    with pytest.raises(PlanError, match="needs a module"):
        rewrite(make_program(model), spec("weight_norm", top="rewritten"))


@pytest.fixture
def make_program() -> Callable[[nn.Module], Any]:
    return lambda model: torch.export.export(model, (X,))


def test_a_spec_shows_it() -> None:
    assert str(load_spec(spec("weight_norm", top="rewritten"))) == "<spec>: 1 rule, the rest frozen"
