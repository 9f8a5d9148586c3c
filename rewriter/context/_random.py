"""The random number generators that a computation may draw from: the CPU's, and those of the GPUs it runs on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def random_states(devices: Iterable[torch.device | int]) -> list[Tensor]:
    """Return the states of the CPU's generator and of those of the given CUDA devices."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]


def set_random_states(devices: Iterable[torch.device | int], states: Sequence[Tensor]) -> None:
    """Put the generators back into states that `random_states` returned."""
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


def devices_in_use() -> list[int]:
    """Return the CUDA devices whose generators can be asked: all of them, once CUDA is in use and captures no graph."""
    running: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if not running or torch.cuda.is_current_stream_capturing():
        return []
    return list(range(torch.cuda.device_count()))


def devices_of(tensors: Iterable[Tensor]) -> list[torch.device]:
    """Return the CUDA devices on which the tensors are, each once."""
    return sorted({tensor.device for tensor in tensors if tensor.is_cuda}, key=str)


def same_states(before: Iterable[Tensor], after: Iterable[Tensor]) -> bool:
    """Whether nothing was drawn between two calls of `random_states`."""
    return all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def nothing_drawn(tensors: Iterable[Tensor] | None = None) -> contextlib.AbstractContextManager[None]:
    """Return a context that puts the generators back which a computation from `tensors` draws from; without, all."""
    return torch.random.fork_rng(devices=devices_in_use() if tensors is None else devices_of(tensors))
