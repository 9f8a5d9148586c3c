"""What torch's own tests ask of torch.nn.utils.parametrize, asked of rules with modules from Python.

Norms and orthogonal are compared with torch in tests/parametrizations. Torch's transfer to another module is a rule.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rewriter import PlanError, absorb, bake, rewrite
from rewriter.state import convert_state_dict, extend, get_value, set_value


class Skew(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.tril(-1) - X.tril(-1).mT


class Cayley(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        one = torch.eye(X.size(0), dtype=X.dtype)
        return torch.linalg.solve(one + X, one - X)


class Zero(nn.Module):
    """Sets one entry of a vector to zero."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.ones_like(x)
        keep[self.index] = 0
        return x * keep


class RankOne(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.unsqueeze(-1) @ y.unsqueeze(-2)

    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(value, full_matrices=False)
        return U[:, 0] * S[0].sqrt(), Vh[0] * S[0].sqrt()


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x

    def right_inverse(self, value: Tensor) -> Tensor:
        return 0.5 * value


class Function(nn.Module):
    """Any forward and right inverse; `inputs` of forward are one or two."""

    def __init__(self, forward: Any = lambda x: x, right_inverse: Any = lambda value: value) -> None:
        super().__init__()
        self.function, self.inverse = forward, right_inverse

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)

    def right_inverse(self, value: Tensor) -> Any:
        return self.inverse(value)


X = torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(2, 5)


def layer() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 5)).double()


def spec(*chain: nn.Module, select: str = "0.weight", **options: Any) -> dict[str, Any]:
    return {"reparam": 1, "rules": [{"name": select, "select": select, "chain": list(chain), **options}]}


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()


def assert_orthogonal(matrix: Tensor) -> None:
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(len(matrix), dtype=matrix.dtype))


def test_chains_on_two_tensors_of_a_layer_come_and_go_one_by_one(capture: str) -> None:
    model = layer()
    weight, bias = model[0].weight, model[0].bias
    before = weight.detach().clone()
    both = spec(Skew(), Cayley())
    both["rules"] += spec(Zero(0), Zero(-1), select="0.bias")["rules"]
    new = rewrite(model, both, capture=capture, inplace=True)
    assert_orthogonal(get_value(new, "0.weight"))
    assert (get_value(new, "0.bias")[[0, -1]] == 0).all()
    assert len(list(new.parameters())) == 2
    values = [get_value(new, name) for name in ("0.weight", "0.bias")]
    train(new)
    assert_orthogonal(get_value(new, "0.weight"))
    assert not any(
        torch.equal(get_value(new, name), value) for name, value in zip(("0.weight", "0.bias"), values, strict=True)
    )

    half = bake(new, only=["0.weight"], keep="original", inplace=True)
    assert half[0].weight is weight if capture == "module" else half.get_parameter("0.weight") is weight
    assert not torch.equal(weight, before)
    assert (get_value(half, "0.bias")[[0, -1]] == 0).all()
    train(half)
    plain = bake(half, keep="original", inplace=True)
    assert type(plain[0]) is nn.Linear
    assert not hasattr(plain[0], "parametrizations")
    assert (plain[0].weight is weight, plain[0].bias is bias) == (True, True)
    assert (plain[0].bias[[0, -1]] != 0).all()
    for _ in range(2):
        plain = bake(rewrite(plain, both, capture=capture, inplace=True), inplace=True)
        assert (plain[0].weight is weight, plain[0].bias is bias) == (True, True)
        train(plain)


def test_a_chain_that_changes_the_shape_has_to_be_called_unsafe(capture: str) -> None:
    first_row = Function(lambda x: x[[0]])
    with pytest.raises(PlanError, match=r"\[1, 5\].*\[5, 5\].*unsafe"):
        rewrite(layer(), spec(first_row), capture=capture)
    model = layer()
    new = rewrite(model, spec(first_row, Function(), unsafe=True), capture=capture)
    assert get_value(new, "0.weight").shape == (1, 5)
    torch.testing.assert_close(bake(new, keep="original").state_dict(), model.state_dict())


def test_torch_parametrizes_an_original(capture: str) -> None:
    new = rewrite(layer(), spec(Double()), capture=capture)
    before = get_value(new, "0.weight")
    site = new.get_submodule("0.parametrizations.weight")
    parametrize.register_parametrization(site, "original", Skew())
    value = get_value(new, "0.weight")
    torch.testing.assert_close(value, before.tril(-1) - before.tril(-1).mT)
    torch.testing.assert_close(new(X), X @ value.mT + new.get_parameter("0.bias"))
    train(new)
    stored = new.get_parameter("0.parametrizations.weight.parametrizations.original.original")
    assert stored.grad is not None
    skew = get_value(new, "0.weight")
    torch.testing.assert_close(skew, -skew.mT)
    assert not torch.equal(skew, value)
    torch.testing.assert_close(bake(new).state_dict()["0.weight"], skew)
    with pytest.raises(PlanError, match=r"0\.weight cannot be set"):
        set_value(new, "0.weight", torch.ones(5, 5, dtype=torch.float64))
    parametrize.remove_parametrizations(site, "original", leave_parametrized=False)
    torch.testing.assert_close(get_value(new, "0.weight"), 2 * site.original.detach())
    torch.testing.assert_close(bake(new).state_dict()["0.weight"], 2 * site.original.detach())


WRONG: dict[str, tuple[Any, str]] = {
    "too few tensors": (Function(lambda x, y, z: x, lambda w: (w, w)), "argument|tensors"),
    "a number": (Function(lambda x: 2), "gives an int, not a tensor"),
    "two tensors": (Function(lambda x: (x, x)), "gives a tuple, not a tensor"),
    "another dtype": (Function(lambda x: x.bool()), "unsafe"),
    "another shape": (Function(lambda x: x[:-1]), "unsafe"),
    "another dtype of two": (Function(lambda x, y: (x + y).bool(), lambda w: (w, w + 1)), "unsafe"),
    "an inverse of another shape": (Function(lambda x: x, lambda w: w[:-1]), "unsafe|shape"),
}


@pytest.mark.parametrize("before", [[], [Function()]], ids=["first", "second"])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_parametrization_is_refused_and_nothing_changes(capture: str, case: str, before: list[Any]) -> None:
    wrong, message = WRONG[case]
    model = layer()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=rf"(?s)0\.weight.*({message})"):
        rewrite(model, spec(*before, wrong), capture=capture, inplace=True)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    if before:
        new = rewrite(model, spec(*before), capture=capture)
        with pytest.raises(PlanError, match=rf"(?s)0\.weight.*({message})"):
            extend(new, spec(wrong), inplace=True)
        assert [*new.state_dict()] == ["0.bias", "0.parametrizations.weight.original"]
        torch.testing.assert_close(get_value(new, "0.weight"), model[0].weight.detach())


@pytest.mark.parametrize("inverse", [lambda w: (w / 2,), lambda w: w / 2], ids=["sequence", "tensor"])
def test_a_single_original_has_torchs_name_and_loads_under_both(capture: str, inverse: Any) -> None:
    new = rewrite(layer(), spec(Function(lambda x: 2 * x, inverse)), capture=capture)
    theirs = layer()
    parametrize.register_parametrization(theirs[0], "weight", Function(lambda x: 2 * x, inverse))
    assert sorted(new.state_dict()) == sorted(theirs.state_dict())
    assert sorted(absorb(copy.deepcopy(theirs)).state_dict()) == sorted(theirs.state_dict())
    assert torch.equal(get_value(new, "0.weight") / 2, bake(new, keep="original")[0].weight.detach())
    for name in ("original", "original0"):
        key = f"0.parametrizations.weight.{name}"
        state = {"0.bias": new[0].bias.detach(), key: torch.ones_like(new[0].weight)}
        for model in (new, nn.Sequential(new)):  # inside another module, torch's load_state_dict runs
            loaded = copy.deepcopy(model)
            loaded.load_state_dict(state if model is new else {f"0.{one}": value for one, value in state.items()})
            assert (loaded.get_parameter(f"{'' if model is new else '0.'}{_original(new)}") == 1).all()
        assert (convert_state_dict(state, new, to="plain")["0.weight"] == 2).all()
        set_value(new, "0.weight", torch.zeros_like(new[0].weight))
    assert not get_value(new, "0.weight").any()


def _original(model: nn.Module) -> str:
    return next(name for name, _ in model.named_parameters() if "original" in name)


def test_several_originals_and_a_step_on_top(capture: str) -> None:
    model = layer()
    new = rewrite(model, spec(RankOne()), capture=capture)
    assert torch.linalg.matrix_rank(get_value(new, "0.weight")) == 1
    with pytest.raises(PlanError, match="keep='value'"):
        bake(new, keep="original")
    flat = bake(new)
    again = rewrite(flat, spec(RankOne(), Double()), capture=capture)
    torch.testing.assert_close(get_value(again, "0.weight"), flat[0].weight.detach())
    assert len(list(again.parameters())) == 3
    for _ in range(2):
        train(again)
    assert torch.linalg.matrix_rank(get_value(again, "0.weight")) == 1
    plain = bake(again)
    assert type(plain[0]) is nn.Linear
    assert len(list(plain.parameters())) == 2
    train(plain)


def test_steps_take_the_mode_of_the_layer(capture: str) -> None:
    for training in (False, True):
        model = layer().train(training)
        new = rewrite(model, spec(Function(), Function().eval(), Function().train()), capture=capture)
        steps = [new.get_submodule(f"0.parametrizations.weight.{index}") for index in range(3)]
        assert [step.training for step in steps] == [training] * 3
        longer = extend(new, spec(Function().train(not training)))
        assert longer.get_submodule("0.parametrizations.weight.3").training is training


class Shift(nn.Module):
    """A layer with attributes of its own; a subclass copies itself in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        self.notes = [1.0, 2.0]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class CopiesItself(Shift):
    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesItself:
        made = self.__new__(type(self))
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made


@pytest.mark.parametrize("kind", [Shift, CopiesItself])
def test_copies_are_independent(capture: str, kind: type[nn.Module]) -> None:
    add = [Function(lambda x: x + 1.0) for _ in range(2)]
    rules = [rule for name in ("weight", "bias") for rule in spec(*add, select=f"0.{name}")["rules"]]
    new = rewrite(nn.Sequential(kind()), {"reparam": 1, "rules": rules}, capture=capture)
    clone = copy.deepcopy(new)
    notes = clone.get_submodule("0").notes
    assert notes == [1.0, 2.0] and notes is not new.get_submodule("0").notes
    for one, other in zip(new.parameters(), clone.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one is not other
    value = new(X)
    torch.testing.assert_close(clone(X), value)
    train(clone)
    torch.testing.assert_close(new(X), value)
    assert not torch.equal(clone(X), value)


def test_halves_of_a_frozen_tensor_are_frozen(capture: str) -> None:
    model = layer()
    model[0].weight.requires_grad_(False)
    halves = Function(lambda one, other: torch.cat([one, other]), lambda value: torch.split(value, 3))
    new = rewrite(model, spec(halves), capture=capture)
    originals = new.get_submodule("0.parametrizations.weight").originals
    assert [(*original.shape, original.requires_grad) for original in originals] == [(3, 5, False), (2, 5, False)]
    torch.testing.assert_close(get_value(new, "0.weight"), model[0].weight.detach())
