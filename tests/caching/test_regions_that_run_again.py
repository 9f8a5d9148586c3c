"""Activation checkpointing of both kinds: a region that runs again has the states and random numbers that it had."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewriter import RewriterError, rewrite

Run = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
KINDS: dict[str, Run] = {
    "not reentrant": lambda part, x: checkpoint(part, x, use_reentrant=False),
    "reentrant": lambda part, x: checkpoint(part, x, use_reentrant=True),
}


def _at_once(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return part(x)


class Growing(nn.Module):
    """A state that doubles with each evaluation in train mode, and a random mask there."""

    stateful = True
    random = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("size", torch.ones((), dtype=torch.float64))

    def forward(self, X: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.size.mul_(2)
            X = X * torch.rand_like(X)
        return X * self.size.clone()


class Layers(nn.Module):
    """One layer that is used twice, in one region or in two."""

    def __init__(self, run: Run, regions: int) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.run = run
        self.regions = regions

    def part(self, x: Tensor) -> Tensor:
        for _ in range(2 // self.regions):
            x = torch.dropout(torch.tanh(self.layer(x)), 0.3, True)
        return x

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.regions):
            x = self.run(self.part, x)
        return x


def _gradients(model: nn.Module, run: Run, spec: Any, capture: str) -> tuple[list[Any], dict[str, Tensor]]:
    torch.manual_seed(0)
    new = rewrite(model.double(), spec, capture=capture)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6).requires_grad_()
    loss = run(new, x).square().sum() + 2 * run(new, x).square().sum()  # two forwards, then one backward
    loss.backward()
    return [parameter.grad for parameter in new.parameters()], dict(new.named_buffers())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["forward", "never", "version"])
def test_a_whole_model(capture: str, kind: str, cache: str, spec: Any) -> None:
    made = spec("*.weight", Growing(), cache=cache, init="raw")
    results = []
    for run in (_at_once, KINDS[kind]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 6))
        results.append(_gradients(model, run, made, capture))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "cache", "regions"),
    [
        ("not reentrant", "forward", 1),
        ("not reentrant", "forward", 2),
        ("not reentrant", "never", 1),
        ("not reentrant", "never", 2),
        ("reentrant", "forward", 1),
        ("reentrant", "never", 1),
        ("reentrant", "never", 2),
    ],
)
def test_regions_of_a_model(kind: str, cache: str, regions: int, spec: Any) -> None:
    made = spec("layer.weight", Growing(), cache=cache, init="raw")
    results = []
    for run in (_at_once, KINDS[kind]):
        torch.manual_seed(1)
        results.append(_gradients(Layers(run, regions), _at_once, made, "module"))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cache", ["forward", "never"])
def test_regions_of_a_part_that_a_graph_calls(cache: str, spec: Any) -> None:
    made = spec("*.layer.weight", Growing(), cache=cache, init="raw")
    results = []
    for run, capture in ((_at_once, "module"), (KINDS["not reentrant"], "graph")):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 6), Layers(run, 2))
        results.append(_gradients(model, _at_once, made, capture))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_a_reentrant_region_cannot_find_what_was_drawn_before_it(spec: Any) -> None:
    made = spec("layer.weight", {"weight_dropout": {"p": 0.5}})
    new = rewrite(Layers(KINDS["reentrant"], 2), made, capture="module")
    with pytest.raises(RewriterError, match=r"layer\.weight: its chain drew random numbers.*use_reentrant=False"):
        new(torch.randn(2, 6).requires_grad_()).sum().backward()
    new.eval()(torch.randn(2, 6).requires_grad_()).sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_drawn_again_where_the_random_state_is_not_preserved(kind: str, spec: Any) -> None:
    """Then a region that runs again does not move the generators back."""
    new = rewrite(nn.Sequential(nn.Linear(6, 6)), spec("0.weight", {"weight_dropout": {"p": 0.5}}), capture="module")
    x = torch.randn(2, 6).requires_grad_()
    loss = checkpoint(new, x, use_reentrant=kind == "reentrant", preserve_rng_state=False).sum()
    drawn = torch.rand(8)
    loss.backward()
    assert not torch.equal(torch.rand(8), drawn)


@pytest.mark.parametrize(
    "chain", ["growing", *(pytest.param(chain, marks=pytest.mark.slow) for chain in ("symmetric", "spectral_norm"))]
)
def test_in_a_compiled_model(chain: str, spec: Any) -> None:
    torch._dynamo.reset()
    made = spec("layer.weight", Growing() if chain == "growing" else chain, init="raw")
    model = rewrite(Layers(KINDS["not reentrant"], 2).double(), made, capture="module")
    compiled = copy.deepcopy(model)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6)
    for run in (model, torch.compile(compiled, backend="aot_eager")):
        torch.manual_seed(0)
        for _ in range(2):
            run(x).square().sum().backward()
    for one, other in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
