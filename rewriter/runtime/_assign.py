"""Giving a site a new value, through the right inverses of its chain."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter._given import kind_of
from rewriter.errors import PlanError
from rewriter.runtime._inverse import invert_chain
from rewriter.runtime._tensor import ParametrizedTensor


def invert(site: ParametrizedTensor, value: Any, inputs: Sequence[Tensor] = ()) -> list[Tensor]:
    """Return the stored tensors from which `site` computes `value`, as near as its right inverses allow."""
    record = site.record
    further = list(inputs)[1:] if record.source is not None else list(inputs)
    ends = list(itertools.accumulate(map(len, record.inputs), initial=0))
    found = invert_chain(
        site.steps,
        value if record.layout.plain else record.layout.inward(value),
        [further[start:end] for start, end in itertools.pairwise(ends)],
        from_source=record.source is not None,
    ).originals
    if record.outer:
        found[0] = record.layout.outward(found[0])
    return found


@torch.no_grad()
def has_value(site: ParametrizedTensor, name: str, value: Any) -> bool:
    """Say whether one of the tensors that `site` computes, by its name at the owner, is `value` already."""
    member = site.member(name)
    if not isinstance(value, Tensor) or value.is_meta or tuple(value.shape) != member.shape:
        return False
    found = site.read(*site.read_inputs())
    now: Tensor = found if len(site.record.members) == 1 else found[site.position(name)]
    return (now.dtype, now.device) == (value.dtype, value.device) and torch.equal(now, value)


def check_shape(name: str, shape: tuple[int, ...], value: Any) -> None:
    """Refuse a value that is no tensor of that shape.

    Raises:
        PlanError: says what it is.
    """
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        found = list(value.shape) if isinstance(value, Tensor) else kind_of(value)
        raise PlanError(f"{name} has shape {list(shape)}; it cannot be set to {found}")


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
    check_shape(record.name, expected, value)
    inputs = site.read_inputs()
    for target, source in zip(site.originals, invert(site, value, inputs), strict=True):
        target.copy_(source)
