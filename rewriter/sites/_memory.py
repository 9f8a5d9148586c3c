"""Giving a Parameter object another value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def shared_storages(tensors: Iterable[Tensor]) -> frozenset[int]:
    """Return the addresses of the storages in which more than one of `tensors` lies."""
    found = Counter(_address(tensor) for tensor in tensors)
    return frozenset(address for address, count in found.items() if count > 1 and address)


def refill(parameter: nn.Parameter, value: Tensor, shared: frozenset[int]) -> None:
    """Put `value` into `parameter`: into its memory, or into memory of its own where others lie in it too.

    Arguments:
        parameter: the object that stays the same.
        value: of the same shape, dtype and device.
        shared: storages that other tensors use, too.
    """
    if _dense(parameter) and _address(parameter) not in shared:
        parameter.data.copy_(value)
    else:
        parameter.data = value.clone()


def _address(tensor: Tensor) -> int:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return tensor.untyped_storage().data_ptr() if plain else 0


def _dense(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return True
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))
