"""transpose: a sum with the product of a weight that is transposed is left to the product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewriter import bake, rewrite
from rewriter.passes import print_graph
from tests.passes.test_transpose import SPEC, STEPS, calls_of, reference


class Recurrent(nn.Module):
    """An RNN: adds what the input and what the state contribute."""

    def __init__(self, state_first: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.input = nn.Linear(4, 4)
        self.step = nn.Linear(4, 4, bias=bias)
        self.state_first = state_first

    def summand(self, x: Tensor, state: Tensor) -> Tensor:
        return self.input(x)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        for _ in range(STEPS):
            if self.state_first:
                state = torch.tanh(self.step(state) + self.summand(x, state))
            else:
                state = torch.tanh(self.summand(x, state) + self.step(state))
        return state


class Explicit(Recurrent):
    """Says of the product that it has no bias."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        for _ in range(STEPS):
            state = torch.tanh(self.input(x) + F.linear(state, self.step.weight, None))
        return state


class Broadcast(Recurrent):
    """Adds one row to every row of the product."""

    def summand(self, x: Tensor, state: Tensor) -> Tensor:
        return self.input(x).sum(-2)


class Wider(Recurrent):
    """Adds something that has a dimension more."""

    def summand(self, x: Tensor, state: Tensor) -> Tensor:
        return self.input(x).unsqueeze(0)


class Precise(Recurrent):
    """Adds something of a wider type."""

    def forward(self, x: Tensor) -> Tensor:
        state, total = torch.zeros_like(x), self.input(x).double()
        for _ in range(STEPS):
            total = total + self.step(state)
            state = torch.tanh(total).to(x.dtype)
        return total


class Twice(Recurrent):
    """Uses the product for something else as well."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        for _ in range(STEPS):
            product = self.step(state)
            state = torch.tanh(self.input(x) + product) * torch.sigmoid(product)
        return state


class Doubled(Recurrent):
    """Adds the product to itself."""

    def forward(self, x: Tensor) -> Tensor:
        state = x
        for _ in range(STEPS):
            product = self.step(state)
            state = torch.tanh(product + product)
        return state


class Written(Recurrent):
    """Overwrites the state between the product and the sum."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x) + x
        for _ in range(STEPS):
            product = self.step(state)
            other = self.input(x)
            state.mul_(0.5)
            state = torch.tanh(other + product) + state
        return state


SUMS = [Recurrent(), Recurrent(True), Broadcast(), Broadcast(True), Wider(), Precise()]
NO_SUMS = [Twice(), Doubled(), Recurrent(bias=True)]


def _name(model: Any) -> str:
    return f"{type(model).__name__}{'-state-first' if getattr(model, 'state_first', False) else ''}"


@pytest.mark.parametrize("model", SUMS[:5], ids=_name)
def test_a_sum_is_left_to_the_product(model: nn.Module) -> None:
    text = print_graph(rewrite(model, SPEC))
    assert text.count("factors_of(") == STEPS and "= add(" not in text and "times_transposed" not in text
    assert text.count("product_plus(" if model.state_first else "plus_product(") == STEPS


@pytest.mark.parametrize("model", [*NO_SUMS, Written()], ids=_name)
def test_other_sums_stay_as_they_are(model: nn.Module) -> None:
    text = print_graph(rewrite(model, SPEC))
    assert text.count("times_transposed(") == STEPS and text.count("= add(") >= STEPS and "factors_of" not in text


def test_autograd_sees_one_operation_for_the_sum_and_the_product() -> None:
    x = torch.randn(3, 4)
    calls = calls_of(rewrite(Recurrent(), SPEC), x)
    assert calls.count("AddmmBackward0") == 2 * STEPS and "MmBackward0" not in calls
    written = calls_of(reference(Recurrent()), x)
    assert written.count("AddmmBackward0") == written.count("MmBackward0") == STEPS


def test_a_hooked_layer_between_them_is_called_in_its_place() -> None:
    model, seen = Recurrent(True), []
    model.input.register_forward_hook(lambda module, args, result: seen.append("input"))
    text = print_graph(rewrite(model, SPEC))
    assert "factors_of" not in text and text.count("input(") == STEPS


def test_a_layer_between_them_with_a_forward_of_its_own_is_called_in_its_place() -> None:
    model = Recurrent(True)
    forward = model.input.forward
    model.input.forward = lambda x: forward(x)
    assert "factors_of" not in print_graph(rewrite(model, SPEC, capture="graph"))


@pytest.mark.parametrize("model", [*SUMS, *NO_SUMS], ids=_name)
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_have_the_values_and_gradients_of_torch(model: nn.Module, autocast: bool) -> None:
    torch.manual_seed(0)
    parametrized, new = reference(model), rewrite(model, SPEC)
    parametrized.load_state_dict(new.state_dict())
    written = rewrite(model, SPEC, without=["transpose"])
    written.load_state_dict(new.state_dict())
    x = torch.randn(3, 4, requires_grad=True)
    results = []
    for one in (new, written) if autocast else (new, parametrized):
        names = [name for name, _ in new.named_parameters()]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = one(x)
        inputs = [x, *map(one.get_parameter, names)]
        results.append((value, *torch.autograd.grad(value.float().square().sum(), inputs, allow_unused=True)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype is theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_is_written_before_the_sum_comes_after_the_product() -> None:
    new, x = rewrite(Written(), SPEC), torch.randn(3, 4)
    torch.testing.assert_close(new(x), bake(new)(x))


@pytest.mark.parametrize("model", SUMS, ids=_name)
def test_baking_gives_the_sums_back(model: nn.Module) -> None:
    traced = fx.symbolic_trace(model)
    before = str(traced.graph)
    assert str(bake(rewrite(traced, SPEC)).graph) == before
    assert str(fx.symbolic_trace(bake(rewrite(model, SPEC))).graph) == before


@pytest.mark.parametrize(
    "model",
    [Recurrent(True), *(pytest.param(model, marks=pytest.mark.slow) for model in (Recurrent(), Wider()))],
    ids=_name,
)
def test_sums_script_save_and_export(model: nn.Module, tmp_path: Any) -> None:
    torch.manual_seed(0)
    new, x = rewrite(model, SPEC), torch.randn(3, 4)
    expected = new(x)
    torch.testing.assert_close(torch.jit.script(new)(x), expected)
    torch.testing.assert_close(torch.export.export(new, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.compile(new, fullgraph=True, backend="eager")(x), expected)
    torch.save(new, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(loaded(x), expected)
    assert str(fx.symbolic_trace(bake(loaded)).graph) == str(fx.symbolic_trace(model).graph)
    both = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(new)(both), torch.stack([new(x), new(2 * x)]))


def test_rewriting_again_keeps_the_sums() -> None:
    first = {"name": "r", "select": "step.weight", "chain": ["symmetric"]}
    second = {"name": "s", "select": "input.weight", "chain": ["symmetric"]}
    once = rewrite(Recurrent(), {"reparam": 1, "rules": [first]})
    twice = rewrite(once, {"reparam": 1, "rules": [first, second]})
    text = print_graph(twice)
    assert text.count("factors_of(") == STEPS and text.count(".t(") == 2 and text.count("[cast once]") == 2
    part = print_graph(bake(twice, only=["input.weight"]))
    assert part.count("factors_of(") == STEPS and part.count(".t(") == 1
