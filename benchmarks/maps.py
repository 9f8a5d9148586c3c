"""The orthogonal maps alone: forward and backward of one weight, compared with torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import rewriter
from benchmarks._measure import interleaved
from benchmarks._models import as_trained, by_geotorch, by_torch, spec_of
from benchmarks._report import Group
from benchmarks._settings import Settings

ASKED = {
    ("householder", 64): 5.0,
    ("householder", 128): 5.0,
    ("householder", 256): 5.0,
    ("matrix_exp", 128): 3.5,
    ("matrix_exp", 256): 3.5,
    ("matrix_exp", 512): 3.5,
    ("cayley", 64): 1.0,
    ("cayley", 128): 1.0,
    ("cayley", 256): 1.0,
    ("householder", 16): 1.0,
    ("matrix_exp", 16): 1.0,
    ("cayley", 16): 1.0,
}
TALL = 100.0


def measure(settings: Settings) -> Group:
    """Time one evaluation and its backward, for each map and size."""
    group = Group(
        "Orthogonal maps, forward and backward of one weight",
        "Against torch.nn.utils.parametrizations.orthogonal with the same map, and geotorch where it has the map. The "
        "tall weight: `stiefel`, and `orthogonal` for comparison, against torch's default map.",
    )
    for (name, size), asked in ASKED.items():
        if settings.quick and size > 64:
            continue
        plain = _layer(size, size, settings)
        contenders = {
            "ours": _step(rewriter.rewrite(plain, spec_of(name, "weight"), capture="module"), plain),
            "torch": _step(by_torch(plain, name, ["weight"]), plain),
        }
        other = by_geotorch(plain, name, ["weight"])
        if other is not None:
            contenders["geotorch"] = _step(other, plain)
        work = f"{name} {size}×{size}"
        timings = interleaved(contenders, settings.rounds(15 if size > 256 else 30), device=settings.device)
        group.add_times(work, timings)
        group.faster(work, timings, "ours", "torch", settings.asked(asked))
        if other is not None:
            group.faster(work, timings, "ours", "geotorch", None)
    _tall(group, settings)
    return group


def _tall(group: Group, settings: Settings) -> None:
    size = (80, 5) if settings.quick else (8000, 50)
    plain = _layer(*size, settings)
    contenders = {"torch": _step(by_torch(plain, "orthogonal", ["weight"]), plain)}
    for name in ("stiefel", "orthogonal"):
        contenders[name] = _step(rewriter.rewrite(plain, spec_of(name, "weight"), capture="module"), plain)
    # Torch takes ten seconds and more for one call.
    timings = interleaved(contenders, settings.rounds(3), device=settings.device, warm_up=1)
    work = "{}×{}".format(*size)
    group.add_times(work, timings)
    group.faster(work, timings, "stiefel", "torch", settings.asked(TALL))
    group.faster(work, timings, "orthogonal", "torch", None)


def _layer(rows: int, columns: int, settings: Settings) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=False, device=settings.device)


def _step(model: nn.Module, plain: nn.Linear) -> Callable[[], None]:
    chain = as_trained(model).get_submodule("parametrizations.weight")
    gradient: Tensor = torch.randn_like(plain.weight)
    stored = list(chain.parameters())

    def step() -> None:
        for parameter in stored:
            parameter.grad = None
        chain().backward(gradient)

    return step
