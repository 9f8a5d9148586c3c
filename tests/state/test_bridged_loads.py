"""Checkpoints of plain models and of other tools, loaded into a rewritten model."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from rewriter import RewriterError, absorb, rewrite
from rewriter.state import convert_state_dict, get_value
from tests.state.conftest import Net, Tied, assert_same, snapshot

X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)

CHAINS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "weight_norm": ("weight_norm", lambda w: w),
    "weight_norm, one norm": ({"weight_norm": {"dim": None}}, lambda w: w),
    "low rank, full": ({"low_rank": {"rank": 4}}, lambda w: w),
    "lora": ({"lora": {"r": 2}}, lambda w: w),
    "symmetric": ("symmetric", lambda w: w + w.T),
    "skew": ("skew", lambda w: w - w.T),
    "orthogonal": ("orthogonal", lambda w: torch.linalg.qr(w)[0]),
    "cayley": ({"orthogonal": {"map": "cayley"}}, lambda w: torch.linalg.matrix_exp(w - w.T)),
    "positive": ("positive", lambda w: w.abs() + 0.1),
    "spectral_norm": ("spectral_norm", lambda w: w / torch.linalg.matrix_norm(w, 2)),
}


@pytest.mark.parametrize(("strict", "assign"), [(True, False), (False, True)])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_plain_state_gives_the_plain_values(
    rewritten: Callable[..., nn.Module], chain: str, strict: bool, assign: bool
) -> None:
    step, onto = CHAINS[chain]
    source, new = Net().double(), rewritten(step)
    with torch.no_grad():
        source.first.weight.copy_(onto(source.first.weight))
    state = source.state_dict()
    found = new.eval().load_state_dict(state, strict=strict, assign=assign)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    torch.testing.assert_close(get_value(new, "first.weight"), source.first.weight.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(new(X), source(X), rtol=1e-6, atol=1e-6)
    assert list(state) == list(source.state_dict())


def old(kind: str, layer: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "weight_norm":
            nn.utils.weight_norm(layer)
        elif kind == "one norm":
            nn.utils.weight_norm(layer, dim=None)
        elif kind == "columns":
            nn.utils.weight_norm(layer, dim=1)
        elif kind == "spectral_norm":
            nn.utils.spectral_norm(layer)
        else:
            prune.l1_unstructured(layer, "weight", 5)


OLD: dict[str, Any] = {
    "weight_norm": "weight_norm",
    "one norm": {"weight_norm": {"dim": None}},
    "columns": {"weight_norm": {"dim": 1}},
    "spectral_norm": "spectral_norm",
    "prune": {"l1_unstructured": {"amount": 5}},
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", OLD)
def test_the_state_of_an_old_hook_fills_its_own_chain(
    rewritten: Callable[..., nn.Module], kind: str, strict: bool
) -> None:
    source, new = Net().double(), rewritten(OLD[kind])
    old(kind, source.first)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    source.eval()(X)
    new.eval().load_state_dict(source.state_dict(), strict=strict)
    torch.testing.assert_close(new(X), source(X))
    site = new.get_submodule("first.parametrizations.weight")
    stored = [value for key, value in source.state_dict().items() if re.fullmatch(r"first\.weight_(g|v|orig)", key)]
    stored = stored[:1] if kind == "spectral_norm" else stored
    torch.testing.assert_close(site.originals, stored, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [*OLD, "plain"])
@pytest.mark.parametrize("chain", ["weight_norm", {"low_rank": {"rank": 4}}, {"lora": {"r": 2}}])
def test_the_state_of_an_old_hook_fills_another_chain(
    rewritten: Callable[..., nn.Module], kind: str, chain: Any
) -> None:
    source, new = Net().double(), rewritten({"scale": {"factor": 2.0}}, chain)
    if kind != "plain":
        old(kind, source.first)
        source(X)
    source.eval()(X)
    new.eval().load_state_dict(source.state_dict())
    torch.testing.assert_close(new(X), source(X))


def test_the_dimension_of_a_spectral_norm_is_found_by_its_vectors(rewritten: Callable[..., nn.Module]) -> None:
    source, new = Net().double(), rewritten("identity")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.spectral_norm(source.first, dim=1)
        source(X)
    source.eval()(X)
    new.load_state_dict(source.state_dict())
    torch.testing.assert_close(new(X), source(X))


def test_torchs_own_parametrizations_load_as_they_are(rewritten: Callable[..., nn.Module]) -> None:
    source, new = Net().double(), rewritten("weight_norm")
    parametrizations.weight_norm(source.first)
    with torch.no_grad():
        source.first.parametrizations.weight.original0.mul_(3)
    new.load_state_dict(source.state_dict())
    torch.testing.assert_close(new(X), source(X))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("form", ["plain", "rewritten", "old"])
def test_a_prefix_of_all_keys_is_dropped(rewritten: Callable[..., nn.Module], prefix: str, form: str) -> None:
    new = rewritten("weight_norm")
    source: nn.Module = rewritten("weight_norm") if form == "rewritten" else Net().double()
    if form == "old":
        old("weight_norm", source.get_submodule("first"))
    state = source.state_dict()
    wrapped = {prefix + key: value for key, value in state.items()}
    new.load_state_dict(wrapped)
    torch.testing.assert_close(new(X), source(X))


def test_a_prefix_that_the_model_has_stays(capture: str, spec: Callable[..., Any]) -> None:
    outer = nn.ModuleDict({"model": nn.Linear(3, 3)})
    new = rewrite(copy.deepcopy(outer), spec("model.weight", "weight_norm"), capture="module")
    new.load_state_dict(outer.state_dict())
    torch.testing.assert_close(get_value(new, "model.weight"), outer["model"].weight.detach())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("form", ["plain", "old"])
def test_a_rewritten_model_inside_another_module_takes_them_too(
    rewritten: Callable[..., nn.Module], form: str, strict: bool
) -> None:
    source, inner = Net().double(), rewritten("weight_norm")
    if form == "old":
        old("weight_norm", source.first)
    outer = nn.ModuleDict({"inner": inner})
    found = outer.load_state_dict({f"inner.{key}": value for key, value in source.state_dict().items()}, strict=strict)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    torch.testing.assert_close(inner(X), source(X))


@pytest.mark.parametrize("form", ["plain", "old"])
def test_a_tensor_of_the_root_is_bridged(rewritten: Callable[..., nn.Module], form: str) -> None:
    source, new = Net().double(), rewritten("weight_norm", select="scale")
    state = source.state_dict()
    if form == "old":
        value = state.pop("scale")
        state |= {"scale_g": value.abs() * 2, "scale_v": value}
        source.scale.data.mul_(2)
    new.load_state_dict(state)
    torch.testing.assert_close(new(X), source(X))


def test_tied_tensors_are_bridged_under_each_name(capture: str, spec: Callable[..., Any]) -> None:
    source, new = Tied(), rewrite(Tied(), spec("embed.weight", "weight_norm"), capture=capture)
    new.load_state_dict(source.state_dict())
    x = torch.arange(5)
    torch.testing.assert_close(new(x), source(x))
    for target in (new, nn.Sequential(new)):
        other, prefix = Tied(), "" if target is new else "0."
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            target.load_state_dict({prefix + "head.weight": other.head.weight}, strict=False)
        torch.testing.assert_close(new(x), other(x))


def test_a_joint_site_takes_its_tensors_together(capture: str, spec: Callable[..., Any]) -> None:
    class Swap(nn.Module):
        def forward(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return weight * 2, bias / 2

        def right_inverse(self, value: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return value[0] / 2, value[1] * 2

    source = Net().double()
    new = rewrite(Net().double(), spec("first", Swap(), joint=["weight", "bias"]), capture=capture)
    new.load_state_dict(source.state_dict())
    torch.testing.assert_close(new(X), source(X))
    lacking = {key: value for key, value in source.state_dict().items() if key != "first.bias"}
    with pytest.raises(RuntimeError, match=r"first\.bias"):
        new.load_state_dict(lacking)


def test_chunks_are_bridged(capture: str, spec: Callable[..., Any]) -> None:
    rule = spec("0.weight", "orthogonal", per={"dim": 0, "chunks": 4})
    source = nn.Sequential(nn.Linear(3, 12)).double()
    new = rewrite(copy.deepcopy(source), rule, capture=capture)
    gates = [torch.linalg.qr(torch.randn(3, 3).double())[0] for _ in range(4)]
    with torch.no_grad():
        source[0].weight.copy_(torch.cat(gates))
    new.load_state_dict(source.state_dict())
    x = torch.randn(2, 3).double()
    torch.testing.assert_close(new(x), source(x))


@pytest.mark.parametrize("fits", [True, False])
def test_a_tensor_computed_from_another_is_compared_with_it(capture: str, spec: Callable[..., Any], fits: bool) -> None:
    rule = spec("second.weight", "transpose", **{"from": "first.weight"})
    source, new = Net().double(), rewrite(Net().double(), rule, capture=capture)
    with torch.no_grad():
        source.second.weight.copy_(source.first.weight.T if fits else source.first.weight)
    before = snapshot(new)
    if fits:
        new.load_state_dict(source.state_dict())
        torch.testing.assert_close(new(X), source(X))
    else:
        with pytest.raises(RewriterError, match=r"second\.weight.*transpose"):
            new.load_state_dict(source.state_dict())
        assert_same(new, before)


@pytest.mark.parametrize("nested", [False, True])
def test_a_computed_tensor_that_is_not_in_the_state_is_named(rewritten: Callable[..., nn.Module], nested: bool) -> None:
    new = rewritten("weight_norm")
    before = get_value(new, "first.weight")
    target: nn.Module = nn.ModuleDict({"inner": new}) if nested else new
    state = {("inner." if nested else "") + "second.bias": torch.ones(4)}
    with pytest.warns(UserWarning, match=r"first\.weight.*original0, original1"):
        target.load_state_dict(state, strict=False)
    torch.testing.assert_close(get_value(new, "first.weight"), before)
    assert new.get_submodule("second").bias.sum() == 4


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("theirs", ["spectral_norm", "orthogonal"])
def test_a_partial_load_warns_of_other_steps(rewritten: Callable[..., nn.Module], theirs: str, nested: bool) -> None:
    other = "orthogonal" if theirs == "spectral_norm" else "spectral_norm"
    source, new = Net().double(), rewritten(other)
    getattr(parametrizations, theirs)(source.first)
    target: nn.Module = nn.ModuleDict({"inner": new}) if nested else new
    state = {("inner." if nested else "") + key: value for key, value in source.state_dict().items()}
    shown = {"spectral_norm": r"has 0\._u, 0\._v; lacks 0\.base", "orthogonal": r"has 0\.base"}[theirs]
    with pytest.warns(UserWarning, match=rf"differ: .*first\.weight \({shown}\).*other chains"):
        target.load_state_dict(state, strict=False)
    if not nested:
        before = snapshot(new)
        with pytest.raises(RewriterError, match=rf"(?s)fit:\s+first\.weight \({shown}\).*absorb.*\n.*Unexpected key"):
            target.load_state_dict(state)
        assert_same(new, before)
        absorbed = convert_state_dict(state, absorb(source), to="plain")
        plain = Net().double()
        plain.load_state_dict(absorbed)
        torch.testing.assert_close(plain(X), source.eval()(X))


@pytest.mark.parametrize("nested", [False, True])
def test_an_adapter_file_lacks_the_frozen_originals_without_a_warning(nested: bool) -> None:
    rule = {"name": "adapters", "select": "*.weight", "chain": [{"lora": {"r": 2}}]}
    source, new = (rewrite(Net(), {"reparam": 1, "trainable": "rewritten", "rules": [rule]}) for _ in range(2))
    prefix = "inner." if nested else ""
    state = {prefix + name: value.detach() + 1 for name, value in source.named_parameters() if value.requires_grad}
    target: nn.Module = nn.ModuleDict({"inner": new}) if nested else new
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.load_state_dict(state, strict=False)
    part = "first.parametrizations.weight.0.lora_B"
    torch.testing.assert_close(new.get_parameter(part), source.get_parameter(part) + 1)


def test_a_single_precision_state_fills_a_double_precision_model(rewritten: Callable[..., nn.Module]) -> None:
    source, new = Net(), rewritten("weight_norm")
    new.load_state_dict(source.state_dict())
    assert get_value(new, "first.weight").dtype == torch.float64
    torch.testing.assert_close(new(X), source.double()(X), rtol=1e-6, atol=1e-6)
    other = rewritten("weight_norm")
    other.load_state_dict(source.float().state_dict(), assign=True)
    assert get_value(other, "first.weight").dtype == torch.float32
    torch.testing.assert_close(other(X.float()), source(X.float()))


def test_a_model_without_values_takes_a_plain_state(capture: str, spec: Callable[..., Any]) -> None:
    source = Net().double()
    with torch.device("meta"):
        new = rewrite(Net().double(), spec("first.weight", "weight_norm"), capture=capture)
    new.load_state_dict(source.state_dict(), assign=True)
    torch.testing.assert_close(new(X), source(X))


def test_a_bridged_model_trains(rewritten: Callable[..., nn.Module]) -> None:
    source, new = Net().double(), rewritten("weight_norm")
    new.load_state_dict(source.state_dict())
    new(X).sum().backward()
    source(X).sum().backward()
    v = new.get_submodule("first").parametrizations.weight.original1
    gradient, weight = source.first.weight.grad, source.first.weight.detach()
    assert gradient is not None
    unit = weight / weight.norm(dim=1, keepdim=True)
    expected = gradient - (gradient * unit).sum(1, keepdim=True) * unit  # g equals the norm of v here
    torch.testing.assert_close(v.grad, expected)
