"""The time of rewriting, and of a rewritten forward compared with one written by hand."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import rewriter
from benchmarks._measure import Spread, interleaved, slope
from benchmarks._models import spec_of, training_step
from benchmarks._report import Bound, Group, Row
from benchmarks._settings import Settings

SLOPE = 1.1
TRACE = 3.0
BY_HAND = 1.05


def measure(settings: Settings) -> Group:
    """Time plan and rewrite for several numbers of layers, and a forward of a rewritten model."""
    sizes = (20, 40, 80) if settings.quick else (1000, 2000, 5000, 10000)
    group = Group(
        "Rewriting",
        f"{sizes[0]:,} to {sizes[-1]:,} linear layers of 8×8, all selected (weight norm). The slope is that of log "
        "processor time against log n. Python's garbage collector is on, as it is for users; rewrite pauses it. The "
        "forward: eight linear layers of 256×256 with weight norm, batch 64, against a forward that evaluates the "
        "same chains first and passes the weights explicitly.",
    )
    _growth(group, settings, sizes)
    _against_tracing(group, settings, sizes[-1])
    _forward(group, settings)
    return group


def _growth(group: Group, settings: Settings, sizes: Sequence[int]) -> None:
    spec = spec_of("weight_norm")
    rounds: list[list[float]] = []
    for _ in range(settings.rounds(3)):
        rounds.append([])
        for size in sizes:
            model = _layers(size)
            gc.collect()
            begin = time.process_time()
            rewriter.plan(model, spec)
            rewriter.rewrite(model, spec)
            rounds[-1].append(time.process_time() - begin)
    asked = settings.asked(SLOPE)
    slopes = Spread.of([slope(sizes, seconds) for seconds in rounds])
    bound = None if asked is None else Bound(high=asked)
    group.rows.append(Row("plan and rewrite", "slope", "number of layers", bound, slopes))
    group.times["plan and rewrite"] = {
        f"{size:,} layers": Spread.of(seconds) for size, seconds in zip(sizes, zip(*rounds, strict=True), strict=True)
    }


def _against_tracing(group: Group, settings: Settings, size: int) -> None:
    spec = spec_of("weight_norm")

    def rewrite(model: nn.Module) -> None:
        rewriter.rewrite(model, spec, inplace=True)

    contenders: dict[str, Callable[[nn.Module], object]] = {
        "rewrite inplace": rewrite,
        "symbolic_trace": fx.symbolic_trace,
    }
    timings = interleaved(contenders, settings.rounds(7), prepare=lambda: _layers(size), warm_up=1, collecting=True)
    work = f"{size:,} layers"
    group.add_times(work, timings)
    group.costs(work, timings, "rewrite inplace", "symbolic_trace", settings.asked(TRACE))


def _layers(count: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(count)))


class ByHand(nn.Module):
    """Linear layers whose weights are computed first and passed explicitly.

    Arguments:
        rewritten: a sequence of rewritten linear layers, whose chains and tensors are used.
        count: how many.
    """

    def __init__(self, rewritten: nn.Module, count: int) -> None:
        super().__init__()
        sites = [rewritten.get_submodule(f"{index}.parametrizations.weight") for index in range(count)]
        self.chains = nn.ModuleList(site.get_submodule("0") for site in sites)
        self.first = nn.ParameterList(site.original0 for site in sites)
        self.second = nn.ParameterList(site.original1 for site in sites)
        self.biases = nn.ParameterList(rewritten.get_submodule(str(index)).bias for index in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Return the last layer's output."""
        for chain, first, second, bias in zip(self.chains, self.first, self.second, self.biases, strict=True):
            x = F.linear(x, chain(first, second), bias)
        return x


def _forward(group: Group, settings: Settings) -> None:
    width, batch, count = (16, 4, 8) if settings.quick else (256, 64, 8)
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(width, width) for _ in range(count))).to(settings.device)
    x = torch.randn(batch, width, device=settings.device)
    ours = rewriter.rewrite(plain, spec_of("weight_norm"), capture="graph")
    in_place = rewriter.rewrite(plain, spec_of("weight_norm"), capture="module")
    models = {"plain": plain, "by hand": ByHand(ours, count), "graph": ours, "module": in_place}
    for work, contenders in {
        "forward": {name: lambda model=model: model(x) for name, model in models.items()},
        "training step": {name: training_step(model, x) for name, model in models.items()},
    }.items():
        timings = interleaved(contenders, settings.rounds(60), device=settings.device)
        group.add_times(work, timings)
        for name in ("graph", "module"):
            group.costs(work, timings, name, "by hand", settings.asked(BY_HAND) if name == "graph" else None)
