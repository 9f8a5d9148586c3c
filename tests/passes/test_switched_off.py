"""Each optional pass can be left out, and leaving it out changes no number."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import RewriterError, bake, evaluate_once, rewrite
from rewriter.passes import OPTIONAL, print_graph
from rewriter.state import freeze, unfreeze

PASSES = sorted(step.name for step in OPTIONAL)


class _Net(nn.Module):
    """A recurrent cell with inputs of its own, beside layers that are alike; one of them is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.input = nn.RNNCell(6, 6), nn.Linear(6, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.frozen, self.adapted = nn.Linear(6, 6), nn.Linear(6, 4096)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        steps = torch.stack([x / (1 + step) for step in range(10)])
        for step in range(10):
            h = self.cell(x, h) + self.input(steps[step])
            h = self.frozen(h)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return self.adapted(h)


SPEC = {
    "reparam": 1,
    "rules": [
        {"name": "alike", "select": "layers.*.weight", "chain": [{"orthogonal": {"map": "householder"}}]},
        {
            "name": "cell",
            "select": "cell.weight_*h",
            "chain": [{"scale": {"factor": 2.0}}, {"scale": {"factor": 0.25}}],
        },
        {"name": "frozen", "select": "frozen.weight", "chain": [{"scale": {"factor": 0.5}}, {"lora": {"r": 2}}]},
        {"name": "adapted", "select": "adapted.weight", "chain": [{"lora": {"r": 1}}]},
    ],
}


def _rewritten(capture: str, without: list[str]) -> nn.Module:
    torch.manual_seed(0)
    return rewrite(_Net(), SPEC, capture=capture, without=without)


def _results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What a model gives in every way it can be run."""
    found = [model(x)]
    found[0].square().sum().backward()
    found += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with torch.no_grad():
        found += [model(x), model(x)]
    model.zero_grad()
    with evaluate_once(model):
        model(x).sum().backward()
        model(2 * x).sum().backward()
    found += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
        found.append(model(x))
    freeze(model)
    found.append(model(x))
    unfreeze(model)
    found += [copy.deepcopy(model)(x), bake(model)(x), *model.state_dict().values()]
    return [tensor.detach().clone() for tensor in found]


X = torch.linspace(-1, 1, 18).reshape(3, 6)


@functools.cache
def _with_all_passes(capture: str) -> tuple[Tensor, list[Tensor]]:
    model = _rewritten(capture, [])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(X).detach()
    return rounded, _results(model, X)


@pytest.mark.parametrize("without", [[name] for name in PASSES] + [PASSES], ids=" ".join)
def test_leaving_a_pass_out_changes_no_number(capture: str, without: list[str]) -> None:
    rounded, whole = _with_all_passes(capture)
    less = _rewritten(capture, without)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(less(X), rounded, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(_results(less, X), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PASSES)
def test_each_pass_shows_in_the_graph_it_was_at(name: str) -> None:
    whole, less = _rewritten("graph", []), _rewritten("graph", [name])
    assert print_graph(whole) != print_graph(less)


def test_memory_and_batch_are_switched_off_in_the_spec_too() -> None:
    x, expected = torch.randn(3, 6), None
    for options in ({}, {"memory": "recompute"}, {"batch": "never"}, {"cache": "never"}, {"cache": "version"}):
        torch.manual_seed(0)
        spec: Any = {"reparam": 1, "rules": [{**rule, **options} for rule in SPEC["rules"]]}
        value = rewrite(_Net(), spec)(x).detach()
        expected = value if expected is None else expected
        torch.testing.assert_close(value, expected)


def test_an_unknown_pass_is_refused() -> None:
    with pytest.raises(RewriterError, match=r"without: insert is none of .*batch"):
        _rewritten("graph", ["insert"])
