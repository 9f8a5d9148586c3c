"""Training and measuring, the same for every variant of the network."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rewriter.demo._digits import Digits

BATCH = 128
RATE = 2e-3


def train(
    model: nn.Module, data: Digits, steps: int, seed: int, watch: Callable[[int], None], *, cached: bool = False
) -> float:
    """Train `model` for a number of steps and return the seconds that this takes.

    Arguments:
        seed: determines the batches; equal seeds give equal batches.
        watch: called with the number of each finished step.
        cached: run each step in torch's ``parametrize.cached()``.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
    start = time.perf_counter()
    for done in range(1, steps + 1):
        step(model, *data.batch(BATCH, generator), cached=cached)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        watch(done)
    return time.perf_counter() - start


def caching(cached: bool) -> AbstractContextManager[None]:
    """Return torch's ``parametrize.cached()``, or a context that does nothing."""
    return parametrize.cached() if cached else nullcontext()


def step(model: nn.Module, images: Tensor, digits: Tensor, *, cached: bool = False) -> None:
    """Run one forward and backward."""
    with caching(cached):
        loss = nn.functional.cross_entropy(model(images), digits)
        loss.backward()  # type: ignore[no-untyped-call]


def seconds_per_step(model: nn.Module, data: Digits, repeats: int, *, cached: bool = False) -> float:
    """Time a forward and backward: the best of some repeats, after one to warm up."""
    images, digits = data.batch(BATCH, torch.Generator().manual_seed(0))
    step(model, images, digits, cached=cached)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(model, images, digits, cached=cached)
        times.append(time.perf_counter() - start)
    model.zero_grad()
    return min(times)


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Return the share of test images that `model` classifies correctly."""
    guessed = model(data.test_images).argmax(dim=1)
    return float((guessed == data.test_digits).float().mean())


@torch.no_grad()
def evaluations_per_forward(model: nn.Module, step_module: nn.Module, data: Digits, *, cached: bool = False) -> int:
    """Count the calls of a parametrization in one forward of `model`."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    handle = step_module.register_forward_hook(counted)
    try:
        with caching(cached):
            model(data.test_images[:2])
    finally:
        handle.remove()
    return count


@torch.no_grad()
def distance_from_orthogonal(kernel: Tensor) -> float:
    """Return ‖WᵀW − I‖ in the spectral norm."""
    gram = kernel.mT @ kernel
    return float(torch.linalg.matrix_norm(gram - torch.eye(len(gram)), ord=2))
