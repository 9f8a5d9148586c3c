"""Timing of contenders side by side: in rounds, in one process, so that a slow machine slows all of them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import random
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Run = Callable[..., Any]

_FEWEST = 7
"""The fewest rounds, where more are wanted."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # options of mallopt


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it.

    Arguments:
        median: of the samples.
        low: the first quartile.
        high: the third quartile.
        sure: the 95 % confidence interval of the median, from the ranks of the samples: the number of samples below
            the true median has a binomial distribution.
    """

    median: float
    low: float
    high: float
    sure: tuple[float, float]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summarise samples; one sample alone is its own quartile."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], (samples[0], samples[0]))
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        ranked, off = sorted(samples), max(0, math.floor((len(samples) - 1.96 * math.sqrt(len(samples))) / 2))
        return cls(median, low, high, (ranked[off], ranked[-1 - off]))


class Timings:
    """The seconds that each contender needed in each round.

    Arguments:
        samples: contender → seconds per call, one for each round.
    """

    def __init__(self, samples: Mapping[str, Sequence[float]]) -> None:
        self.samples = {name: list(values) for name, values in samples.items()}

    def seconds(self, name: str) -> Spread:
        """Return how long one call of a contender takes."""
        return Spread.of(self.samples[name])

    def ratio(self, longer: str, shorter: str) -> Spread:
        """Return the time of `longer` over the time of `shorter`, round by round, so that drift cancels."""
        pairs = zip(self.samples[longer], self.samples[shorter], strict=True)
        return Spread.of([one / other for one, other in pairs])


def interleaved(
    contenders: Mapping[str, Run],
    rounds: int,
    *,
    device: str = "cpu",
    prepare: Callable[[], Any] | None = None,
    warm_up: int = 2,
    shortest: float = 0.01,
    longest: float = 10.0,
    collecting: bool = False,
) -> Timings:
    """Time every contender once per round, in a random order for each round.

    Arguments:
        contenders: name → function to time.
        rounds: how many samples each contender gives at most.
        device: where they run; each sample waits until an accelerator is idle.
        prepare: makes the argument of each call, outside the time; without it contenders have no argument.
        warm_up: rounds that do not count.
        shortest: seconds. A faster contender is called several times per sample, so that a sample lasts about this
            long. Contenders up to ten times slower get one call before each sample that does not count, since the
            contender before it filled the processor's caches; training and serving call one model repeatedly.
        longest: seconds after which no round begins, once there are seven: a full run has to end.
        collecting: leave Python's garbage collector on, for work that includes it.
    """
    names, order = list(contenders), random.Random(0)
    repeats, settling = dict.fromkeys(names, 1), dict.fromkeys(names, False)
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for index in range(-warm_up, rounds):
        if index >= _FEWEST and time.perf_counter() - begin > longest:
            break
        order.shuffle(names)
        gc.collect()
        for name in names:
            arguments = [()] * repeats[name] if prepare is None else [(prepare(),)]
            if settling[name]:
                contenders[name]()
            seconds = _sample(contenders[name], arguments, device, collecting)
            if index >= 0:
                samples[name].append(seconds)
            elif prepare is None:
                repeats[name] = max(1, math.ceil(shortest / seconds))
                settling[name] = seconds < 10 * shortest
    return Timings(samples)


def _sample(run: Run, arguments: Sequence[tuple[Any, ...]], device: str, collecting: bool) -> float:
    if not collecting:
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


def keep_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the system; other C libraries are left alone.

    By default glibc returns the top of its heap to the system and requests it again, page by page. Whether it does
    depends on what is at the top, by chance. That made steps of a millisecond up to 1.5 times as long.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            library.mallopt(option, 1 << 30)


def peak_bytes(run: Run, device: str = "cpu") -> int:
    """Return the peak memory of the tensors that a call makes.

    On a CPU this counts the storages that operators return, until they are freed. It includes tensors saved for
    backward, and not the temporaries inside an operator.
    """
    run()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with _Watch() as watch:
        run()
    return watch.peak


class _Watch(TorchDispatchMode):
    """Adds the size of each new storage, and subtracts it when the storage is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak = 0, 0
        self.known: dict[int, weakref.ref[Any] | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self.known.setdefault(storage._cdata, None)  # not made during the call
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self.known:
                self._add(storage._cdata, storage)
        return result

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def freed(_: object) -> None:
            self.bytes -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, freed)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the exponent with which time grows: the slope of log time against log size, by least squares."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(s) for s in seconds]).slope
