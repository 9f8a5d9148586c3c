"""A batch whose values nothing but linear calls use gives their transposes, and whatever else is done is as before."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import bake, evaluate_once, rewrite
from rewriter.passes import print_graph
from rewriter.runtime._linear import plus_product, product_plus
from rewriter.state import freeze, unfreeze

CAYLEY = {"orthogonal": {"map": "cayley"}}


def _spec(select: Any = "*.weight", *chain: Any, **options: Any) -> dict[str, Any]:
    rule = {"name": "rule", "select": select, "chain": list(chain or (CAYLEY,)), "batch": "always", **options}
    return {"reparam": 1, "rules": [rule]}


def _model(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6, bias=bias) for _ in range(4)), nn.Tanh()).double()


def _transposed(model: nn.Module) -> int:
    return print_graph(model).count(", transposed]")


@pytest.fixture(params=[(5, 6), (2, 3, 6), (6,)], ids=str)
def x(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(request.param, dtype=torch.float64)


def _gradients(model: nn.Module, x: Tensor) -> list[Any]:
    x = x.clone().requires_grad_()
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_without(x: Tensor, bias: bool) -> None:
    model = _model(bias)
    new, without = rewrite(model, _spec()), rewrite(model, _spec(), without="transpose")
    assert (_transposed(new), _transposed(without)) == (4, 0)
    assert "evaluate together" in print_graph(without)
    torch.testing.assert_close(_gradients(new, x), _gradients(without, x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(new(x), without(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(new(x), without(x))


class Uses(nn.Module):
    """Linear layers of which the last one's weight is used otherwise too, if so."""

    def __init__(self, otherwise: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.otherwise = otherwise

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)) + self.second(x)
        x = self.third(x) + x
        return x @ self.third.weight if self.otherwise else x


@pytest.mark.parametrize("otherwise", [True, False])
def test_a_batch_gives_transposes_where_all_its_uses_are_linear(otherwise: bool, x: Tensor) -> None:
    model = Uses(otherwise).double()
    new, without = rewrite(model, _spec()), rewrite(model, _spec(), without=["batch", "transpose"])
    assert _transposed(new) == (0 if otherwise else 3)
    sums = [node for node in new.graph.nodes if node.target in (plus_product, product_plus)]
    assert len(sums) == (0 if otherwise else 2)
    torch.testing.assert_close(_gradients(new, x), _gradients(without, x), rtol=1e-12, atol=1e-12)
    baked = bake(new)
    assert type(baked) is Uses
    torch.testing.assert_close(baked(x), without(x))


class Vectors(nn.Module):
    """Weights of linear calls that are vectors, and so have no transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.first) + nn.functional.linear(x, self.second)


def test_vectors_are_not_transposed(x: Tensor) -> None:
    model = Vectors().double()
    spec = _spec("*", {"scale": {"factor": 2.0}}, init="raw")
    new, without = rewrite(model, spec), rewrite(model, spec, without=["batch", "transpose"])
    assert "evaluate together" in print_graph(new) and not _transposed(new)
    torch.testing.assert_close(_gradients(new, x), _gradients(without, x))


def test_bake_of_all_and_of_a_part(x: Tensor) -> None:
    model = _model()
    new = rewrite(model, _spec())
    expected = new(x)
    torch.testing.assert_close(bake(new)(x), expected)
    part = bake(new, only=["1.weight"])
    assert _transposed(part) == 3
    torch.testing.assert_close(part(x), expected)
    single = bake(new, only=["0.weight", "1.weight", "2.weight"])
    assert _transposed(single) == 0
    torch.testing.assert_close(single(x), expected)


def test_a_second_rewriting_writes_the_graph_anew(x: Tensor) -> None:
    model = _model()
    both = rewrite(rewrite(model, _spec("{0,1}.weight")), _named("other", _spec("{2,3}.weight")))
    assert _transposed(both) == 4
    torch.testing.assert_close(both(x), rewrite(model, _spec())(x))
    doubled = _named("bias", _spec("0.bias", {"scale": {"factor": 2.0}}, batch="auto", init="raw"))
    again = rewrite(both, doubled)
    assert _transposed(again) == 4
    torch.testing.assert_close(again(x), rewrite(rewrite(model, doubled), _spec())(x))


def _named(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "rules": [{**spec["rules"][0], "name": name}]}


def test_copies_pickles_and_scripts(x: Tensor) -> None:
    new = rewrite(_model(), _spec())
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new)), torch.jit.script(new)):
        torch.testing.assert_close(other(x), new(x))


def test_sites_that_are_evaluated_by_themselves_are_transposed(x: Tensor) -> None:
    model = _model()
    new, without = rewrite(model, _spec()), rewrite(model, _spec(), without=["batch", "transpose"])
    for changed in (new, without):
        freeze(changed, only=["1.weight"])
    torch.testing.assert_close(new(x), without(x))
    for changed in (new, without):
        unfreeze(changed)
        with evaluate_once(changed):
            for part in (x, 2 * x):
                changed(part).square().sum().backward()
    for one, other in zip(new.parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch._dynamo.reset()
    compiled: Any = torch.compile(new, backend="eager", fullgraph=True)
    torch.testing.assert_close(_gradients(new, x)[0], compiled(x))
    program = torch.export.export(new, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), new(x))
