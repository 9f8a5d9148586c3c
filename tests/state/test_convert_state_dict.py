"""State dicts converted between the plain, the rewritten and torch's form."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rewriter import RewriterError, bake, plan, rewrite
from rewriter.state import convert_state_dict, get_value
from tests.state.conftest import Net, Tied, assert_same, snapshot

X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)

CHAINS: list[list[Any]] = [
    ["weight_norm"],
    ["symmetric"],
    ["spectral_norm"],
    [{"orthogonal": {"map": "cayley"}}],
    [{"low_rank": {"rank": 2}}],
    [{"lora": {"r": 2}}],
    [{"l1_unstructured": {"amount": 3}}],
    [{"weight_dropout": {"p": 0.5}}],
    [{"scale": {"factor": 2.0}}, "weight_norm"],
]


def moved(model: nn.Module) -> nn.Module:
    """Change every parameter, and run once in train mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    model(X)
    return model


@pytest.mark.parametrize("chain", CHAINS)
def test_a_baked_model_takes_a_rewritten_checkpoint(rewritten: Callable[..., nn.Module], chain: list[Any]) -> None:
    new, donor = rewritten(*chain), moved(rewritten(*chain))
    before = snapshot(new)
    state = donor.state_dict()
    given = {key: value.clone() for key, value in state.items()}
    converted = convert_state_dict(state, new, to="plain")
    plain = Net().double()
    plain.load_state_dict(converted)
    assert list(converted) == list(plain.state_dict())
    torch.testing.assert_close(plain(X), bake(donor)(X))
    torch.testing.assert_close(converted["first.weight"], get_value(donor, "first.weight"))
    assert_same(new, before)
    torch.testing.assert_close(dict(state), given, rtol=0, atol=0)


@pytest.mark.parametrize("chain", [chain for chain in CHAINS if chain != ["spectral_norm"]])
def test_a_rewritten_model_takes_it_back(rewritten: Callable[..., nn.Module], chain: list[Any]) -> None:
    new = moved(rewritten(*chain))
    plain = convert_state_dict(new.state_dict(), new, to="plain")
    again = convert_state_dict(plain, new, to="rewritten")
    assert list(again) == list(new.state_dict())
    other = copy.deepcopy(new)
    other.load_state_dict(again)
    torch.testing.assert_close(other.eval()(X), new.eval()(X))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("to", ["plain", "rewritten"])
def test_an_old_form_is_converted(rewritten: Callable[..., nn.Module], to: Any, prefix: str) -> None:
    source, new = Net().double(), rewritten("weight_norm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(source.first)
    source.first.weight_g.data.mul_(3)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    target: nn.Module = Net().double() if to == "plain" else new
    target.load_state_dict(convert_state_dict(state, new, to=to))
    torch.testing.assert_close(target(X), source(X))


def test_the_form_of_torch_has_no_chains_in_it(rewritten: Callable[..., nn.Module]) -> None:
    new = rewritten({"lora": {"r": 2, "lora_alpha": 2}})
    other = rewritten({"lora": {"r": 2, "lora_alpha": 64}})
    for source in (new, bake(new)):
        state = convert_state_dict(source.state_dict(), new, to="torch")
        assert list(state) == list(new.state_dict())
        other.load_state_dict(state)
    with pytest.raises(RewriterError, match="64"):
        other.load_state_dict(convert_state_dict(bake(new).state_dict(), new, to="rewritten"))


def test_a_chain_reads_the_tensors_of_the_state(capture: str, spec: Callable[..., Any]) -> None:
    rules = spec("first.weight", "weight_norm")
    rules["rules"] += [{"name": "tied", "select": "second.weight", "from": "first.weight", "chain": ["transpose"]}]
    new, donor = (rewrite(Net().double(), rules, capture=capture) for _ in range(2))
    plain = convert_state_dict(donor.state_dict(), new, to="plain")
    torch.testing.assert_close(plain["second.weight"], plain["first.weight"].T)
    torch.testing.assert_close(plain["first.weight"], get_value(donor, "first.weight"))
    back = convert_state_dict(plain, new, to="rewritten")
    assert list(back) == list(donor.state_dict())
    new.load_state_dict(back)
    torch.testing.assert_close(new(X), donor(X))


def test_tied_names_are_all_there(capture: str, spec: Callable[..., Any]) -> None:
    new = rewrite(Tied(), spec("embed.weight", "weight_norm"), capture=capture)
    plain = convert_state_dict(new.state_dict(), new, to="plain")
    assert list(plain) == list(Tied().state_dict())
    torch.testing.assert_close(plain["head.weight"], plain["embed.weight"], rtol=0, atol=0)


def test_a_model_around_rewritten_ones_serves_as_well(rewritten: Callable[..., nn.Module]) -> None:
    outer = nn.ModuleDict({"a": rewritten("weight_norm"), "b": rewritten("symmetric")})
    plain = convert_state_dict(outer.state_dict(), outer, to="plain")
    assert list(plain) == list(nn.ModuleDict({"a": Net(), "b": Net()}).state_dict())


def test_the_precision_of_the_state_stays(rewritten: Callable[..., nn.Module]) -> None:
    new = rewritten("weight_norm")
    half = copy.deepcopy(new).bfloat16()
    plain = convert_state_dict(half.state_dict(), new, to="plain")
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}
    torch.testing.assert_close(plain["first.weight"], get_value(half, "first.weight"))


@pytest.mark.parametrize(
    ("state", "model", "to", "text"),
    [
        (lambda s: s, lambda m: m, "onnx", "'plain', 'rewritten' or 'torch'"),
        (lambda s: [s], lambda m: m, "plain", "state dict first, not a list"),
        (lambda s: s, lambda m: Net(), "plain", "give convert_state_dict the rewritten model"),
        (lambda s: s, lambda m: "model", "plain", "convert_state_dict"),
        (
            lambda s: {k: v for k, v in s.items() if "original1" not in k},
            lambda m: m,
            "plain",
            "first.weight.*original1",
        ),
    ],
)
def test_wrong_calls_are_refused(
    rewritten: Callable[..., nn.Module], state: Any, model: Any, to: Any, text: str
) -> None:
    new = rewritten("weight_norm")
    with pytest.raises(RewriterError, match=f"(?s){text}"):
        convert_state_dict(state(new.state_dict()), model(new), to)


def test_a_plan_serves_as_its_model(rewritten: Callable[..., nn.Module], spec: Callable[..., Any]) -> None:
    donor, model = moved(rewritten("weight_norm")), Net().double()
    before = snapshot(model)
    given = plan(model, spec("first.weight", "weight_norm"))
    plain = convert_state_dict(donor.state_dict(), given, to="plain")
    torch.testing.assert_close(plain["first.weight"], get_value(donor, "first.weight"))
    assert list(convert_state_dict(plain, given, to="torch")) == list(donor.state_dict())
    assert_same(model, before)
