"""Settings that change in place after a graph took them over: the graph goes on with the old ones, and says so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import bake, rewrite


class Options:
    def __init__(self) -> None:
        self.gain = 2.0


class Configured(nn.Module):
    """Reads settings of every kind that can change in place."""

    power = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Tanh()])
        self.options = Options()
        self.table = {"shift": 1.0}
        self.functions = [torch.relu]
        self.losses: list[float] = []

    def log(self, loss: float) -> None:
        self.losses.append(loss)

    def finish(self, x: Tensor) -> Tensor:
        return x**self.power

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        for function in self.functions:
            x = function(x)
        return self.finish(x * self.options.gain + self.table["shift"])


IN_PLACE = {
    "options": lambda model: setattr(model.options, "gain", 3.0),
    "table": lambda model: model.table.update(shift=2.0),
    "functions": lambda model: model.functions.append(torch.tanh),
    "layers": lambda model: model.layers.append(nn.Tanh()),
    "Configured.power": lambda model: setattr(Configured, "power", 2.0),
    "Configured.finish": lambda model: setattr(Configured, "finish", lambda self, x: x),
    "Configured.forward": lambda model: setattr(Configured, "forward", lambda self, x: x),
}


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("use", [lambda m: m(torch.ones(1, 4)), bake, copy.deepcopy], ids=["run", "bake", "copy"])
def test_a_setting_that_changes_in_place_is_named(kind: str, use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("power", "finish", "forward"):
        monkeypatch.setattr(Configured, name, vars(Configured)[name])
    spec = {"reparam": 1, "rules": [{"name": "w", "select": "layers.0.weight", "chain": ["weight_norm"]}]}
    model: Any = rewrite(Configured(), spec, capture="graph")
    IN_PLACE[kind](model)
    with pytest.warns(UserWarning, match=f"{kind} has changed, and the graph of the rewritten model goes on with"):
        use(model)
    use(model)  # says it once


def test_what_the_forward_does_not_read_changes_in_silence() -> None:
    spec = {"reparam": 1, "rules": [{"name": "w", "select": "layers.0.weight", "chain": ["weight_norm"]}]}
    model: Any = rewrite(Configured(), spec, capture="graph")
    model.losses.append(1.0)
    model.table["shift"] = 1.0
    model(torch.ones(1, 4))
