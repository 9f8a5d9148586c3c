"""Models that torch.fx cannot trace keep their class, and a tensor is computed once for each forward of them."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rewriter import RewriterError, bake, plan, rewrite
from tests.module_mode import SITES, SPEC, Count, Step, Untraceable, halved, rewritten


def test_the_plan_says_which_line_cannot_be_traced() -> None:
    found = plan(Untraceable(), SPEC)
    assert found.root == "module"
    assert "tests/module_mode.py" in found.why
    assert "for _ in range(times)" in found.why
    assert [site.names for site in found] == [("weight", "tied.weight"), ("body.0.weight",), ("body.1.weight",)]


def test_the_classes_make_plain_modules() -> None:
    new = rewritten()
    assert type(type(new)()) is Untraceable
    assert type(type(new.tied)(4, 4)) is nn.Linear
    assert type(new.body[:1]) is nn.Sequential


def test_one_evaluation_for_each_forward_of_the_root(x: Tensor) -> None:
    new = rewritten()
    new(x, times=7).sum().backward()
    assert Count.total == SITES
    with torch.no_grad():
        new(x)
    assert Count.total == 2 * SITES


def test_values_and_gradients_are_those_of_torch(x: Tensor) -> None:
    model = Untraceable().double()
    new = rewritten(model)
    reference = copy.deepcopy(model)
    for module in (reference, reference.body[0], reference.body[1]):
        parametrize.register_parametrization(module, "weight", Count())
    del reference.tied.weight
    parametrize.register_parametrization(_with(reference.tied, torch.zeros(4, 4).double()), "weight", Count())
    reference.tied.parametrizations.weight.original = reference.parametrizations.weight.original
    x = x.double()
    ours, theirs = new(x), reference(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert expected.keys() == {name for name, _ in new.named_parameters()}
    for name, parameter in new.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-10)


def _with(module: nn.Module, weight: Tensor) -> nn.Module:
    module.weight = nn.Parameter(weight)
    return module


def test_class_and_methods_stay(x: Tensor) -> None:
    model = Untraceable()
    new = rewritten(model)
    assert isinstance(new, Untraceable)
    assert type(new).__name__ == "Untraceable"
    assert type(new).__module__ == Untraceable.__module__
    assert type(new).__doc__ == Untraceable.__doc__
    assert new.forward.__doc__ == model.forward.__doc__
    assert inspect.signature(new.forward) == inspect.signature(model.forward)
    assert new.width == 4
    assert torch.equal(new.features(x), halved(new).features(x))
    assert "tied.parametrizations.weight.original" in new.state_dict()


def test_a_submodule_called_on_its_own_evaluates_on_its_own(x: Tensor) -> None:
    new = rewritten()
    new.body(x)
    assert Count.total == 2
    new.body[0](new.body[0](x))
    assert Count.total == 4
    assert torch.equal(new.body(x), halved(new).body(x))


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = Step()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            x = self.step(x)
        return x


def test_a_submodule_on_the_way_to_the_tensors_has_forwards_of_its_own(x: Tensor) -> None:
    new = rewritten(nn.Sequential(Looped(), nn.Linear(4, 4)))
    new[0](x)
    assert Count.total == 1
    assert isinstance(new[0], Looped)
    assert type(bake(new)[0]) is Looped


def test_a_rewritten_model_inside_another_is_evaluated_at_each_of_its_calls(x: Tensor) -> None:
    inner = rewritten()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x))

    Outer()(x)
    assert Count.total == 2 * SITES


class Recursive(Step):
    def forward(self, h: Tensor, depth: int = 3) -> Tensor:
        h = super().forward(h)
        return self(h, depth - 1) if depth and h.sum() < 1e9 else h


def test_a_forward_that_calls_itself_is_one_forward(x: Tensor) -> None:
    new = rewritten(Recursive())
    new(x)
    assert Count.total == 1


def test_an_exception_ends_the_forward(x: Tensor) -> None:
    new = rewritten()
    with pytest.raises(RuntimeError):
        new(torch.randn(5, 3))
    with torch.no_grad():
        new.parametrizations.weight.original.zero_()
        new.body[1].parametrizations.weight.original.zero_()
    Count.total = 0
    assert torch.equal(new(x), halved(new)(x))


class Modes(nn.Module):
    """Reads its weight first where gradients are off, or in another precision, or inside a checkpoint."""

    def __init__(self, first: Callable[[Callable[[], Tensor]], float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        scale = self.first(lambda: (x @ self.weight).abs().mean().detach())
        return x @ self.weight / scale if scale > 0 else x


def under_no_grad(read: Callable[[], Tensor]) -> float:
    with torch.no_grad():
        return float(read())


def under_inference_mode(read: Callable[[], Tensor]) -> float:
    with torch.inference_mode():
        return float(read())


def under_autocast(read: Callable[[], Tensor]) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        return float(read())


@pytest.mark.parametrize("first", [under_no_grad, under_inference_mode, under_autocast])
def test_the_first_read_may_be_under_another_mode(first: Any, x: Tensor) -> None:
    new = rewritten(Modes(first))
    new(x).sum().backward()
    assert Count.total == 1
    plain = halved(new)
    plain.zero_grad()
    plain(x).sum().backward()
    torch.testing.assert_close(new.parametrizations.weight.original.grad, plain.weight.grad / 2)


def test_a_forward_without_gradients_leaves_nothing_for_the_next(x: Tensor) -> None:
    new = rewritten()
    with torch.inference_mode():
        new(x)
    new(x).sum().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())


@pytest.mark.parametrize(
    "misuse",
    [
        lambda new: delattr(new, "weight"),
        lambda new: new.tied.register_parameter("weight", nn.Parameter(torch.ones(4, 4))),
        lambda new: new.register_buffer("weight", torch.ones(4, 4)),
    ],
)
def test_a_computed_tensor_is_not_deleted_or_hidden(misuse: Callable[[Any], None]) -> None:
    new = rewritten()
    with pytest.raises(RewriterError, match="weight is computed by parametrizations"):
        misuse(new)
    assert list(bake(new).state_dict()) == list(Untraceable().state_dict())


class Broken(nn.Module):
    broken = False

    def forward(self, X: Tensor) -> Tensor:
        return X.no_such_thing if Broken.broken else X


def test_an_attribute_error_in_a_chain_is_not_taken_for_a_missing_attribute(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = rewritten(Step(), [Broken()])
    monkeypatch.setattr(Broken, "broken", True)
    with pytest.raises(RewriterError, match=r"computing weight of Step failed.*no_such_thing"):
        new(x)


class OverGraph(nn.Module):
    """A graph inside a model that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.fx.symbolic_trace(Step())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x)) if x.sum() < 1e9 else x


def test_a_graph_inside_reads_the_values_of_the_forward(x: Tensor) -> None:
    model = OverGraph()
    new = rewritten(model)
    for one in (new, copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        Count.total = 0
        result = one(x)
        assert Count.total == 1
        assert torch.equal(result, halved(new)(x))
    plain = bake(new)
    assert isinstance(plain.inner, torch.fx.GraphModule)
    assert plain.inner.code == model.inner.code
    assert list(plain.state_dict()) == list(model.state_dict())


# torch.compile


@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.slow)])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_without_a_graph_break(train: bool, x: Tensor) -> None:
    torch._dynamo.reset()
    new = rewritten(Compiled(), ["symmetric"]).train(train)
    compiled = torch.compile(new, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        new.zero_grad()
        torch.testing.assert_close(compiled(x), new(x))
        compiled(x).sum().backward()
        found = [parameter.grad for parameter in new.parameters()]
        new.zero_grad()
        new(x).sum().backward()
        torch.testing.assert_close(found, [parameter.grad for parameter in new.parameters()])
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.mul_(0.5)
    torch._dynamo.reset()


class Compiled(nn.Module):
    """Not traceable by torch.fx, and for torch.compile one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.step.weight

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 77 and len(x) > 77:
            return x
        for _ in range(3):
            x = self.tied(self.step(x)) @ self.step.weight
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_script_of_a_model_with_module_capture_says_to_bake_first() -> None:
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "1.weight", "chain": ["orthogonal"]}]}
    model = rewrite(nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), spec, capture="module")
    with pytest.raises(RewriterError, match=r"module capture.*1\.weight = orthogonal is computed: bake first"):
        torch.jit.script(model)
    x = torch.ones(2, 4)
    torch.testing.assert_close(torch.jit.script(bake(model))(x), model(x))
