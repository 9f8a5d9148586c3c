"""Which entries of a weight share one scale: all of them, a channel, or a group of a channel."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rewriter.errors import RewriterError

Scheme = Literal["per_tensor", "per_channel", "per_group"]


def grouping(
    name: str, weight: Tensor, scheme: Scheme, axis: int | None, group_size: int | None
) -> tuple[int, int, list[int]]:
    """Return how to `cut` the weight: an axis, a group size (0: leave whole), the dimensions of one scale.

    Axis and dimensions count from the end, the dimensions after the cut.

    Raises:
        RewriterError: the axis or the group size does not fit the weight, or is given where it means nothing.
    """
    ndim = weight.dim()
    if ndim == 0:
        raise RewriterError(f"{name} acts on tensors of one or more dimensions")
    if (group_size is None) == (scheme == "per_group"):
        raise RewriterError(f"{name}: group_size goes with scheme: per_group, and only with it")
    if axis is not None and scheme == "per_tensor":
        raise RewriterError(f"{name}: an axis goes with scheme: per_channel or per_group")
    if axis is None:
        axis = 0 if scheme == "per_channel" else -1
    if ndim < 2 and scheme == "per_channel":
        raise RewriterError(f"{name}: per_channel wants two or more dimensions, not {ndim}; use per_tensor")
    if not -ndim <= axis < ndim:
        raise RewriterError(f"{name}: axis {axis} is none of a weight of shape {list(weight.shape)}")
    last = axis if axis < 0 else axis - ndim
    if scheme == "per_tensor":
        return last, 0, [-1 - i for i in range(ndim)]
    if scheme == "per_channel":
        return last, 0, [-1 - i for i in range(ndim) if -1 - i != last]
    if group_size is None or group_size < 1 or weight.shape[axis] % group_size:
        raise RewriterError(
            f"{name}: group_size {group_size} does not divide axis {axis} of shape {list(weight.shape)}"
        )
    return last, group_size, [last]


def cut(X: Tensor, axis: int, group: int) -> Tensor:
    """Return X with `axis` cut into groups, each a dimension of its own; X itself where `group` is 0."""
    return torch.unflatten(X, axis, [-1, group]) if group > 0 else X


def straight_through(value: Tensor, X: Tensor) -> Tensor:
    """Return `value` with the gradient of X: the difference that carries it is exactly zero."""
    return value.detach() + (X - X.detach())
