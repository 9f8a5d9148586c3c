"""Writes in place to a value that is computed: nobody keeps them, and nobody loses them without being told."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rewriter import rewrite
from rewriter.state import set_value

LOST = r"0\.weight was changed in place; it is computed by orthogonal, and the change is lost.*module\.weight = value"


def rewritten(capture: Any, *chain: str) -> Any:
    spec = {"reparam": 1, "rules": [{"name": "first", "select": "0.weight", "chain": list(chain or ["orthogonal"])}]}
    return rewrite(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), spec, capture=capture)


def write_an_entry(weight: Tensor) -> None:
    weight[0] = 1.0


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.copy_(torch.eye(4)),
        lambda layer: write_an_entry(layer.weight),
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: layer.weight.mT.add_(1),
        lambda layer: layer.reset_parameters(),
    ],
    ids=["copy_", "entry", "init", "view", "reset_parameters"],
)
def test_a_write_outside_of_a_forward_warns_at_its_line(write: Callable[[Any], Any], capture: str) -> None:
    layer = rewritten(capture).get_submodule("0")
    before = layer.weight
    with torch.no_grad(), pytest.warns(UserWarning, match=LOST) as told:
        write(layer)
    assert told[0].filename.endswith(("test_lost_writes.py", "linear.py"))
    assert torch.equal(layer.weight, before)


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
