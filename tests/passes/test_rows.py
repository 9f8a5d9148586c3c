"""rows: linear calls with one row of a tensor after the other are one call, and nobody can tell but by the time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from rewriter import bake, rewrite
from rewriter.io import load_model, save_model
from rewriter.passes import print_graph
from tests.passes.loops import JOINED, NAMES, OTHERS, STEPS, AllNamed, Recurrent
from tests.passes.test_transpose import Symmetric, calls_of


def spec(*select: str) -> dict[str, Any]:
    rules = [{"name": name.partition(".")[0], "select": name, "chain": ["symmetric"]} for name in select]
    return {"reparam": 1, "rules": rules}


STEP, BOTH = spec("step.weight"), spec("step.weight", "input.weight")
ONE_OR_BOTH = pytest.mark.parametrize(
    "select", [pytest.param(STEP, id="one", marks=pytest.mark.slow), pytest.param(BOTH, id="both")]
)


def reference(model: nn.Module, *owners: str) -> nn.Module:
    parametrized = copy.deepcopy(model)
    for owner in owners:
        parametrize.register_parametrization(parametrized.get_submodule(owner), "weight", Symmetric(), unsafe=True)
    return parametrized


def joined(model: nn.Module) -> int:
    """How many calls stand for the calls of many rows."""
    text = print_graph(model)  # type: ignore[arg-type]
    return text.count("module_of_rows(") + text.count("linear_of_rows(")


def given(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(STEPS + 1, STEPS + 1, 4, dtype=dtype, requires_grad=True)


def same(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    """Compare values and gradients."""
    rtol = 1e-10 if x.dtype is torch.float64 else 1e-5
    results = []
    for model in (one, other):
        value = model(x)
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(value.square().sum(), [x, *map(named.get, sorted(named))])
        results.append((value, *gradients))
    torch.testing.assert_close(*results, rtol=rtol, atol=rtol)


def test_the_graph_multiplies_all_rows_ahead() -> None:
    lines = print_graph(rewrite(Recurrent(), STEP)).splitlines()
    assert lines[:11] == [
        "%1 = input",
        "%2 = getitem(%1, 0)",
        "%3 = zeros_like(%2)",
        "%4 = input",
        "%5 = module_of_rows(%1, %4, 0, 0, 0, 9)",
        "%6 = getitem(%5, 0)",
        "%7 = evaluate step.weight [cast once]: original >> symmetric",
        "%8 = .t(%7)",
        "%9 = times_transposed(%3, %8, None)",
        "%10 = add(%6, %9)",
        "%11 = tanh(%10)",
    ]
    assert len(lines) == 11 + 4 * (STEPS - 1) + 1


@pytest.mark.parametrize("make", JOINED, ids=NAMES)
@pytest.mark.parametrize("owners", [("step",), ("step", "input")], ids=" ".join)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64])
def test_values_and_gradients_are_those_of_torch(
    make: Callable[[], nn.Module], owners: tuple[str, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = make().to(dtype)
    new, parametrized = rewrite(model, spec(*[f"{owner}.weight" for owner in owners])), reference(model, *owners)
    assert joined(new) == 1
    parametrized.load_state_dict(new.state_dict())
    same(new, parametrized, given(dtype))


def test_the_backward_has_one_product_for_all_rows() -> None:
    x = given()
    for select, before in (STEP, STEPS), (BOTH, STEPS):
        whole, less = (calls_of(rewrite(Recurrent(), select, without=out), x) for out in ((), ("rows", "transpose")))
        assert whole.count("UnbindBackward0") == 1 and "UnbindBackward0" not in less
        assert whole.count("SelectBackward0") == 0 and less.count("SelectBackward0") == before


@pytest.mark.parametrize("shape", [(STEPS + 1, 4), (STEPS + 1, 0, 4), (STEPS, 2, 3, 4)])
def test_rows_of_every_shape(shape: tuple[int, ...]) -> None:
    model = Recurrent()
    new, less = rewrite(model, BOTH), rewrite(model, BOTH, without="rows")
    same(new, less, torch.randn(shape, requires_grad=True))


@pytest.mark.parametrize("kind", OTHERS)
def test_others_are_called_row_by_row(kind: type[Recurrent]) -> None:
    torch.manual_seed(0)
    model = kind()
    new, less = rewrite(model, STEP), rewrite(model, STEP, without="rows")
    assert joined(new) == 0
    x = torch.randn(STEPS + 1, 3, 4)
    torch.testing.assert_close(new(x.clone()), less(x.clone()))


def test_calls_with_hooks_stay_calls() -> None:
    model = Recurrent()
    model.input.register_forward_hook(lambda module, args, value: value + 1)
    new = rewrite(model, STEP)
    assert joined(new) == 0
    x = given()
    torch.testing.assert_close(new(x), rewrite(model, STEP, without="rows")(x))


@pytest.mark.parametrize("which", ["own", "global", "forward", "module"])
def test_a_late_hook_or_forward_runs_for_every_row(which: str) -> None:
    torch.manual_seed(0)
    new, x, seen = rewrite(Recurrent(), STEP), given().detach(), []

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.shape)
            return 2 * super().forward(x)

    def hook(module: nn.Module, args: Any, value: Tensor) -> Tensor | None:
        if module is not new.input:
            return None
        seen.append(args[0].shape)
        return 2 * value

    expected = copy.deepcopy(new)
    with torch.no_grad():
        for tensor in expected.input.parameters():
            tensor *= 2
    handle: Any = None
    if which == "own":
        new.input.register_forward_hook(hook)
    elif which == "global":
        handle = nn.modules.module.register_module_forward_hook(hook)
    elif which == "forward":
        former = new.input.forward
        new.input.forward = lambda x: seen.append(x.shape) or 2 * former(x)
    else:
        other = Doubled(4, 4)
        other.load_state_dict(new.input.state_dict())
        new.input = other
    try:
        value = new(x)
    finally:
        if handle is not None:
            handle.remove()
    torch.testing.assert_close(value, expected(x))
    assert seen == [x[0].shape] * STEPS


def test_what_is_no_tensor_and_what_is_too_short_is_as_in_the_model() -> None:
    model = Recurrent()
    for select in (STEP, BOTH):
        new, x = rewrite(model, select), given()
        torch.testing.assert_close(new(list(x)), new(x))
        with pytest.raises(IndexError, match="index 8 is out of bounds"):
            new(x[:8])
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            new(torch.randn(STEPS, 3, 5))
        with pytest.raises(IndexError, match="too many indices"):
            rewrite(AllNamed(), select)(torch.randn(4, STEPS))


def test_a_row_along_the_last_dimension_is_no_row_of_a_product() -> None:
    class Last(Recurrent):
        def row(self, x: Tensor, index: int) -> Tensor:
            return x[:, :, index]

    torch.manual_seed(0)
    model, x = Last(), torch.randn(3, 4, STEPS)
    for select in (STEP, BOTH):
        torch.testing.assert_close(rewrite(model, select)(x), rewrite(model, select, without="rows")(x))


@pytest.mark.parametrize("make", JOINED, ids=NAMES)
@ONE_OR_BOTH
def test_baking_gives_the_calls_back(make: Callable[[], nn.Module], select: Any) -> None:
    model = make().eval()
    baked = bake(rewrite(model, select))
    assert type(baked) is type(model)
    traced = rewrite(fx.symbolic_trace(model), select)
    assert joined(traced) == 1
    assert str(bake(traced).graph) == str(fx.symbolic_trace(model).graph)  # type: ignore[union-attr]


def test_baking_one_of_two_keeps_it_for_the_other() -> None:
    torch.manual_seed(0)
    new, x = rewrite(Recurrent(), BOTH), given()
    for name, function in ("input.weight", "module_of_rows"), ("step.weight", "linear_of_rows"):
        part = bake(new, only=[name])
        assert f"{function}(" in print_graph(part)  # type: ignore[arg-type]
        torch.testing.assert_close(part(x), new(x))
        torch.testing.assert_close(bake(part)(x), new(x))


def test_rewriting_again_finds_the_weight_of_all_rows() -> None:
    torch.manual_seed(0)
    model = Recurrent()
    new = rewrite(rewrite(model, STEP), BOTH)
    assert "linear_of_rows(" in print_graph(new) and "module_of_rows" not in print_graph(new)  # type: ignore[arg-type]
    same(new, rewrite(model, BOTH), given())
    less = rewrite(rewrite(model, STEP), BOTH, without="rows")
    assert joined(less) == 0
    same(less, new, given())


@ONE_OR_BOTH
def test_copies_scripts_saves_and_exports(select: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    new, x = rewrite(Recurrent(), select), given().detach()
    expected = new(x)
    torch.testing.assert_close(copy.deepcopy(new)(x), expected)
    torch.testing.assert_close(torch.jit.script(new)(x), expected)
    torch.testing.assert_close(fx.symbolic_trace(new)(x), expected)
    torch.testing.assert_close(torch.export.export(new, (x,)).module()(x), expected)
    save_model(new, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt", allow=["tests.passes.*"])
    assert joined(loaded) == 1
    torch.testing.assert_close(loaded(x), expected)
    torch.testing.assert_close(bake(loaded)(x), expected)


@pytest.mark.parametrize("select", [STEP, BOTH], ids=["one", "both"])
def test_under_transforms_and_modes(select: Any) -> None:
    torch.manual_seed(0)
    model, x = Recurrent(), given()
    new, less = (rewrite(model, select, without=out) for out in ((), "rows"))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(new(x), less(x), rtol=2e-2, atol=2e-2)
        assert new(x).dtype is less(x).dtype
    with torch.no_grad():
        torch.testing.assert_close(new(x), less(x))
    with torch.inference_mode():
        torch.testing.assert_close(new(x), less(x))
    state = {name: tensor.detach() for name, tensor in new.named_parameters()}

    def loss(model: nn.Module) -> Callable[..., Tensor]:
        return lambda tensors, one: torch.func.functional_call(model, tensors, (one,)).square().sum()

    found = [
        torch.func.vmap(torch.func.grad(loss(model)), in_dims=(None, 2))(state, x.detach().unsqueeze(3).transpose(2, 3))
        for model in (new, less)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_compiles_without_a_break() -> None:
    torch.manual_seed(0)
    x = given().detach()
    for select in (STEP, BOTH):
        new = rewrite(Recurrent(), select)
        compiled = torch.compile(new, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), new(x))


def test_checkpointed_and_differentiated_twice() -> None:
    torch.manual_seed(0)
    model, x = Recurrent(), given(torch.float64)
    new, less = (rewrite(model, BOTH, without=out) for out in ((), "rows"))
    results = []
    for model in (new.double(), less.double()):
        value = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        results.append((first, *torch.autograd.grad(first.square().sum(), list(model.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
