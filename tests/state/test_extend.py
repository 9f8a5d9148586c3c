"""`extend` appends steps to chains of a rewritten model: value, parameters and optimizer stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from rewriter import PlanError, RewriterError, bake, plan, rewrite
from rewriter.state import check_optimizer, extend, freeze, get_value, set_value, unfreeze, update
from tests.state.conftest import Net, assert_same, snapshot

X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
Spec = Callable[..., dict[str, Any]]
KEEPING: dict[str, tuple[Any, Any]] = {
    "an adapter on a norm": ("weight_norm", {"lora": {"r": 2}}),
    "a norm on a symmetric matrix": ("symmetric", "weight_norm"),
    "a scale on an adapter": ({"lora": {"r": 2}}, {"scale": {"factor": 2.0}}),
    "a scale on a norm": ("weight_norm", {"scale": {"factor": 0.5}}),
    "a dropout on an orthogonal matrix": ({"orthogonal": {"map": "cayley"}}, {"weight_dropout": {"p": 0.5}}),
    "a norm on a low rank": ({"low_rank": {"rank": 4}}, "weight_norm"),
}


class Exp(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.exp()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", KEEPING)
def test_the_value_stays(capture: str, spec: Spec, case: str, inplace: bool) -> None:
    first, second = KEEPING[case]
    new = rewrite(Net().double(), spec("first.weight", first), capture=capture).eval()
    value, before, held = get_value(new, "first.weight"), snapshot(new), dict(new.named_parameters())
    longer = extend(new, spec("first.weight", second), inplace=inplace)
    torch.testing.assert_close(get_value(longer, "first.weight"), value, rtol=1e-10, atol=1e-10)
    if inplace:
        assert {id(parameter) for parameter in held.values()} <= {id(one) for one in longer.parameters()}
    else:
        assert_same(new, before)
    plain = Net().double()
    plain.load_state_dict(bake(longer).state_dict())
    torch.testing.assert_close(longer(X), plain(X))


@pytest.mark.parametrize("case", KEEPING)
def test_it_is_the_model_that_one_longer_chain_gives(capture: str, spec: Spec, case: str) -> None:
    first, second = KEEPING[case]
    model = Net().double()
    longer = extend(rewrite(model, spec("first.weight", first), capture=capture), spec("first.weight", second))
    both = spec("first.weight", first, second)
    at_once = rewrite(model, both, capture=capture)
    assert list(longer.state_dict()) == list(at_once.state_dict())
    flags = [{name: one.requires_grad for name, one in made.named_parameters()} for made in (longer, at_once)]
    assert flags[0] == flags[1]
    assert [site.spec for site in plan(longer, both).sites] == [site.spec for site in plan(at_once, both).sites]
    at_once.load_state_dict(longer.state_dict())
    for made in (longer, at_once):
        made.eval()(X).square().sum().backward()
    for one, other in zip(trained(longer), trained(at_once), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_gradients_are_those_of_the_chain_by_hand(capture: str, spec: Spec) -> None:
    """value = (W0 + BA) * 3, with a mask put on later."""
    new = rewrite(Net().double(), spec("first.weight", {"lora": {"r": 2}}), capture=capture)
    site = new.get_submodule("first.parametrizations.weight")
    A, B = site.get_parameter("0.lora_A"), site.get_parameter("0.lora_B")
    B.data.normal_()
    longer = extend(
        new, spec("first.weight", {"scale": {"factor": 3.0}}, {"l1_unstructured": {"amount": 5}}), inplace=True
    )
    mask = get_value(longer, "first.weight") != 0
    a, b = (one.detach().clone().requires_grad_() for one in (A, B))
    scaling = site.get_submodule("0").scaling
    weight = (site.original + scaling * b @ a) * 3 * mask
    torch.testing.assert_close(get_value(longer, "first.weight"), weight.detach())
    plain = Net().double()
    plain.load_state_dict(bake(longer).state_dict())
    longer(X).sum().backward()
    out = torch.nn.functional.linear(X, weight, plain.first.bias)
    (plain.second(torch.tanh(out)) * plain.scale).sum().backward()
    torch.testing.assert_close([A.grad, B.grad], [a.grad, b.grad], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("optimize", [torch.optim.SGD, torch.optim.AdamW])
def test_the_optimizer_goes_on(capture: str, spec: Spec, optimize: Any) -> None:
    options = {"momentum": 0.9} if optimize is torch.optim.SGD else {}
    new = rewrite(Net().double(), spec("first.weight", {"orthogonal": {"map": "cayley"}}), capture=capture)
    optimizer = optimize(new.parameters(), lr=0.01, **options)
    for _ in range(2):
        optimizer.zero_grad()
        new(X).square().sum().backward()
        optimizer.step()
    stored = new.get_parameter("first.parametrizations.weight.original")
    key = "momentum_buffer" if options else "exp_avg"
    moment = optimizer.state[stored][key].clone()
    longer = extend(new, spec("first.weight", "weight_norm"), optimizer=optimizer)
    assert check_optimizer(optimizer, longer) == []
    site = longer.get_submodule("first.parametrizations.weight")
    torch.testing.assert_close(optimizer.state[site.original0][key], moment)
    assert site.original1 not in optimizer.state
    optimizer.zero_grad()
    longer(X).square().sum().backward()
    optimizer.step()
    assert all(parameter in optimizer.state for parameter in trained(longer))


def test_an_optimizer_that_lacks_the_new_parameters_is_warned_of(capture: str, spec: Spec) -> None:
    new = rewrite(Net().double(), spec("first.weight", {"orthogonal": {"map": "cayley"}}), capture=capture)
    optimizer = torch.optim.SGD(new.parameters(), lr=0.01)
    new(X).sum().backward()
    optimizer.step()
    longer = extend(new, spec("first.weight", "weight_norm"), inplace=True)
    longer(X).sum().backward()
    with pytest.warns(UserWarning, match=r"first\.parametrizations\.weight\.original1"):
        optimizer.step()


def test_pruning_again_prunes_what_is_left_as_torch_does(capture: str, spec: Spec) -> None:
    step = {"l1_unstructured": {"amount": 4}}
    model = Net().double()
    reference = copy.deepcopy(model.first)
    for _ in range(2):
        prune.l1_unstructured(reference, "weight", 4)
    new = extend(rewrite(model, spec("first.weight", step), capture=capture), spec("first.weight", step))
    torch.testing.assert_close(get_value(new, "first.weight"), reference.weight.detach())
    for per in ({"dim": 0, "chunks": 2}, {"dim": 0, "chunks": 2, "only": [1]}):
        chunked = rewrite(model, spec("second.weight", {"l1_unstructured": {"amount": 2}}, per=per), capture=capture)
        again = extend(chunked, spec("second.weight", {"l1_unstructured": {"amount": 2}}))
        zeros = [int((chunk == 0).sum()) for chunk in get_value(again, "second.weight").chunk(2)]
        assert zeros == ([4, 4] if "only" not in per else [0, 4])


def test_a_labelled_step_comes_and_goes(capture: str, spec: Spec) -> None:
    new = rewrite(Net().double(), spec("*.weight", "weight_norm"), capture=capture)
    adapter = {"lora": {"r": 2, "label": "adapter"}}
    longer = extend(new, spec("second.weight", adapter))
    assert [len(plan_site.chain) for plan_site in plan_of(longer)] == [1, 2]
    longer.get_parameter("second.parametrizations.weight.1.lora_B").data.normal_()
    again = bake(longer, only=["adapter"])
    torch.testing.assert_close(get_value(again, "second.weight"), get_value(longer, "second.weight"))
    torch.testing.assert_close(again(X), longer(X))
    assert all(parameter.requires_grad for parameter in again.parameters())
    update(longer, "adapter", lora_alpha=16.0)
    set_value(longer, "second.weight", torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(get_value(longer, "second.weight"), torch.eye(4, dtype=torch.float64))


def plan_of(model: nn.Module) -> list[Any]:
    from rewriter.planning import survey

    return [entry.site.spec for entry in survey(model) if entry.site is not None]


def test_steps_and_rules_come_together(capture: str, spec: Spec) -> None:
    new = rewrite(Net().double(), spec("first.weight", "weight_norm"), capture=capture)
    more = spec("first.weight", {"lora": {"r": 2}})
    more["rules"] += [{"name": "other", "select": "second.weight", "chain": [{"lora": {"r": 1}}]}]
    before = snapshot(new)
    both = extend(new, {**more, "trainable": "rewritten"})
    assert_same(new, before)
    assert sorted(name.rpartition(".")[2] for name, one in both.named_parameters() if one.requires_grad) == [
        *("lora_A", "lora_A", "lora_B", "lora_B")
    ]
    torch.testing.assert_close(both(X), new(X))
    assert all(parameter.requires_grad for parameter in bake(both).parameters())


def test_raw_steps_change_the_value_and_nothing_else(capture: str, spec: Spec) -> None:
    new = rewrite(Net().double(), spec("first.weight", {"orthogonal": {"map": "cayley"}}), capture=capture)
    before, value = snapshot(new), get_value(new, "first.weight")
    longer = extend(new, spec("first.weight", {"scale": {"factor": 2.0}}, init="raw"), inplace=True)
    torch.testing.assert_close(get_value(longer, "first.weight"), 2 * value)
    torch.testing.assert_close(snapshot(longer), before, rtol=0, atol=0)


def test_layouts_and_modules_given_from_python_stay(capture: str, spec: Spec) -> None:
    model = Net().double()
    per = {"dim": 0, "chunks": 2}
    new = rewrite(model, spec("first.weight", "weight_norm", per=per, cache="version"), capture=capture)
    longer = extend(new, spec("first.weight", Exp(), init="raw"))
    torch.testing.assert_close(get_value(longer, "first.weight"), model.first.weight.detach().exp())
    at_once = rewrite(model, spec("first.weight", "weight_norm", Exp(), per=per, cache="version"))
    assert [one.options for one in plan_of(longer)] == [one.options for one in plan_of(at_once)]
    torch.testing.assert_close(bake(longer)(X), longer(X))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"chain": [{"scale": {"factor": 2.0}}]}, r"cannot give what the new steps start from.*init: raw"),
        (
            {"select": "*.weight", "chain": ["symmetric"]},
            r"'rule' already, and second\.weight is none of .* another name",
        ),
        ({"select": "absent", "chain": ["symmetric"]}, "absent"),
        ({"chain": ["symmetric"], "cache": "never"}, "`cache`"),
        ({"chain": ["symmetric"], "per": {"dim": 0, "chunks": 2}}, "`per`"),
        ({"chain": ["symmetric"], "trainable": False}, "`trainable`"),
        ({"chain": [{"affine": {"inputs": ["second.weight"]}}]}, "take no `inputs`"),
        ({"chain": ["symmetric"], "init": "sample"}, "`keep` or `raw`"),
        ({"chain": [{"scale": {"factor": 1.0, "label": "one"}}]}, "label 'one' already"),
        ({"chain": [{"low_rank": {"rank": 9}}]}, "low_rank"),
    ],
)
def test_what_cannot_be_appended_is_refused(capture: str, spec: Spec, rule: dict[str, Any], message: str) -> None:
    chain = [{"orthogonal": {"map": "cayley", "label": "one"}}]
    new = rewrite(Net().double(), spec("first.weight", *chain), capture=capture)
    before = snapshot(new)
    with pytest.raises(PlanError, match=f"(?s){message}"):
        extend(new, {"reparam": 1, "rules": [{"name": "rule", "select": "first.weight", **rule}]}, inplace=True)
    assert_same(new, before)


def test_sites_that_cannot_grow_are_refused(capture: str, spec: Spec) -> None:
    frozen = rewrite(Net().double(), spec("first.weight", "weight_norm"), capture=capture)
    freeze(frozen)
    with pytest.raises(RewriterError, match="unfreeze it first"):
        extend(frozen, spec("first.weight", "symmetric"))
    unfreeze(frozen)
    extend(frozen, spec("first.weight", "symmetric"))
    shared = rewrite(Net().double(), spec("*.weight", {"scale": {"factor": 2.0}}, share=True), capture=capture)
    with pytest.raises(RewriterError, match="share their steps"):
        extend(shared, spec("*.weight", "symmetric"))
