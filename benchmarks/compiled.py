"""Training steps under torch.compile, against torch's parametrizations compiled the same way."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

import rewriter
from benchmarks import _networks as networks
from benchmarks._measure import interleaved
from benchmarks._models import by_torch, spec_of, training_step
from benchmarks._report import Group
from benchmarks._settings import Settings

CHAINS = ("spectral_norm", "weight_norm", "cayley")
AGAINST_TORCH = 1 / 1.02
WIDTH = 64


def measure(settings: Settings) -> Group:
    """Time the training step of one network with each chain, compiled by inductor."""
    group = Group(
        "Compiled, one training step",
        f"The MLP of the ordinary networks at width {WIDTH}, by `torch.compile(model, fullgraph=True)`: forward and "
        "backward are compiled, the optimizer is not. Compilation is not part of the time.",
    )
    for by in CHAINS[:1] if settings.quick else CHAINS:
        torch.manual_seed(0)
        torch.compiler.reset()
        plain = networks.mlp(WIDTH).to(settings.device)
        tensors = [f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, nn.Linear)]
        new, x = rewriter.rewrite(plain, spec_of(by, tensors)), torch.randn(32, WIDTH, device=settings.device)
        contenders = {
            "plain": _compiled(rewriter.bake(new), x),
            "ours": _compiled(new, x),
            "torch": _compiled(by_torch(copy.deepcopy(plain), by, tensors), x),
        }
        timings = interleaved(contenders, settings.rounds(40), device=settings.device)
        group.add_times(f"MLP d={WIDTH}, {by}", timings)
        group.costs(f"MLP d={WIDTH}, {by}", timings, "ours", "plain", None)
        group.faster(f"MLP d={WIDTH}, {by}", timings, "ours", "torch", settings.asked(AGAINST_TORCH))
    return group


def _compiled(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    step = training_step(torch.compile(model, fullgraph=True), x)  # type: ignore[arg-type]
    for _ in range(3):
        step()
    return step
