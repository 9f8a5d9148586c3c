"""A chain is applied in the order in which it is written, and a value it can have survives it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter import bake, plan, rewrite
from tests.rules import one_rule

PRUNED = {"l1_unstructured": {"amount": 12}}
ORTHOGONAL = {"orthogonal": {"map": "matrix_exp"}}
CAYLEY = {"orthogonal": {"map": "cayley", "trivialization": False}}
LORA = {"lora": {"r": 2, "lora_alpha": 6}}
QUANTIZED = {"fake_quantize": {"bits": 4}}
Stored = dict[str, Tensor]


spec = functools.partial(one_rule, select="0.weight")


def net(training: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double().train(training)


def exponential(X: Tensor, base: Tensor) -> Tensor:
    A = X.tril(-1)
    return base @ torch.linalg.matrix_exp(A - A.T)


def weight_norm(g: Tensor, v: Tensor) -> Tensor:
    return g * v / v.norm(dim=1, keepdim=True)


def lora(W: Tensor, t: Stored, step: int) -> Tensor:
    return W + 3.0 * t[f"{step}.lora_B"] @ t[f"{step}.lora_A"]


def quantized(W: Tensor) -> Tensor:
    unit = W.abs().max() / 7
    return W + (unit * (W / unit).round().clamp(-8, 7) - W).detach()


COMPOSITIONS: dict[str, tuple[list[Any], Callable[[Stored], Tensor]]] = {
    "prune of an orthogonal": (
        [ORTHOGONAL, PRUNED],
        lambda t: exponential(t["original"], t["0.base"]) * t["1.mask"],
    ),
    "orthogonal of a pruned": (
        [PRUNED, CAYLEY],
        lambda t: torch.linalg.solve(
            torch.eye(6) - (A := 0.5 * ((X := t["original"] * t["0.mask"]).tril(-1) - X.tril(-1).T)), torch.eye(6) + A
        ),
    ),
    "LoRA over weight norm": (
        ["weight_norm", LORA],
        lambda t: lora(weight_norm(t["original0"], t["original1"]), t, 1),
    ),
    "weight norm over LoRA": (
        [LORA, "weight_norm"],
        # The length is stored after the base, as what the later step reads.
        lambda t: weight_norm(t["original1"], lora(t["original0"], t, 0)),
    ),
    "fake-quant last": (
        ["weight_norm", LORA, QUANTIZED],
        lambda t: quantized(lora(weight_norm(t["original0"], t["original1"]), t, 1)),
    ),
    "fake-quant of an orthogonal": (
        [ORTHOGONAL, QUANTIZED],
        lambda t: quantized(exponential(t["original"], t["0.base"])),
    ),
    "prune of a fake-quant of a symmetric": (
        ["symmetric", QUANTIZED, PRUNED],
        lambda t: quantized(t["original"].triu() + t["original"].triu(1).T) * t["2.mask"],
    ),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_chain_is_the_composition_written_by_hand(name: str, capture: str) -> None:
    chain, by_hand = COMPOSITIONS[name]
    torch.set_default_dtype(torch.float64)
    try:
        new = rewrite(net(), spec(*chain), capture=capture)
        site = new.get_submodule("0.parametrizations.weight")
        with torch.no_grad():
            for parameter in site.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        stored = {key: tensor.detach().clone() for key, tensor in site.state_dict().items()}
        trained = {key: stored[key].requires_grad_() for key, p in site.named_parameters() if p.requires_grad}
        expected = by_hand(stored)
        torch.testing.assert_close(new.get_submodule("0").weight, expected)

        x = torch.randn(3, 6)
        new(x).square().sum().backward()
        head = new.get_submodule("2")
        by_hand_out = torch.tanh(x @ expected.T + new.get_submodule("0").bias) @ head.weight.T + head.bias
        gradients = torch.autograd.grad(by_hand_out.square().sum(), list(trained.values()), allow_unused=True)
        for key, gradient in zip(trained, gradients, strict=True):
            found = site.get_parameter(key).grad
            assert (found is None) == (gradient is None), key
            if gradient is not None:
                torch.testing.assert_close(found, gradient)
        torch.testing.assert_close(bake(new).get_parameter("0.weight").detach(), expected.detach())
    finally:
        torch.set_default_dtype(torch.float32)


ONTO: list[Any] = [
    "weight_norm",
    {"weight_norm": {"dim": 1}},
    LORA,
    {"dora": {"r": 2}},
    {"lora": {"r": 2, "init_lora_weights": "pissa"}},
]
"""Every matrix without a zero row is the value of these for some stored tensors."""

INVERTIBLE: list[Any] = [
    {"scale": {"factor": -0.5}},
    {"shift": {"offset": 0.25}},
    "transpose",
    "identity",
    {"affine": {"a": 2.0, "b": -1.0, "inputs": ["2.weight"]}},
]

CONSTRAINED: list[Any] = [
    ORTHOGONAL,
    {"orthogonal": {"map": "cayley"}},
    {"orthogonal": {"map": "householder"}},
    "special_orthogonal",
    "stiefel",
    "symmetric",
    "skew",
    "triangular",
    "diagonal",
    "centred",
    "psd",
    {"psd": {"rank": 3}},
    "spd",
    "correlation",
    "sphere",
    "positive",
    "simplex",
    {"low_rank": {"rank": 3}},
    {"fixed_rank": {"rank": 3}},
]


@given(
    # An affine's other tensor has the weight's shape, which what a factor of low rank starts from has not.
    st.lists(st.sampled_from([*ONTO, *INVERTIBLE[:-1]]), max_size=2),
    st.lists(st.sampled_from(CONSTRAINED), max_size=1),
    st.lists(st.sampled_from(INVERTIBLE), max_size=3),
    st.integers(0, 5),
)
def test_a_value_of_the_chain_survives_it(onto: list[Any], constrained: list[Any], after: list[Any], seed: int) -> None:
    assume(onto or constrained or after)
    torch.manual_seed(seed)
    chain = [*onto, *constrained, *after]
    donor = net(training=False)
    reached = rewrite(donor, spec(*constrained, *after) if constrained else spec(*chain))
    with torch.no_grad():
        for parameter in reached.get_submodule("0.parametrizations").parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model = net(training=False)
        model.load_state_dict(donor.state_dict())
        model[0].weight.copy_(reached.get_submodule("0").weight)
    [site] = plan(model, spec(*chain))
    assert site.moved is not None and site.moved < 1e-7, (chain, site.moved)
    x = torch.randn(2, 6, dtype=torch.float64)
    new = rewrite(model, spec(*chain))
    torch.testing.assert_close(new(x), model(x), atol=1e-6, rtol=1e-6)
