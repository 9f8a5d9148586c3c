"""A model that torch.fx cannot trace, rewritten with a chain that counts its evaluations."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from rewriter import bake, rewrite


class Count(nn.Module):
    """Halves the tensor; counts evaluations in all threads."""

    total = 0
    lock = threading.Lock()

    def forward(self, X: Tensor) -> Tensor:
        with Count.lock:
            Count.total += 1
        return X / 2


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(h @ self.weight)


class Untraceable(nn.Module):
    """A loop whose length depends on data, with its own tensors and those of two submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)
        self.body = nn.Sequential(Step(), nn.Linear(4, 4))
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.weight

    def forward(self, x: Tensor, *, times: int = 3) -> Tensor:
        """Apply everything, several times."""
        for _ in range(times):
            if x.sum() > 1e9:
                x = x * 0
            x = torch.tanh(self.tied(self.body(x)) + x @ self.weight)
        return x

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    @property
    def width(self) -> int:
        return self.weight.shape[0]


SPEC = {"reparam": 1, "rules": [{"name": "all", "select": "**.weight", "chain": [Count()]}]}
SITES = 3


def rewritten(model: nn.Module | None = None, chain: Any = None, cache: str = "forward", **options: Any) -> Any:
    rule = {"name": "all", "select": "**.weight", "chain": chain or [Count()], "cache": cache}
    new = rewrite(model or Untraceable(), {"reparam": 1, "rules": [rule]}, capture="module", **options)
    Count.total = 0
    return new


def halved(model: nn.Module) -> Any:
    """What a model rewritten with `Count` computes: plain tensors, half of what is stored."""
    plain = bake(model)
    Count.total = 0
    return plain
