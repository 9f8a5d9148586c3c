"""Gradient accumulation: one evaluation and one backward of a costly chain for many micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import rewriter
from benchmarks._measure import interleaved
from benchmarks._models import as_trained, by_torch, spec_of
from benchmarks._report import Group
from benchmarks._settings import Settings

COUNT = 8
UNCACHED = 6.0


def measure(settings: Settings) -> Group:
    """Time eight forwards and backwards with a 256×256 matrix exponential."""
    width, batch = (16, 4) if settings.quick else (256, 64)
    group = Group(
        f"{COUNT} micro-batches, `evaluate_once`",
        f"One linear layer of {width}×{width} whose weight is a matrix exponential; {COUNT} times forward and "
        f"backward of a batch of {batch}, the gradients added up. torch's cache cannot be used here: the second "
        "backward through the cached value is an error.",
    )
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(width, width, bias=False)).to(settings.device)
    batches = list(torch.randn(COUNT, batch, width, device=settings.device))
    ours = as_trained(rewriter.rewrite(plain, spec_of("matrix_exp")))
    each_time = _accumulate(ours, batches)

    def once() -> None:
        with rewriter.evaluate_once(ours):
            each_time()

    contenders = {
        "plain": _accumulate(plain, batches),
        "evaluate_once": once,
        "each time": each_time,
        "torch uncached": _accumulate(as_trained(by_torch(plain, "matrix_exp", ["0.weight"])), batches),
    }
    timings = interleaved(contenders, settings.rounds(20), device=settings.device)
    group.add_times("matrix_exp", timings)
    group.faster("matrix_exp", timings, "evaluate_once", "torch uncached", settings.asked(UNCACHED))
    group.faster("matrix_exp", timings, "evaluate_once", "each time", None)
    return group


def _accumulate(model: nn.Module, batches: list[Tensor]) -> Callable[[], None]:
    parameters = list(model.parameters())

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        for batch in batches:
            model(batch).square().mean().backward()

    return run
