"""Writes in place to a value that is computed: nobody keeps them, and nobody loses them without being told."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rewriter import bake, rewrite
from rewriter.state import freeze, set_value, unfreeze

LOST = r"0\.weight was changed in place; it is computed by orthogonal, and the change is lost.*module\.weight = value"


def rewritten(capture: Any, *chain: str) -> Any:
    spec = {"reparam": 1, "rules": [{"name": "first", "select": "0.weight", "chain": list(chain or ["orthogonal"])}]}
    return rewrite(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), spec, capture=capture)


def write_an_entry(weight: Tensor) -> None:
    weight[0] = 1.0


def put_data(layer: Any) -> None:
    layer.weight.data = torch.eye(4)


WRITES: dict[str, Callable[[Any], Any]] = {
    "copy_": lambda layer: layer.weight.copy_(torch.eye(4)),
    "entry": lambda layer: write_an_entry(layer.weight),
    "init": lambda layer: nn.init.zeros_(layer.weight),
    "view": lambda layer: layer.weight.mT.add_(1),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "data": put_data,
    "through data": lambda layer: layer.weight.data.zero_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_outside_of_a_forward_warns_at_its_line(write: Callable[[Any], Any], capture: str) -> None:
    layer = rewritten(capture).get_submodule("0")
    before = layer.weight
    with torch.no_grad(), pytest.warns(UserWarning, match=LOST) as told:
        write(layer)
        after = layer.weight
    assert told[0].filename.endswith(("test_lost_writes.py", "linear.py"))
    assert torch.equal(after, before)


@pytest.mark.parametrize("write", ["init", "data", "through data"])
@pytest.mark.parametrize(
    "use",
    [
        lambda model: model(torch.ones(1, 4)),
        lambda model: model.state_dict(),
        copy.deepcopy,
        bake,
        lambda model: set_value(model, "0.weight", torch.eye(4)),
    ],
    ids=["forward", "state", "copy", "bake", "value"],
)
def test_the_next_use_of_the_model_warns_of_a_write(write: str, use: Callable[[Any], Any], capture: str) -> None:
    model = rewritten(capture)
    with torch.no_grad(), pytest.warns(UserWarning, match=LOST) as told:
        WRITES[write](model.get_submodule("0"))
        use(model)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(model)


def test_a_write_to_a_tensor_that_was_read_before_warns_when_it_is_gone(capture: str) -> None:
    layer = rewritten(capture).get_submodule("0")
    weight = layer.weight
    assert layer.weight.shape == (4, 4)
    with torch.no_grad(), pytest.warns(UserWarning, match=LOST):
        weight.zero_()
        del weight


def test_requires_grad_of_a_value_is_no_setting_of_the_model(capture: str) -> None:
    model = rewritten(capture).requires_grad_(False)
    with pytest.warns(UserWarning, match=r"requires_grad of 0\.weight was set to True.*state\.named_sites") as told:
        model.get_submodule("0").weight.requires_grad = True
        model(torch.ones(1, 4))
    assert told[0].filename == __file__
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("write", ["copy_", "data", "through data"])
def test_a_write_does_not_reach_a_frozen_value(write: str, capture: str) -> None:
    model, x = rewritten(capture), torch.randn(2, 4)
    before = model(x)
    freeze(model)
    with torch.no_grad(), pytest.warns(UserWarning, match=LOST):
        WRITES[write](model.get_submodule("0"))
        assert torch.equal(model(x), before)
    assert torch.equal(bake(model)(x), before)
    unfreeze(model)
    assert torch.equal(model(x), before)


def test_reading_computing_and_assigning_are_no_writes(capture: str) -> None:
    model, x = rewritten(capture), torch.randn(2, 4)
    layer = model.get_submodule("0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight = layer.weight
        (weight.square().sum() + (weight + 1).sum()).backward()
        del weight
        layer.weight = torch.eye(4)
        set_value(model, "0.weight", torch.eye(4))
        model(x).sum().backward()
        for _ in range(2):
            with torch.no_grad():
                model(x)
        torch.func.functional_call(model, dict(model.named_parameters()), x)
        torch.func.vmap(model)(x)
        gc.collect()


def test_a_value_in_the_memory_of_what_is_stored_keeps_what_is_written() -> None:
    layer = rewritten("module", "identity").get_submodule("0")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        layer.weight.zero_()
        gc.collect()
    assert not layer.weight.any()


def test_a_change_of_what_a_value_is_computed_from_is_no_write(capture: str) -> None:
    spec = {"reparam": 1, "rules": [{"name": "t", "select": "1.weight", "from": "0.weight", "chain": ["transpose"]}]}
    model: Any = rewrite(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)), spec, capture=capture)
    weight = model[1].weight
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model[0].weight.mul_(2)
        torch.testing.assert_close(model[1].weight, model[0].weight.mT)
    assert torch.equal(weight, model[0].weight.mT)


class Clips(nn.Module):
    """Clips its weight in every forward, as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return x @ self.weight


def test_a_forward_that_writes_to_a_weight_warns_how_long_that_lasts() -> None:
    spec = {"reparam": 1, "rules": [{"name": "w", "select": "weight", "chain": ["symmetric"]}]}
    model = rewrite(Clips(), spec, capture="module")
    with pytest.warns(UserWarning, match="weight was changed in place.*lasts for this forward only"):
        value = model(torch.eye(4))
    assert value.abs().max() <= 0.1 < model.weight.abs().max()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_renormalizes_its_weight_does_so_in_every_forward(kind: Any, capture: Any) -> None:
    plain = nn.Sequential(kind(5, 3, max_norm=0.5))
    spec = {"reparam": 1, "rules": [{"name": "w", "select": "0.weight", "chain": ["weight_norm"]}]}
    model, x = rewrite(plain, spec, capture=capture), torch.tensor([[0, 1], [1, 4]])
    expected = functional.embedding(x, plain[0].weight.detach().clone(), max_norm=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model(x), model(x)
        gc.collect()
    torch.testing.assert_close(found[0], expected if kind is nn.Embedding else expected.mean(1))
    assert torch.equal(*found)


class Gives(nn.Module):
    """Returns its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self) -> Tensor:
        return self.weight


def test_a_frozen_value_that_the_forward_gave_away_can_be_written_to(capture: str) -> None:
    spec = {"reparam": 1, "rules": [{"name": "w", "select": "weight", "chain": ["symmetric"]}]}
    model = rewrite(Gives(), spec, capture=capture)
    freeze(model)
    before = model().clone()
    model().zero_()
    assert torch.equal(model(), before)


def test_a_forward_that_writes_to_a_frozen_weight_gives_the_same_each_time() -> None:
    spec = {"reparam": 1, "rules": [{"name": "w", "select": "weight", "chain": ["symmetric"]}]}
    model = rewrite(Clips(), spec, capture="module")
    freeze(model)
    with pytest.warns(UserWarning, match="lasts for this forward only"):
        model(torch.eye(4))
    assert model.weight.abs().max() > 0.1
