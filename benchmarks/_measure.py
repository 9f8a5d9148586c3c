"""Timing of contenders side by side: round after round in one process, so that what slows the machine slows all."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[..., Any]


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summarise samples; one sample alone is its own quartile."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


class Timings:
    """What each contender took in each round, in seconds.

    Arguments:
        samples: contender → seconds per call, one for each round.
    """

    def __init__(self, samples: Mapping[str, Sequence[float]]) -> None:
        self.samples = {name: list(values) for name, values in samples.items()}

    def seconds(self, name: str) -> Spread:
        """Return how long one call of a contender takes."""
        return Spread.of(self.samples[name])

    def ratio(self, longer: str, shorter: str) -> Spread:
        """Return how many times as long as `shorter` `longer` takes: round by round, so that drift cancels."""
        pairs = zip(self.samples[longer], self.samples[shorter], strict=True)
        return Spread.of([one / other for one, other in pairs])


def interleaved(
    contenders: Mapping[str, Run],
    rounds: int,
    *,
    device: str = "cpu",
    prepare: Callable[[], Any] | None = None,
    warm_up: int = 2,
    shortest: float = 0.002,
) -> Timings:
    """Time every contender once per round, in an order that is drawn anew for each round.

    Arguments:
        contenders: name → what to time.
        rounds: how many samples each contender gives.
        device: where they run; an accelerator is waited for.
        prepare: makes, untimed, what each call is given; without it contenders are called with nothing.
        warm_up: rounds that do not count.
        shortest: seconds; what is faster is called so often that a sample takes about as long.
    """
    names, order = list(contenders), random.Random(0)
    repeats = dict.fromkeys(names, 1)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-warm_up, rounds):
        order.shuffle(names)
        gc.collect()
        for name in names:
            arguments = [()] * repeats[name] if prepare is None else [(prepare(),)]
            taken = _sample(contenders[name], arguments, device)
            if index >= 0:
                samples[name].append(taken)
            elif prepare is None:
                repeats[name] = max(1, math.ceil(shortest / taken))
    return Timings(samples)


def _sample(run: Run, arguments: Sequence[tuple[Any, ...]], device: str) -> float:
    gc.disable()
    try:
        _wait(device)
        begin = time.perf_counter()
        for given in arguments:
            run(*given)
        _wait(device)
        return (time.perf_counter() - begin) / len(arguments)
    finally:
        gc.enable()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(run: Run, device: str = "cpu") -> int:
    """Return the most memory that a call holds at one time, beyond what was held before it.

    On a CPU this adds up what torch's allocator gives and takes back, as torch.profiler records it; that includes
    the temporaries inside of operators, and leaves out memory that is not a tensor's.
    """
    run()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the exponent with which time grows: the slope of log time against log size, by least squares."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(s) for s in seconds]).slope
