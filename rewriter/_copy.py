"""Copying a model, also one whose forward has left tensors of its graph in attributes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from rewriter.errors import CaptureError

M = TypeVar("M", bound=nn.Module)


def copied(model: M) -> M:
    """Return a deep copy of `model`.

    Values that hooks compute ahead of a forward (torch's weight_norm, prune) are copied without their graph: the next
    forward computes them anew.

    Raises:
        CaptureError: something in the model cannot be copied.
    """
    computed: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in _computed(model)}
    try:
        return copy.deepcopy(model, computed)
    except Exception as problem:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({problem}); detach what it caches, or use inplace=True"
        ) from problem


def _computed(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if not module._forward_pre_hooks and not isinstance(module, nn.RNNBase):
            continue
        for value in module.__dict__.values():
            values = value if type(value) is list else [value]
            yield from (tensor for tensor in values if isinstance(tensor, Tensor) and not tensor.is_leaf)
