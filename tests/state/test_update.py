"""Arguments of a step changed in place, and rules added to a rewritten model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import RewriterError, bake, plan, rewrite
from rewriter.state import extend, get_value, update
from tests.state.conftest import Net, assert_same, snapshot

X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model


CHANGES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "lora": ({"lora": {"r": 2, "lora_alpha": 2}}, {"lora_alpha": 64}, {"lora": {"r": 2, "lora_alpha": 64}}),
    "lora from defaults": ("lora", {"lora_alpha": 64}, {"lora": {"lora_alpha": 64}}),
    "pissa": (
        {"lora": {"r": 2, "init_lora_weights": "pissa"}},
        {"lora_alpha": 3},
        {"lora": {"r": 2, "init_lora_weights": "pissa", "lora_alpha": 3}},
    ),
    "scale": ({"scale": {"factor": 2.0}}, {"factor": 3}, {"scale": {"factor": 3}}),
    "spectral norm": ("spectral_norm", {"n_power_iterations": 4}, {"spectral_norm": {"n_power_iterations": 4}}),
    "map": ({"orthogonal": {"map": "cayley"}}, {"map": "matrix_exp"}, {"orthogonal": {"map": "matrix_exp"}}),
    "quantizer": ({"fake_quantize": {"bits": 8}}, {"bits": 4}, {"fake_quantize": {"bits": 4}}),
}


@pytest.mark.parametrize(
    ("case", "by"), [*((case, "rule") for case in CHANGES), ("lora", "first.weight"), ("scale", "first.*")]
)
def test_a_changed_argument_equals_a_new_chain_of_the_same_state(
    rewritten: Callable[..., nn.Module], case: str, by: str
) -> None:
    before, arguments, after = CHANGES[case]
    new, other = moved(rewritten(before)), rewritten(after)
    parameters, state = list(new.parameters()), dict(new.state_dict())
    update(new, by, **arguments)
    assert all(one is same for one, same in zip(new.parameters(), parameters, strict=True))
    other.load_state_dict(state)
    torch.testing.assert_close(get_value(new, "first.weight"), get_value(other, "first.weight"))
    torch.testing.assert_close(new(X), other(X))
    new(X).sum().backward()
    other(X).sum().backward()
    for one, same in zip(new.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, same.grad)


@pytest.mark.parametrize("case", CHANGES)
def test_the_changed_chain_is_that_of_the_state_and_of_the_plan(
    rewritten: Callable[..., nn.Module], spec: Callable[..., Any], case: str
) -> None:
    before, arguments, after = CHANGES[case]
    new, untouched = rewritten(before), rewritten(before)
    update(new, "rule", **arguments)
    with pytest.raises(RuntimeError, match=r"first\.weight"):
        untouched.load_state_dict(new.state_dict())
    with pytest.raises(RewriterError, match="already parametrized"):
        rewrite(new, spec("first.weight", before))
    if case not in ("lora from defaults", "scale"):
        return
    rewritten(after).load_state_dict(new.state_dict())
    assert [site.present for site in plan(new, spec("first.weight", after))] == [True]


def test_the_amount_of_pruning_is_raised_over_training(rewritten: Callable[..., nn.Module]) -> None:
    new = rewritten({"l1_unstructured": {"amount": 2}})
    optimizer = torch.optim.SGD(new.parameters(), lr=0.01)
    for amount in (4, 8, 12):
        pruned = get_value(new, "first.weight") == 0
        new(X).square().sum().backward()
        optimizer.step()
        weight = get_value(new, "first.weight")
        update(new, "first.weight", amount=amount)
        now = get_value(new, "first.weight")
        smallest = weight.abs().flatten().argsort()[:amount]
        expected = weight.flatten().clone()
        expected[smallest] = 0
        torch.testing.assert_close(now.flatten(), expected)
        assert (now[pruned] == 0).all()


def test_an_adapter_is_turned_off_and_on(rewritten: Callable[..., nn.Module]) -> None:
    new = moved(rewritten({"lora": {"r": 2, "lora_alpha": 4}}))
    on, base = get_value(new, "first.weight"), bake(new, keep="original").first.weight.detach()
    for alpha, expected in ((0, base), (4, on)):
        update(new, "rule", lora_alpha=alpha)
        torch.testing.assert_close(get_value(new, "first.weight"), expected)


def test_dropout_is_changed_for_the_next_forward(rewritten: Callable[..., nn.Module]) -> None:
    new = rewritten({"weight_dropout": {"p": 0.0}}).train()
    still = new(X)
    update(new, "rule", p=0.9)
    assert not torch.equal(new(X), still)
    update(new, "rule", p=0.0)
    torch.testing.assert_close(new(X), still)


@pytest.mark.parametrize("options", [{}, {"cache": "version"}, {"batch": "always"}, {"memory": "recompute"}])
def test_values_that_were_cached_or_batched_follow(
    capture: str, spec: Callable[..., Any], options: dict[str, Any]
) -> None:
    steps = ["symmetric", {"scale": {"factor": 2.0, "label": "half"}}, {"scale": {"factor": 3.0}}]
    model = Net().double()
    if capture == "module":  # which evaluates each site alone
        options = {**options, "batch": "auto"}
    new = rewrite(model, spec("*.weight", *steps, **options), capture=capture)
    symmetric = {name: get_value(new, name) / 6 for name in ("first.weight", "second.weight")}
    with torch.no_grad():
        new(X)
        update(new, "half", factor=5.0)
        new(X)
        for name, value in symmetric.items():
            torch.testing.assert_close(get_value(new, name), value * 15)
            model.get_parameter(name).copy_(value * 15)
        torch.testing.assert_close(new(X), model(X))


def test_one_site_of_a_rule_is_changed_alone(capture: str, spec: Callable[..., Any]) -> None:
    new = rewrite(Net().double(), spec("*.weight", {"scale": {"factor": 2.0}}), capture=capture)
    before = get_value(new, "second.weight"), get_value(new, "first.weight")
    update(new, "first.weight", factor=4.0)
    torch.testing.assert_close((get_value(new, "second.weight"), get_value(new, "first.weight") / 2), before)
    clone = copy.deepcopy(new)
    torch.testing.assert_close(clone(X), bake(new)(X))


def test_each_chunk_is_changed(capture: str, spec: Callable[..., Any]) -> None:
    rule = spec("first.weight", {"l1_unstructured": {"amount": 1}}, per={"dim": 0, "chunks": 2})
    new = rewrite(Net().double(), rule, capture=capture)
    update(new, "rule", amount=3)
    assert [int((half == 0).sum()) for half in get_value(new, "first.weight").chunk(2)] == [3, 3]


def test_a_class_of_the_users_is_changed_too(capture: str) -> None:
    rule = {"name": "r", "select": "first.weight", "chain": [{"my.Power": {"exponent": 1.0}}]}
    spec = {"reparam": 1, "imports": {"my": __name__}, "rules": [rule]}
    new = rewrite(Net().double(), spec, capture=capture)
    weight = get_value(new, "first.weight")
    update(new, "r", exponent=2.0)
    torch.testing.assert_close(get_value(new, "first.weight"), weight.sign() * weight.abs() ** 2)


class Power(nn.Module):
    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, X: Tensor) -> Tensor:
        return X.sign() * X.abs() ** self.exponent

    def right_inverse(self, value: Tensor) -> Tensor:
        return value.sign() * value.abs() ** (1 / self.exponent)


class Temperature(nn.Module):
    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(start))

    def forward(self, X: Tensor) -> Tensor:
        return X / self.temperature

    def right_inverse(self, value: Tensor) -> Tensor:
        return value * self.temperature


TWICE = [{"scale": {"factor": 2.0}}, {"scale": {"factor": 3.0}}]
REFUSED: dict[str, tuple[list[Any], str, dict[str, Any], str]] = {
    "another rank": ([{"lora": {"r": 2}}], "rule", {"r": 3}, r"lora.*r=3.*lora_A.*\[2, 4\].*\[3, 4\]"),
    "no such argument": ([{"lora": {"r": 2}}], "rule", {"alpha": 3}, r"no step.*alpha.*lora.*lora_alpha"),
    "a wrong type": ([{"lora": {"r": 2}}], "rule", {"lora_alpha": "much"}, "lora_alpha"),
    "a wrong value": ([{"l1_unstructured": {"amount": 2}}], "rule", {"amount": 99}, "amount"),
    "no such site": (["symmetric"], "third.weight", {"a": 1}, "third.weight"),
    "nothing given": (["symmetric"], "rule", {}, "at least one argument"),
    "two steps": (TWICE, "rule", {"factor": 1.0}, r"several steps.*label"),
    "a module": ([Power(1.0)], "rule", {"exponent": 2.0}, r"Power.*from Python.*invalidate"),
    "a start": ([{"t.Temperature": {"start": 2.0}}], "rule", {"start": 3.0}, r"start.*trained"),
    "a budget": ([{"global_l1": {"amount": 3}}], "rule", {"amount": 4}, "global_l1.*all tensors"),
    "masks in a row": (
        [{"l1_unstructured": {"amount": 2, "label": "a"}}, "n_m"],
        "a",
        {"amount": 4},
        "all tensors and masks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_changed_in_place_is_refused_by_name(capture: str, case: str) -> None:
    chain, site, arguments, text = REFUSED[case]
    rule = {"name": "rule", "select": "first.weight", "chain": chain}
    new = rewrite(Net().double(), {"reparam": 1, "imports": {"t": __name__}, "rules": [rule]}, capture=capture)
    before, value = snapshot(new), get_value(new, "first.weight")
    with pytest.raises(RewriterError, match=f"(?s){text}"):
        update(new, site, **arguments)
    assert_same(new, before)
    torch.testing.assert_close(get_value(new, "first.weight"), value)


def test_a_shared_step_is_changed_with_all_its_sites(capture: str, spec: Callable[..., Any]) -> None:
    new = rewrite(Net().double(), spec("*.weight", {"scale": {"factor": 2.0}}, share=True), capture=capture)
    with pytest.raises(RewriterError, match=r"share.*second\.weight"):
        update(new, "first.weight", factor=4.0)
    before = get_value(new, "second.weight")
    update(new, "rule", factor=4.0)
    torch.testing.assert_close(get_value(new, "second.weight"), before * 2)


def test_extend_adds_rules_to_a_rewritten_model(capture: str, spec: Callable[..., Any]) -> None:
    new = rewrite(Net().double(), spec("first.weight", "weight_norm"), capture=capture)
    more = {"reparam": 1, "rules": [{"name": "second", "select": "second.weight", "chain": ["symmetric"]}]}
    first = get_value(new, "first.weight")
    before = snapshot(new)
    both = extend(new, more)
    assert_same(new, before)
    second = get_value(both, "second.weight")
    torch.testing.assert_close(second, second.T)
    torch.testing.assert_close(get_value(both, "first.weight"), first)
    plain = Net().double()
    plain.load_state_dict(bake(both).state_dict())
    torch.testing.assert_close(both(X), plain(X))
    held = list(new.get_submodule("first").parameters())
    again = extend(new, more, inplace=True)
    assert all(one is same for one, same in zip(again.get_submodule("first").parameters(), held, strict=True))


def test_extend_refuses_a_tensor_that_is_computed_already(capture: str, spec: Callable[..., Any]) -> None:
    new = rewrite(Net().double(), spec("first.weight", "weight_norm"), capture=capture)
    more = {"reparam": 1, "rules": [{"name": "other", "select": "first.weight", "chain": ["symmetric"]}]}
    with pytest.raises(RewriterError, match=r"first\.weight.*rule"):
        extend(new, more)
    with pytest.raises(RewriterError, match="rewrite"):
        extend(Net(), more)
    more["rules"][0] |= {"name": "rule", "select": "second.weight"}
    with pytest.raises(RewriterError, match=r"'rule'.*another name"):
        extend(new, more)
