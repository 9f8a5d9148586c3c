"""A model whose kept values are looked at in one go is like any other: modes, copies, and who looks into it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rewriter import bake, evaluate_once
from rewriter.state import freeze, invalidate, unfreeze
from tests.layers import WEIGHTS, Layers, add_one, doubled, layers, rewritten, rule


def test_modes_have_values_of_their_own(world: Layers) -> None:
    world.model.requires_grad_(False)
    world.x.requires_grad_()
    wanted = world.fresh().detach()
    for _ in range(2):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            for _ in range(4):
                with mode():
                    out = world.model(world.x)
                assert out.requires_grad is (mode is torch.enable_grad)
                torch.testing.assert_close(out.detach().clone(), wanted, rtol=0, atol=0)
    world.model.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert world.model(world.x.float()).dtype is torch.bfloat16


def test_biases_get_their_gradients_where_weights_are_not_trained(world: Layers, looks: Callable[[], int]) -> None:
    for layer in (0, 2, 4):
        world.site(layer).requires_grad_(False)
    trained = [parameter for parameter in world.model.parameters() if parameter.requires_grad]
    assert len(trained) == 3
    for _ in range(3):
        world.model(world.x)
    looks()
    got = torch.autograd.grad(world.model(world.x).square().sum(), trained)
    assert looks() == 0
    clone = copy.deepcopy(world.model)
    wanted = torch.autograd.grad(
        clone(world.x).square().sum(), [parameter for parameter in clone.parameters() if parameter.requires_grad]
    )
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "clone",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: copy.deepcopy(model._replicate_for_data_parallel()),
    ],
    ids=["deepcopy", "pickle", "replica"],
)
@torch.no_grad()
def test_a_copy_has_values_of_its_own(clone: Callable[[Any], Any]) -> None:
    world = Layers(weights=["2.weight"])
    other = clone(world.model)
    before = world.model(world.x)
    add_one(world.site(2).original)
    torch.testing.assert_close(other(world.x), before)
    assert not torch.equal(world.model(world.x), before)


@torch.no_grad()
def test_a_replica_reads_its_own_tensors(world: Layers, looks: Callable[[], int]) -> None:
    replica = world.model._replicate_for_data_parallel()
    for path, module in world.model.named_modules():
        if path:
            parent, _, name = path.rpartition(".")
            copied = module._replicate_for_data_parallel()
            copied._parameters = {
                key: None if value is None else value * 2 for key, value in module._parameters.items()
            }
            replica.get_submodule(parent)._modules[name] = copied
    torch.testing.assert_close(replica(world.x), doubled(world.model)(world.x))
    looks()
    world.model(world.x)
    assert looks() == 0


@torch.no_grad()
def test_a_copy_by_other_means_reads_its_own_modules(world: Layers) -> None:
    clone: Any = object.__new__(type(world.model))
    clone.__dict__.update(world.model.__dict__)
    clone._modules = dict(doubled(world.model)._modules)
    torch.testing.assert_close(clone(world.x), doubled(world.model)(world.x))
    torch.testing.assert_close(world.model(world.x), world.fresh())


@torch.no_grad()
def test_models_of_one_class_have_values_of_their_own(looks: Callable[[], int]) -> None:
    class Own(nn.Sequential):
        """A class that no other test has a graph of."""

    always = rewritten(Own(*layers()), *(rule([name], cache="forward") for name in WEIGHTS))
    one, other = Layers(Own(*layers())), Layers(Own(*layers()))
    assert always.code == one.model.code
    assert type(one.model) is type(other.model)
    add_one(other.site(0).original)
    other.settle()
    looks()
    for world in (one, other):
        out = world.model(one.x)
        assert looks() == 0
        torch.testing.assert_close(out, copy.deepcopy(world.model)(one.x), rtol=0, atol=0)
        looks()
    assert not torch.equal(one.model(one.x), other.model(one.x))
    torch.testing.assert_close(always(one.x), one.model(one.x))


def test_evaluate_once_and_freezing_come_first(world: Layers) -> None:
    with evaluate_once(world.model):
        loss = world.model(world.x).square().sum()
        loss.backward()
        with torch.no_grad():
            torch.testing.assert_close(world.model(world.x), world.fresh())
    assert world.site(2).original.grad is not None
    world.settle()
    with torch.no_grad():
        before = world.model(world.x)
        freeze(world.model)
        add_one(world.site(2).original)
        torch.testing.assert_close(world.model(world.x), before)
        unfreeze(world.model)
        torch.testing.assert_close(world.model(world.x), world.fresh())


@pytest.mark.parametrize("way", [invalidate, lambda model: model.to(torch.float32), freeze])
def test_values_that_are_dropped_are_freed(world: Layers, way: Callable[[Any], Any]) -> None:
    value = weakref.ref(world.site(2).holding.kept["value"].value)
    assert value() is not None
    way(world.model)
    gc.collect()
    assert value() is None


@torch.no_grad()
def test_arguments_are_those_of_the_model() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)

        def forward(self, given_0: Tensor, scale: float = 2.0, **others: Tensor) -> Tensor:
            return self.one(given_0) * scale

    world = Layers(Named().double(), ["one.weight"])
    clone = copy.deepcopy(world.model)
    for args, kwargs in (((world.x,), {}), ((), {"given_0": world.x}), ((world.x,), {"scale": 3.0})):
        torch.testing.assert_close(world.model(*args, **kwargs), clone(*args, **kwargs), rtol=0, atol=0)
    with pytest.raises(TypeError, match="given_0"):
        world.model()


@torch.no_grad()
def test_another_graph_has_another_beginning(world: Layers) -> None:
    last = next(node for node in reversed(world.model.graph.nodes) if node.op == "output")
    with world.model.graph.inserting_before(last):
        negative = world.model.graph.call_function(torch.neg, last.args)
    last.args = (negative,)
    before = world.model(world.x)
    world.model.recompile()
    for _ in range(3):
        torch.testing.assert_close(world.model(world.x), -before, rtol=0, atol=0)


def test_whoever_looks_into_the_model_finds_its_graph(world: Layers) -> None:
    world.settle()
    with torch.no_grad():
        wanted = world.model(world.x)
        names = [name for name, _ in world.model.named_parameters()]
        others = {name: value * 2 for name, value in world.model.named_parameters()}
        torch.testing.assert_close(
            torch.func.functional_call(world.model, others, (world.x,)), doubled(world.model)(world.x)
        )
        mapped = torch.func.vmap(world.model)(world.x)
        compiled = torch.compile(world.model, backend="eager", fullgraph=True)
        add_one(world.site(2).original)
        changed = world.model(world.x)
        torch.testing.assert_close(compiled(world.x), changed)
        traced = torch.jit.trace(world.model, (world.x,))
        add_one(world.site(2).original)
        torch.testing.assert_close(traced(world.x), world.model(world.x))
        assert not torch.equal(changed, wanted)
    torch.testing.assert_close(mapped, wanted)
    again = fx.symbolic_trace(nn.Sequential(world.model))
    assert [name.removeprefix("0.") for name, _ in again.named_parameters()] == names
    torch.testing.assert_close(again(world.x), world.model(world.x))
    torch.testing.assert_close(bake(world.model)(world.x), world.model(world.x))


@torch.no_grad()
def test_a_wrong_input_is_told_as_ever(world: Layers) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        world.model(torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(world.model(world.x), world.fresh())
