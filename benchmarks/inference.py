"""Forwards without gradients: cached values, and baked models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

import rewriter
from benchmarks._measure import Spread, interleaved
from benchmarks._models import Recurrent, by_torch, spec_of
from benchmarks._report import Bound, Group, Row
from benchmarks._settings import Settings

VERSION = 1.05
BAKED = (0.97, 1.03)


def measure(settings: Settings) -> Group:
    """Time the forward of an RNN and of a stack of linear layers, in evaluation mode and without gradients."""
    steps, width, batch = (10, 16, 4) if settings.quick else (100, 128, 32)
    group = Group(
        "Inference",
        f"Forward without gradients, orthogonal weights (Cayley map). The RNN: {steps} steps, {width} units, batch "
        f"{batch}. The layers: four linear ones of {4 * width}×{4 * width} with ReLU, batch {2 * batch}. *version* "
        "reuses the cached values while nothing they depend on changes.",
    )
    torch.manual_seed(0)
    rnn = Recurrent(steps, width).to(settings.device)
    wide = [nn.Sequential(nn.Linear(4 * width, 4 * width), nn.ReLU()) for _ in range(4)]
    layers = nn.Sequential(*(module for pair in wide for module in pair)).to(settings.device)
    works = {
        "RNN": (rnn, ["recurrent.weight"], torch.randn(steps, batch, width, device=settings.device)),
        "layers": (
            layers,
            [f"{2 * i}.weight" for i in range(4)],
            torch.randn(2 * batch, 4 * width, device=settings.device),
        ),
    }
    for work, (plain, tensors, x) in works.items():
        _measure(settings, group, work, plain, tensors, x)
    return group


def _measure(settings: Settings, group: Group, work: str, plain: nn.Module, tensors: list[str], x: Tensor) -> None:
    ours = rewriter.rewrite(plain, spec_of("cayley", tensors, cache="version"))
    in_place = rewriter.rewrite(plain, spec_of("cayley", tensors, cache="version"), capture="module")
    baked = rewriter.bake(ours)
    contenders = {
        "plain": _forward(plain, x),
        "version": _forward(ours, x),
        "version, module": _forward(in_place, x),
        "baked": _forward(baked, x),
        "torch uncached": _forward(by_torch(plain, "cayley", tensors), x),
    }
    timings = interleaved(contenders, settings.rounds(120), device=settings.device)
    group.add_times(work, timings)
    for name in ("version", "version, module"):
        group.costs(work, timings, name, "plain", settings.asked(VERSION))
    measured: Spread = timings.ratio("baked", "plain")
    bound = None if settings.asked(1) is None else Bound(*BAKED)
    group.rows.append(Row(f"{work}: baked", "time", "plain", bound, measured, ("same graph", _same(baked, plain))))


def _forward(model: nn.Module, x: Tensor) -> Callable[[], None]:
    model.eval()

    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def _same(baked: nn.Module, plain: nn.Module) -> bool:
    graphs = [str(fx.symbolic_trace(model).graph) for model in (baked, plain)]
    return (
        type(baked) is type(plain) and list(baked.state_dict()) == list(plain.state_dict()) and graphs[0] == graphs[1]
    )
