"""Copying a model whose attributes may have tensors of an autograd graph."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from rewriter._given import is_fully_sharded
from rewriter.errors import CaptureError

T = TypeVar("T")


def copied(value: T, model: nn.Module | None = None, same: Iterable[object] = ()) -> T:
    """Return a deep copy of a model.

    Values that hooks compute ahead of a forward (torch's weight_norm, prune) are copied without their graph: the next
    forward computes them again.

    Arguments:
        value: the model, or a value that contains it.
        model: the model in it.
        same: objects that the copy shares.

    Raises:
        CaptureError: something in the model cannot be copied.
    """
    if model is None:
        assert isinstance(value, nn.Module)
        model = value
    if any(map(is_fully_sharded, model.modules())):
        raise CaptureError(
            f"fully_shard sharded the {type(model).__name__}, and torch copies no such model: rewrite the model before "
            "it is sharded; bake gives its values"
        )
    known: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in _computed(model)}
    # copy.deepcopy asks for the storage of a gradient, which that of a DTensor does not have.
    gradients = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    known.update((id(grad), grad.clone()) for grad in gradients if type(grad) is not Tensor)
    known.update((id(one), one) for one in same)
    try:
        return copy.deepcopy(value, known)
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
