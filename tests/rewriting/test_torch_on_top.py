"""What torch's own functions for weights do to a model that is rewritten already."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from rewriter import bake, rewrite
from rewriter.errors import PlanError, RewriterError
from rewriter.state import get_value

SPEC = {"reparam": 1, "rules": [{"name": "first", "select": "0.weight", "chain": ["orthogonal"]}]}


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def rewritten(capture: Any) -> Any:
    return rewrite(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)), SPEC, capture=capture)


def test_torch_parametrizes_another_layer(capture: str) -> None:
    model, x = rewritten(capture), torch.randn(3, 6)
    before = copy.deepcopy(model)
    parametrize.register_parametrization(model.get_submodule("2"), "bias", Double())
    torch.testing.assert_close(model(x), before(x) + before.get_submodule("2").bias)


def test_torch_parametrizes_another_tensor_of_the_same_layer_and_of_no_other_model(capture: str) -> None:
    model, other, x = rewritten(capture), rewritten(capture), torch.randn(3, 6)
    before, expected = copy.deepcopy(model), other(x)
    layer = model.get_submodule("0")
    parametrize.register_parametrization(layer, "bias", Double())
    with torch.no_grad():
        before.get_submodule("0").bias.mul_(2)
    torch.testing.assert_close(model(x), before(x))
    assert torch.equal(other(x), expected)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


@pytest.mark.parametrize("verb", [copy.deepcopy, bake, lambda model: bake(model, inplace=True)])
@pytest.mark.parametrize(("path", "tensor"), [("layer", "bias"), ("", "scale")])
def test_a_layer_that_torch_parametrizes_as_well_says_so_until_that_is_removed(
    path: str, tensor: str, verb: Any, capture: Any
) -> None:
    spec = {"reparam": 1, "rules": [{"name": "first", "select": "layer.weight", "chain": ["orthogonal"]}]}
    model, x = rewrite(Scaled(), spec, capture=capture), torch.randn(3, 6)
    before = model(x)
    parametrize.register_parametrization(model.get_submodule(path), tensor, nn.Identity())
    if verb is not copy.deepcopy or path or capture == "graph":  # torch copies classes of its own
        with pytest.raises(
            RewriterError, match=rf"{tensor} .*torch\.nn\.utils\.parametrize.*before the model is rewritten"
        ):
            verb(model)
    assert torch.equal(model(x), before)
    parametrize.remove_parametrizations(model.get_submodule(path), tensor)
    torch.testing.assert_close(verb(model)(x), before)


def test_such_a_layer_is_not_rewritten_in_place(capture: Any) -> None:
    model, x = rewritten(capture), torch.randn(3, 6)
    before = model(x)
    parametrize.register_parametrization(model.get_submodule("0"), "bias", nn.Identity())
    more = {"reparam": 1, "rules": [{"name": "second", "select": "2.weight", "chain": ["symmetric"]}]}
    with pytest.raises(RewriterError, match=r"bias .*torch\.nn\.utils\.parametrize"):
        rewrite(model, more, inplace=True)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda layer: parametrize.register_parametrization(layer, "weight", Double()),
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),  # type: ignore[no-untyped-call]
    ],
    ids=["register", "remove", "prune"],
)
def test_an_error_for_torch_names_the_chain_and_the_remedy(attempt: Any, capture: str) -> None:
    model, x = rewritten(capture), torch.randn(3, 6)
    names, before = list(model.state_dict()), model(x)
    with pytest.raises((RewriterError, AttributeError), match=r"weight.*(computed by|bake)"):
        attempt(model.get_submodule("0"))
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("chain", [["orthogonal"], ["weight_norm"], ["symmetric", {"scale": {"factor": 2.0}}]], ids=str)
def test_torch_transfers_a_chain_to_another_layer(capture: Any, chain: list[Any]) -> None:
    rule = {"name": "r", "select": "0.weight", "chain": chain}
    model = rewrite(nn.Sequential(nn.Linear(4, 4)), {"reparam": 1, "rules": [rule]}, capture=capture)
    other = nn.Linear(4, 4)
    if len(chain) == 2:
        other.weight.data = torch.eye(4)  # torch takes no assignment off the space
    parametrize.transfer_parametrizations_and_params(model.get_submodule("0"), other)
    torch.testing.assert_close(other.weight.detach(), get_value(model, "0.weight"))
    mine = sorted(name for name in model.state_dict() if "weight" in name)
    assert mine == sorted(f"0.{name}" for name in other.state_dict() if "weight" in name)
    other(torch.ones(1, 4)).sum().backward()


def test_torch_transfers_no_chunks(capture: Any) -> None:
    rule = {"name": "r", "select": "0.weight", "chain": ["weight_norm"], "per": {"dim": 0, "chunks": 2}}
    model = rewrite(nn.Sequential(nn.Linear(4, 4)), {"reparam": 1, "rules": [rule]}, capture=capture)
    with pytest.raises(PlanError, match=r"0\.weight: torch has no such chain"):
        parametrize.transfer_parametrizations_and_params(model.get_submodule("0"), nn.Linear(4, 4))


def test_a_hook_of_accelerate_stays_with_its_model(capture: str) -> None:
    """It sets a forward on the module: equal models have one class, and no other one runs it."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Zero(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 0

    spec = {"reparam": 1, "rules": [{"name": "s", "select": "0.weight", "chain": ["symmetric"]}]}
    one, other = (rewrite(nn.Sequential(nn.Linear(3, 3)), spec, capture=capture) for _ in range(2))
    x = torch.ones(1, 3)
    expected = [model(x) for model in (one, other)]
    hooks.add_hook_to_module(one, Zero())
    assert not one(x).any()
    assert torch.equal(other(x), expected[1])
    hooks.remove_hook_from_module(one)
    assert torch.equal(one(x), expected[0])
    assert torch.equal(bake(one)(x), expected[0])
