"""Distributed tensors (DTensors) made whole for a chain, and its value distributed again, with gradients.

Every process takes part in each call here, in the same order.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from rewriter._given import is_distributed
from rewriter.context._random import nothing_drawn


def gathered(tensor: Any) -> Any:
    """Return all of a DTensor as a plain tensor; anything else as it is."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def scattered(value: Any, sources: Iterable[Any]) -> Any:
    """Return a value that every process computed, distributed as the first DTensor of `sources` is, if one is."""
    like: Any = next(filter(is_distributed, sources), None)
    if like is None or not isinstance(value, Tensor):
        return value
    tensors: Any = sys.modules["torch.distributed.tensor"]
    everywhere = [tensors.Replicate()] * like.device_mesh.ndim
    copies = tensors.DTensor.from_local(value, like.device_mesh, everywhere, run_check=False)
    return copies.redistribute(placements=possible(like.placements, value.dim()))


def possible(placements: Iterable[Any], dims: int) -> list[Any]:
    """Return the placements, without the cuts along dimensions that a tensor does not have."""
    tensors: Any = sys.modules["torch.distributed.tensor"]
    return [tensors.Replicate() if getattr(one, "dim", 0) >= max(dims, 1) else one for one in placements]


def distributed_from_first(tensor: Tensor, like: Any) -> Any:
    """Return the first process's tensor, distributed as `like` is."""
    tensors: Any = sys.modules["torch.distributed.tensor"]
    return tensors.distribute_tensor(tensor, like.device_mesh, possible(like.placements, tensor.dim()))


@contextlib.contextmanager
def drawn_alike(sources: Iterable[Any]) -> Iterator[None]:
    """Draw the same random numbers in every process inside the context, if one of `sources` is distributed."""
    like: Any = next(filter(is_distributed, sources), None)
    if like is None:
        yield
        return
    tensors: Any = sys.modules["torch.distributed.tensor"]
    everywhere = [tensors.Replicate()] * like.device_mesh.ndim
    seed = tensors.distribute_tensor(torch.randint(2**62, (), device="cpu"), like.device_mesh, everywhere)
    with nothing_drawn([like]):
        torch.manual_seed(int(seed.to_local()))
        yield
