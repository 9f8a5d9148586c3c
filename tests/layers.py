"""A model of three layers whose cached values stay valid between forwards."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rewriter import rewrite
from tests.maps import Smooth

WEIGHTS = ["0.weight", "2.weight", "4.weight"]


def rule(select: Any, **options: Any) -> dict[str, Any]:
    chain = options.pop("chain", [Smooth()])
    return {"name": "-".join([*select]).replace(".", "-"), "select": select, "chain": chain, "init": "raw", **options}


def rewritten(plain: nn.Module, *rules: dict[str, Any]) -> nn.Module:
    return rewrite(plain, {"reparam": 1, "rules": [*rules]}, capture="graph")


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()


class Layers:
    """A model of three layers under ``cache: version``, after three forwards: its values are cached.

    Arguments:
        plain: the model to rewrite.
        weights: names of the computed tensors.
        model: a rewritten model to use instead.
        options: of the rules.
    """

    def __init__(
        self, plain: nn.Module | None = None, weights: list[str] = WEIGHTS, model: Any = None, **options: Any
    ) -> None:
        rules = [rule([name], cache="version", **options) for name in weights]
        self.model: Any = model or rewritten(plain or layers(), *rules)
        self.x = torch.randn(2, 4, dtype=torch.float64)
        self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        for _ in range(3):
            self.model(self.x)

    def site(self, layer: int) -> Any:
        return self.model.get_submodule(f"{layer}.parametrizations.weight")

    def fresh(self) -> Tensor:
        return copy.deepcopy(self.model)(self.x)


def add_one(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1)


def doubled(model: nn.Module) -> nn.Module:
    clone = copy.deepcopy(model)
    for parameter in clone.parameters():
        parameter.mul_(2)
    return clone
