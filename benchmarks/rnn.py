"""The training step of an unrolled RNN, which gains most from one evaluation per forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import rewriter
from benchmarks._measure import Spread, interleaved, peak_bytes
from benchmarks._models import (
    ORTHOGONAL,
    Recurrent,
    RecurrentByHand,
    as_trained,
    by_geotorch,
    by_torch,
    spec_of,
    training_step,
    under_cached,
)
from benchmarks._report import Bound, Group, Row
from benchmarks._settings import Settings

NAMES = (*ORTHOGONAL, "spectral_norm", "weight_norm")
UNCACHED = {"householder": 30.0, "matrix_exp": 10.0}
CACHED = {"householder": 1.3, "matrix_exp": 1.4, "cayley": 1 / 1.02, "spectral_norm": 1 / 1.02, "weight_norm": 1 / 1.02}
PLAIN = {"householder": 1.12, "spectral_norm": 1.12, "weight_norm": 1.12, "cayley": 1.15, "matrix_exp": 1.3}
MODULE_CACHED = 1 / 1.02
BY_HAND = 1.05
BY_ROWS = "graph, row by row"
MEMORY = 1 / 5

Step = Callable[[], None]


def measure(settings: Settings) -> Group:
    """Time the step for each parametrization of the recurrent weight, and find its peak memory."""
    steps, width, batch = (10, 16, 4) if settings.quick else (100, 128, 16)
    group = Group(
        "Unrolled RNN, one training step",
        f"{steps} steps, {width} units, batch {batch}. The recurrent weight is parametrized; its originals are as some "
        "way into training. *graph*: the traced model, with the loop written out and one product for all inputs. *row "
        "by row*: the same without that product. *module*: the class and its loop stay. *by hand*: the chain is "
        "evaluated once and each step gets the weight. Memory is the peak of the tensors that a step makes.",
    )
    torch.manual_seed(0)
    plain = Recurrent(steps, width).to(settings.device)
    x = torch.randn(steps, batch, width, device=settings.device)
    for name in NAMES:
        contenders = _contenders(plain, name, x)
        timings = interleaved(contenders, settings.rounds(60), device=settings.device)
        group.add_times(name, timings)
        for ours in ("graph", "module"):
            if name in UNCACHED:
                group.faster(name, timings, ours, "torch uncached", settings.asked(UNCACHED[name]))
            cached = CACHED[name] if ours == "graph" else MODULE_CACHED
            group.faster(name, timings, ours, "torch cached", settings.asked(cached))
            group.costs(name, timings, ours, "plain", settings.asked(PLAIN[name]))
            group.costs(name, timings, ours, "by hand", settings.asked(BY_HAND))
        group.faster(name, timings, BY_ROWS, "torch cached", None)
        group.costs(name, timings, BY_ROWS, "plain", None)
        if name in ORTHOGONAL:
            group.rows += _memory(settings, name, contenders)
    return group


def _contenders(plain: Recurrent, name: str, x: Tensor) -> dict[str, Step]:
    spec, tensors = spec_of(name, "recurrent.weight"), ["recurrent.weight"]
    graph = as_trained(rewriter.rewrite(plain, spec, capture="graph"))
    site = graph.get_submodule("recurrent.parametrizations.weight")
    models: dict[str, nn.Module | None] = {
        "plain": plain,
        "by hand": RecurrentByHand(plain, site.get_submodule("0"), list(site.parameters(recurse=False))),
        "graph": graph,
        BY_ROWS: rewriter.rewrite(plain, spec, capture="graph", without="rows"),
        "module": rewriter.rewrite(plain, spec, capture="module"),
        "torch uncached": by_torch(plain, name, tensors),
        "geotorch uncached": by_geotorch(plain, name, tensors),
    }
    for who in (BY_ROWS, "module", "torch uncached", "geotorch uncached"):
        model = models[who]
        models[who] = None if model is None else as_trained(model)
    made = {who: training_step(model, x) for who, model in models.items() if model is not None}
    for who in ("torch", "geotorch"):
        model = models[f"{who} uncached"]
        if model is not None:
            made[f"{who} cached"] = under_cached(training_step(model, x))
    return made


def _memory(settings: Settings, name: str, contenders: dict[str, Step]) -> list[Row]:
    peak = {who: peak_bytes(contenders[who], settings.device) for who in ("graph", "module", "torch uncached")}
    asked = settings.asked(MEMORY)
    rows = []
    for ours in ("graph", "module"):
        ratio = peak[ours] / peak["torch uncached"]
        work = f"{name}: {ours}, {peak[ours] / 2**20:.1f} MiB of {peak['torch uncached'] / 2**20:.1f}"
        bound = None if asked is None else Bound(high=asked)
        rows.append(Row(work, "memory", "torch uncached", bound, Spread.of([ratio])))
    return rows
