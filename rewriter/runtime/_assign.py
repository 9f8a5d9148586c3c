"""Giving a site a new value, through the right inverses of its chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import PlanError
from rewriter.runtime._tensor import ParametrizedTensor


def right_inverse(step: nn.Module, value: Any, inputs: Sequence[Tensor] = ()) -> Any:
    """Return what `step` maps to `value`; `value` itself where the step has no right inverse.

    A step may declare a right inverse and refuse it (NotImplementedError), as torch's do: that counts as none.
    """
    inverse = getattr(step, "right_inverse", None)
    if inverse is None:
        return value
    try:
        return inverse(value, *inputs) if inputs else inverse(value)
    except NotImplementedError:
        return value


def invert(site: ParametrizedTensor, value: Any, inputs: Sequence[Tensor] = ()) -> list[Tensor]:
    """Return the stored tensors from which `site` computes `value`, as near as its right inverses allow."""
    record = site.record
    value = value if record.layout.plain else record.layout.inward(value)
    further = list(inputs)[1:] if record.source is not None else list(inputs)
    stored: list[list[Tensor]] = []
    for index in reversed(range(len(record.chain))):
        count = len(record.inputs[index])
        mine, further = further[len(further) - count :], further[: len(further) - count]
        found = right_inverse(site.steps[index], value, mine)
        parts = list(found) if isinstance(found, (tuple, list)) else [found]
        if index == 0 and record.source is None:
            stored.append(parts)
        else:
            value = parts.pop(record.carries[index])
            stored.append(parts)
    flat = [tensor for parts in reversed(stored) for tensor in parts]
    if record.outer:
        flat[0] = record.layout.outward(flat[0])
    return flat


@torch.no_grad()
def has_value(site: ParametrizedTensor, name: str, value: Any) -> bool:
    """Say whether one of the tensors that `site` computes, by its name at the owner, is `value` already."""
    member = site.member(name)
    if not isinstance(value, Tensor) or value.is_meta or tuple(value.shape) != member.shape:
        return False
    found = site.read(*site.read_inputs())
    now: Tensor = found if len(site.record.members) == 1 else found[site.position(name)]
    return (now.dtype, now.device) == (value.dtype, value.device) and torch.equal(now, value)


@torch.no_grad()
def assign_value(site: ParametrizedTensor, name: str, value: Any) -> None:
    """Set the stored tensors of `site` so that it computes `value`.

    Raises:
        PlanError: the value has another shape, or the chain cannot produce it.
    """
    record = site.record
    expected = record.members[0].shape
    if len(record.members) > 1:
        raise PlanError(f"{name} is computed together with {', '.join(record.names)}; set them together")
    if not isinstance(value, Tensor) or tuple(value.shape) != expected:
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise PlanError(f"{record.name} has shape {list(expected)}; it cannot be set to {found}")
    inputs = site.read_inputs()
    for target, source in zip(site.originals, invert(site, value, inputs), strict=True):
        target.copy_(source)
