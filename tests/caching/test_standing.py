"""Kept values that nothing can change on the way to their use are looked at in one go, before the graph starts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook

from rewriter.runtime import _standing as standing
from rewriter.state import invalidate, set_value
from tests.layers import WEIGHTS, Layers, add_one, layers, rewritten, rule
from tests.maps import Smooth


@torch.no_grad()
def test_the_third_forward_looks_at_all_values_in_one_go(looks: Callable[[], int]) -> None:
    model = rewritten(layers(), rule(WEIGHTS, cache="version"))
    x = torch.randn(2, 4, dtype=torch.float64)
    outs, counts = [], []
    for _ in range(4):
        outs.append(model(x))
        counts.append(looks())
    assert counts == [3, 3, 0, 0]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=0)


def _optimizer_step(world: Layers) -> None:
    world.model(world.x).square().sum().backward()
    torch.optim.SGD(world.model.parameters(), lr=0.1).step()


def _other_bias(world: Layers) -> None:
    world.model.get_submodule("2").bias = nn.Parameter(torch.ones(4, dtype=torch.float64))


def _other_activation(world: Layers) -> None:
    setattr(world.model, "1", nn.Sigmoid())


def _other_layer(world: Layers) -> None:
    layer = copy.deepcopy(world.model).get_submodule("2")
    add_one(layer.parametrizations.weight.original)
    setattr(world.model, "2", layer)


def _write_unseen(world: Layers) -> None:
    world.site(4).original.data.add_(1)
    invalidate(world.model)


def _hook_on_an_activation(world: Layers) -> None:
    world.model.get_submodule("3").register_forward_hook(lambda module, args, out: out + 1)


def _hook_on_a_site(world: Layers) -> None:
    world.site(2).register_forward_hook(lambda module, args, out: out + 1)


def _hook_on_a_step(world: Layers) -> None:
    world.site(2).steps[0].register_forward_hook(lambda module, args, out: out + 1)


def _forward_of_its_own(world: Layers) -> None:
    world.model.get_submodule("1").forward = lambda x: x + 1


def _write_into_the_value(world: Layers) -> None:
    world.site(0).holding.kept["value"].value.add_(1)


def _convert(world: Layers) -> None:
    world.model.float()
    world.x = world.x.float()


def _load(world: Layers) -> None:
    world.model.load_state_dict({name: value + 1 for name, value in world.model.state_dict().items()})


CHANGES = [
    lambda world: add_one(world.site(4).original),
    lambda world: add_one(world.site(2).steps[0].scale),
    lambda world: setattr(world.site(2).steps[0], "power", 3.0),
    lambda world: setattr(world.site(0).original, "data", world.site(0).original.data.T),
    lambda world: setattr(world.site(0), "original", nn.Parameter(world.site(0).original.detach() + 1)),
    _optimizer_step,
    _other_bias,
    lambda world: add_one(world.model.get_submodule("2").bias),
    _other_activation,
    _other_layer,
    _write_unseen,
    _hook_on_an_activation,
    _hook_on_a_site,
    _hook_on_a_step,
    _forward_of_its_own,
    _write_into_the_value,
    _convert,
    _load,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_<>"))
def test_any_change_shows_in_the_next_forward_and_in_all_that_follow(
    world: Layers, change: Callable[[Layers], Any]
) -> None:
    with torch.no_grad():
        before = world.model(world.x)
    change(world)
    with torch.no_grad():
        for _ in range(4):
            out = world.model(world.x)
            torch.testing.assert_close(out, world.fresh(), rtol=0, atol=0)
    if change is not _write_into_the_value:
        assert not torch.equal(out.to(before.dtype), before)


@torch.no_grad()
def test_a_value_that_is_set_is_the_next_one() -> None:
    world = Layers(weights=["2.weight"], chain=["symmetric"])
    set_value(world.model, "2.weight", torch.ones(4, 4, dtype=torch.float64))
    for _ in range(3):
        torch.testing.assert_close(world.model(world.x), world.fresh())


@torch.no_grad()
def test_after_a_change_the_values_are_looked_at_together_again(world: Layers, looks: Callable[[], int]) -> None:
    for change in (lambda: add_one(world.site(2).original), lambda: _other_activation(world), world.model.eval):
        change()
        counts = []
        for _ in range(4):
            world.model(world.x)
            counts.append(looks())
        assert counts[0] == 3
        assert counts[-1] == 0


@torch.no_grad()
def test_a_hook_that_comes_and_goes_is_heeded_meanwhile(world: Layers, looks: Callable[[], int]) -> None:
    before = world.model(world.x)
    layer, site = world.model.get_submodule("1"), world.site(2)
    for module, register in (
        (layer, layer.register_forward_hook),
        (site, site.register_forward_hook),
        (site, register_module_forward_hook),
    ):
        called = []
        handle = register(lambda module, args, out, called=called: called.append(module))
        for _ in range(3):
            torch.testing.assert_close(world.model(world.x), before, rtol=0, atol=0)
        assert called.count(module) == 3
        handle.remove()
        world.settle()
        looks()
        torch.testing.assert_close(world.model(world.x), before, rtol=0, atol=0)
        assert looks() == 0


def _writing(world: Layers) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        add_one(world.site(4).original)

    return hook


def _hooked(layer: Any, write: Callable[..., None]) -> None:
    layer.register_forward_hook(write)


def _replaced(layer: Any, write: Callable[..., None]) -> None:
    forward = layer.forward

    def replaced(x: Tensor) -> Tensor:
        write(layer, (x,), x)
        return forward(x)

    layer.forward = replaced


@pytest.mark.parametrize("way", [_hooked, _replaced])
@torch.no_grad()
def test_what_is_written_on_the_way_counts_in_the_same_forward(
    world: Layers, way: Callable[[Any, Callable[..., None]], None]
) -> None:
    one, other = world, copy.deepcopy(world)
    way(one.model.get_submodule("1"), _writing(one))
    for _ in range(4):
        add_one(other.site(4).original)
        torch.testing.assert_close(one.model(one.x), other.model(other.x), rtol=0, atol=0)


fx.wrap("_unknown")
_WRITES: list[Tensor] = []


def _unknown(x: Tensor) -> Tensor:
    for tensor in _WRITES:
        add_one(tensor)
    return x * 1


class Calls(nn.Module):
    """Three layers with a function between the first and the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(_unknown(self.first(x))))


@pytest.fixture
def writes() -> Iterator[list[Tensor]]:
    yield _WRITES
    _WRITES.clear()


@torch.no_grad()
def test_values_behind_what_may_write_are_looked_at_where_they_are_used(
    looks: Callable[[], int], writes: list[Tensor]
) -> None:
    weights = [f"{name}.weight" for name in ("first", "second", "third")]
    world = Layers(Calls().double(), weights)
    looks()
    before = world.model(world.x)
    assert looks() == 2
    writes.append(world.model.second.parametrizations.weight.original)
    after = world.model(world.x)
    assert not torch.equal(before, after)
    writes.clear()
    torch.testing.assert_close(world.model(world.x), after, rtol=0, atol=0)


class Writer(Smooth):
    """Writes to what another chain reads."""

    def forward(self, X: Tensor) -> Tensor:
        return _unknown(super().forward(X))


@torch.no_grad()
def test_a_chain_that_is_evaluated_on_the_way_may_change_the_next_value(writes: list[Tensor]) -> None:
    rules = rule(["0.weight"], chain=[Writer()]), rule(["2.weight"], cache="version")
    world = Layers(model=rewritten(layers(), *rules))
    writes.append(world.site(2).original)
    for _ in range(3):
        before = world.site(2).original.clone()
        out = world.model(world.x)
        assert torch.equal(world.site(2).original, before + 1)
        writes.clear()
        torch.testing.assert_close(out, world.fresh(), rtol=0, atol=0)
        writes.append(world.site(2).original)


@torch.no_grad()
def test_a_graph_is_read_again_after_a_change_only(world: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(standing, "start_of", lambda model, start=standing.start_of: read.append(model) or start(model))
    world.settle()
    assert not read
    world.model.get_submodule("1").register_forward_hook(lambda module, args, out: None)
    for _ in range(3):
        world.settle()
    assert len(read) <= 1
