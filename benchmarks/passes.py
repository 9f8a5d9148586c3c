"""The optional passes, each on a workload that it is for: the training step with it and without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rewriter
from benchmarks import _networks as networks
from benchmarks._measure import interleaved
from benchmarks._models import Recurrent, as_trained, training_step
from benchmarks._report import Group
from benchmarks._settings import Settings

EARNS = 0.95
"""A pass stays while one of its rows takes at most this part of the time without it."""


@dataclass(frozen=True)
class Work:
    """One model for one pass.

    Arguments:
        passed: the pass that is left out for comparison.
        name: of the model, for the tables.
        build: the plain model.
        batch: shape of the input.
        chain: of the weights that `select` names.
        select: of the rule.
        autocast: run the forward under bfloat16 autocast.
    """

    passed: str
    name: str
    build: Callable[[], nn.Module]
    batch: tuple[int, ...]
    chain: list[Any]
    select: Any
    autocast: bool = False


def _layers(count: int, width: int) -> nn.Module:
    pairs = [(nn.Linear(width, width), nn.Tanh()) for _ in range(count)]
    return nn.Sequential(*(module for pair in pairs for module in pair))


def _recurrent() -> nn.Module:
    return Recurrent(100, 128)


def _frozen(build: Callable[[int], nn.Module], width: int) -> Callable[[], nn.Module]:
    return lambda: build(width).requires_grad_(False)


LINEAR = {"module": "torch.nn.Linear", "tensor": "weight"}
QUERY_AND_VALUE = "*.0.body.1.{query,value}.weight"
LORA = {"lora": {"r": 8, "lora_alpha": 16}}
PRUNED = [{"l1_unstructured": {"amount": amount}} for amount in (0.2, 0.4, 0.6, 0.8)]
RNN = ("RNN, 100 steps, 128 units, cayley", _recurrent, (100, 16, 128), [{"orthogonal": {"map": "cayley"}}])
HOUSEHOLDER = {"orthogonal": {"map": "householder"}}

WORKS = [
    Work("batch", "48 layers 16×16, householder", lambda: _layers(48, 16), (32, 16), [HOUSEHOLDER], LINEAR),
    Work("batch", "MLP d=64, spectral norm", lambda: networks.mlp(64), (32, 64), ["spectral_norm"], LINEAR),
    Work("batch", "MLP d=64, weight norm", lambda: networks.mlp(64), (32, 64), ["weight_norm"], LINEAR),
    Work("hoist", "transformer d=64, 2:4 sparse and frozen, LoRA", _frozen(networks.transformer, 64), (8, 32, 64),
         [{"n_m": {"n": 2, "m": 4}}, LORA], QUERY_AND_VALUE),
    Work("hoist", "MLP d=256, orthogonal and frozen, LoRA", _frozen(networks.mlp, 256), (32, 256),
         [{"orthogonal": {"map": "cayley"}}, LORA], LINEAR),
    Work("fuse", "MLP d=64, pruned in four rounds", lambda: networks.mlp(64), (32, 64), PRUNED, LINEAR),
    Work("fuse", "MLP d=256, pruned in four rounds", lambda: networks.mlp(256), (32, 256), PRUNED, LINEAR),
    Work("cast", f"{RNN[0]}, bfloat16 autocast", *RNN[1:], "recurrent.weight", autocast=True),
    Work("cast", "RNN, 100 steps, 256 units, batch 4, cayley, bfloat16 autocast", lambda: Recurrent(100, 256),
         (100, 4, 256), RNN[3], "recurrent.weight", autocast=True),
    Work("apart", "transformer d=256, LoRA", _frozen(networks.transformer, 256), (8, 64, 256), [LORA], LINEAR),
    Work("apart", "transformer d=192, LoRA", _frozen(networks.transformer, 192), (8, 32, 192), [LORA], LINEAR),
    Work("rows", *RNN, "recurrent.weight"),
    Work("transpose", *RNN, "recurrent.weight"),
]  # fmt: skip


def measure(settings: Settings) -> Group:
    """Time a training step of each model with the pass and without it."""
    group = Group(
        "What each optional pass earns, one training step",
        "The same model rewritten with all passes, and with all but one. A pass needs a row here that is met. A quick "
        "run has the same models and 15 rounds.",
    )
    for work in WORKS:
        torch.manual_seed(0)
        model, x = work.build().to(settings.device), torch.randn(work.batch, device=settings.device)
        contenders = {
            "with": _step(_rewritten(model, work), x, work.autocast),
            "without": _step(_rewritten(model, work, without=work.passed), x, work.autocast),
        }
        timings = interleaved(contenders, 15 if settings.quick else 60, device=settings.device)
        name = f"{work.passed}: {work.name}"
        group.add_times(name, timings)
        group.costs(name, timings, "with", "without", settings.asked(EARNS))
    return group


def _rewritten(model: nn.Module, work: Work, **options: Any) -> nn.Module:
    rule = {"name": "weights", "select": work.select, "chain": work.chain}
    torch.manual_seed(0)  # adapters draw their first values
    return as_trained(rewriter.rewrite(model, {"reparam": 1, "rules": [rule]}, **options))


def _step(model: nn.Module, x: Tensor, autocast: bool) -> Callable[[], None]:
    return training_step(_Autocast(model) if autocast else model, x)


class _Autocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            output: Tensor = self.model(x)
        return output.float()
