"""Neighbouring steps that merge are one call, and those that cancel none; the state dict keeps what was written."""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter import PlanError, RewriterError, bake, evaluate_once, plan, register, rewrite
from rewriter.io import load_model, save_model
from rewriter.passes import PassError, print_graph
from rewriter.sites import Site
from rewriter.state import freeze, unfreeze
from tests.rules import one_rule

MASK, OTHER = {"l1_unstructured": {"amount": 5}}, {"ln_structured": {"amount": 1, "dim": 0}}


spec = functools.partial(one_rule, select="0.weight")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()


def site_of(model: nn.Module) -> Site:
    site = model.get_submodule("0.parametrizations.weight")
    assert isinstance(site, Site)
    return site


def multiplications(model: nn.Module) -> int:
    """How many multiplications a forward makes."""

    class Counting(torch.overrides.TorchFunctionMode):
        count = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func in (Tensor.mul, Tensor.__mul__, torch.mul)
            return func(*args, **(kwargs or {}))

    model(X)  # merges, which is done once
    with Counting() as counting:
        model(X)
    return counting.count


X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)


@pytest.mark.parametrize(
    ("chain", "calls", "groups"),
    [
        ([MASK, OTHER], 1, ((0, 2),)),
        ([MASK, OTHER, MASK], 1, ((0, 3),)),
        ([{"scale": {"factor": 2.0}}, {"scale": {"factor": 3.0}}], 1, ((0, 2),)),
        ([{"scale": {"factor": 4.0}}, {"scale": {"factor": 0.25}}], 0, ((0, 2),)),
        ([{"scale": {"factor": 2.0}}, "transpose", "transpose", {"scale": {"factor": 3.0}}], 1, ((0, 4),)),
        (["transpose", "transpose", {"scale": {"factor": 3.0}}, {"scale": {"factor": 2.0}}], 1, ((0, 4),)),
        ([MASK, {"scale": {"factor": 3.0}}, OTHER], 3, ()),
        (["identity", MASK, OTHER], 1, ((0, 3),)),
        (["skew", MASK, OTHER], 1, ((1, 3),)),
    ],
    ids=str,
)
def test_neighbours_are_evaluated_as_one(chain: list[Any], calls: int, groups: Any, capture: str) -> None:
    model = net()
    short = rewrite(model, spec(*chain), capture=capture)
    written = rewrite(model, spec(*chain), capture=capture, without=["fuse"])
    assert site_of(short).fused == groups
    assert site_of(written).fused == ()
    assert multiplications(short) == calls
    assert short.state_dict().keys() == written.state_dict().keys()
    torch.testing.assert_close(short(X), written(X))
    for one in (short, written):
        one(X).sum().backward()
    for mine, other in zip(short.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(bake(short)(X), short(X))


def test_plan_and_graph_say_which_steps_are_one() -> None:
    found = plan(net(), spec(MASK, OTHER, "skew"))
    assert found.sites[0].fused == ((1, 2),)
    assert found.to_dict()["sites"][0]["fused"] == [[1, 2]]
    assert "(1–2 as one)" in str(found)
    assert "evaluate 0.weight [steps 1–2 as one]: original >> l1_unstructured" in print_graph(
        rewrite(net(), spec(MASK, OTHER, "skew"))  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "chain",
    [
        [{"weight_dropout": {"p": 0.5}}, {"weight_dropout": {"p": 0.5}}],
        ["spectral_norm", "spectral_norm"],
        [{"cast": {"dtype": "float16"}}, {"cast": {"dtype": "float64"}}],
        ["identity", "spectral_norm"],
        [{"affine": {"inputs": ["0.bias"]}}, {"scale": {"factor": 2.0}}],
    ],
    ids=str,
)
def test_what_draws_advances_trains_or_loses_something_is_left_alone(chain: list[Any]) -> None:
    assert site_of(rewrite(net(), spec(*chain))).fused == ()


def test_a_trained_factor_is_left_alone() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, X: Tensor) -> Tensor:
            return X * self.gain

        def fuse(self, next: nn.Module) -> nn.Module | None:
            raise AssertionError("a parameter would be merged into a constant")

    assert site_of(rewrite(net(), spec(Gain(), Gain()))).fused == ()


def test_a_cast_to_a_wider_dtype_and_back_is_not_evaluated() -> None:
    model = net().float()
    new = rewrite(model, spec({"cast": {"dtype": "float64"}}, {"cast": {"dtype": "float32"}}))
    assert site_of(new).fused == ((0, 2),)
    assert new.get_submodule("0").weight is not None
    torch.testing.assert_close(new(X.float()), model(X.float()))


def test_another_mask_is_seen_however_it_comes() -> None:
    new = rewrite(net(), spec(MASK, OTHER))
    written = rewrite(net(), spec(MASK, OTHER), without=["fuse"])
    new(X)
    state = {name: ~tensor if tensor.dtype == torch.bool else tensor for name, tensor in new.state_dict().items()}
    new.load_state_dict(state)
    written.load_state_dict(state)
    torch.testing.assert_close(new(X), written(X))
    second = getattr(site_of(new), "1")
    with torch.no_grad():
        second.mask.fill_(True)
        getattr(site_of(written), "1").mask.fill_(True)
    torch.testing.assert_close(new(X), written(X))
    swapped = {"0.parametrizations.weight.1.mask": torch.zeros(4, 4, dtype=torch.bool)}
    given = torch.func.functional_call(new, swapped, (X,))
    torch.testing.assert_close(given, torch.tanh(new.get_submodule("0").bias).expand(2, 4))
    torch.testing.assert_close(new(X), written(X))


def test_another_factor_is_seen() -> None:
    new = rewrite(net(), spec({"scale": {"factor": 2.0}}, {"scale": {"factor": 3.0}}, init="raw"))
    before = new.get_submodule("0").weight.detach()
    getattr(site_of(new), "1").factor = 6.0
    torch.testing.assert_close(new.get_submodule("0").weight, 2 * before)
    getattr(site_of(new), "1").factor = 0.5
    torch.testing.assert_close(new.get_submodule("0").weight, before / 6)


def test_copies_conversions_and_files_go_on_alike() -> None:
    new = rewrite(net(), spec(MASK, OTHER))
    expected = new(X)
    file = io.BytesIO()
    torch.save(copy.deepcopy(new), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    torch.testing.assert_close(again(X), expected)
    assert multiplications(again) == 1
    torch.testing.assert_close(copy.deepcopy(new).float()(X.float()), expected.float())


@pytest.mark.parametrize("cache", ["forward", "version", "never"])
def test_whatever_caches_or_changes_a_site_sees_the_same_value(cache: str, capture: str, tmp_path: Path) -> None:
    chain = [MASK, {"l1_unstructured": {"amount": 5, "label": "second"}}, {"scale": {"factor": 2.0, "label": "twice"}}]
    chain += [{"scale": {"factor": 0.25}}]
    model = net()
    new = rewrite(model, spec(*chain, cache=cache), capture=capture)
    written = rewrite(model, spec(*chain, cache=cache), capture=capture, without=["fuse"])
    assert site_of(new).fused == ((0, 2), (2, 4))
    expected = written(X)
    with torch.inference_mode():
        torch.testing.assert_close(new(X), expected)
    with evaluate_once(new):
        new(X).sum().backward()
        new(X).sum().backward()
    (2 * expected.sum()).backward()
    torch.testing.assert_close(site_of(new).original.grad, site_of(written).original.grad)
    freeze(new)
    torch.testing.assert_close(new(X), expected)
    unfreeze(new)
    for label in ("second", "twice"):
        torch.testing.assert_close(bake(new, only=[label])(X), expected)
    save_model(new, tmp_path / "new.pt")
    again = load_model(tmp_path / "new.pt")
    assert isinstance(again, nn.Module)
    assert site_of(again).fused == site_of(new).fused
    torch.testing.assert_close(again(X), expected)


def test_exported_scripted_and_transformed_the_chain_is_as_written() -> None:
    new = rewrite(net(), spec(MASK, {"scale": {"factor": 2.0}}, {"scale": {"factor": 3.0}}, MASK)).eval()
    expected = new(X)
    exported = torch.export.export(new, (X,))
    torch.testing.assert_close(exported.module()(X), expected)
    torch.testing.assert_close(torch.jit.script(new)(X), expected)
    torch.testing.assert_close(torch.func.vmap(new)(X), expected)
    torch.testing.assert_close(torch.jit.trace(new, (X,))(X), expected)


def test_the_chunks_of_a_tensor_are_merged_each_on_its_own() -> None:
    options = {"per": {"dim": 0, "chunks": 2}}
    amount = {"l1_unstructured": {"amount": 2}}
    new = rewrite(net(), spec(amount, OTHER, **options))
    written = rewrite(net(), spec(amount, OTHER, **options), without=["fuse"])
    written.load_state_dict(new.state_dict())
    assert site_of(new).fused == ((0, 2),)
    assert (multiplications(new), multiplications(written)) == (2, 4)
    torch.testing.assert_close(new(X), written(X))
    for model in (new, written):
        getattr(site_of(model), "1").get_submodule("1").mask.fill_(False)
    torch.testing.assert_close(new(X), written(X))
    assert not new.get_submodule("0").weight[2:].any()
    torch.testing.assert_close(torch.jit.script(new)(X), new(X))


def test_steps_before_a_trained_adapter_are_merged_and_cached() -> None:
    new = rewrite(net(), spec(MASK, OTHER, {"lora": {"r": 2}}))
    new(X)
    site = site_of(new)
    assert (site.hoisted, site.fused) == (2, ((0, 2),))
    with torch.no_grad():
        getattr(site, "1").mask.zero_()
    adapter = getattr(site, "2")
    torch.testing.assert_close(new.get_submodule("0").weight, 4.0 * adapter.lora_B @ adapter.lora_A)


def test_a_step_that_says_what_is_not_so_is_found() -> None:
    @register("pretends_to_cancel")
    class Pretends(nn.Module):
        def forward(self, X: Tensor) -> Tensor:
            return X + 1

        def cancels(self, next: nn.Module) -> bool:
            return True

    with pytest.raises(PlanError, match=r"rules\[0\].chain: 0\.weight: steps 1–2 of .* give another value as one"):
        rewrite(net(), spec("pretends_to_cancel", "pretends_to_cancel"))
    unfused = rewrite(net(), spec("pretends_to_cancel", "pretends_to_cancel"), without=["fuse"])
    other = {"reparam": 1, "rules": [{"name": "bias", "select": "0.bias", "chain": [{"scale": {"factor": 2.0}}]}]}
    with pytest.raises(PassError, match=r"pass fuse .*0\.weight: steps 1–2 of .* give another value as one"):
        rewrite(unfused, other)
    with pytest.raises(RewriterError, match="without: fues is none of"):
        rewrite(net(), spec(MASK), without=["fues"])


STEPS = st.sampled_from(
    [
        MASK,
        OTHER,
        {"scale": {"factor": 2.0}},
        {"scale": {"factor": 0.5}},
        {"shift": {"offset": 1.0}},
        {"shift": {"offset": -1.0}},
        "transpose",
        "identity",
        "detach",
        "symmetric",
        "spectral_norm",
        {"lora": {"r": 2}},
        {"orthogonal": {"map": "cayley"}},
    ]
)


@given(st.lists(STEPS, min_size=1, max_size=6), st.booleans())
def test_every_chain_has_the_same_value_and_gradient(chain: list[Any], training: bool) -> None:
    torch.manual_seed(0)
    model = net().train(training)
    short = rewrite(model, spec(*chain, init="raw"))
    written = rewrite(model, spec(*chain, init="raw"), without=["fuse"])
    written.load_state_dict(short.state_dict())  # a spectral norm starts from random vectors
    for _ in range(2):
        one, other = short(X), written(X)
        torch.testing.assert_close(one, other)
    for each in (short, written):
        each.zero_grad()
        each(X).sum().backward()
    for mine, theirs in zip(short.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert short.state_dict().keys() == written.state_dict().keys()
