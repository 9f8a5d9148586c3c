"""One site and one state dict: the stored tensors for a value, and the value of stored tensors.

All of it happens on a copy of the site. The model does not change, and no state of a step advances.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rewriter._given import is_distributed
from rewriter.context._random import nothing_drawn
from rewriter.errors import PlanError, RewriterError
from rewriter.sites._assign import check_reached, check_shape, invert
from rewriter.sites._forms import Found
from rewriter.sites._shards import as_shards, whole
from rewriter.sites._site import Site

REMEDY = (
    "Load the state into the model before it is rewritten, or leave the tensor out of the state, load with "
    "strict=False, and assign a value that the chain can produce with rewriter.state.set_value"
)


class StateError(RewriterError, RuntimeError):
    """A state dict that does not fit; a RuntimeError as well, which is what torch raises."""


def copy_of(site: Site) -> Site:
    """Return a copy of a site in evaluation mode, over tensors of its own, of which none is a shard."""
    clone = site.settled()
    copies: dict[int, nn.Parameter] = {}
    for module in clone.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(whole(parameter).detach().clone(), parameter.requires_grad)
                module._parameters[name] = copies[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = whole(buffer)
    return clone


@torch.no_grad()
def stored_value(site: Site, place: int) -> int | None:
    """Return which original of `site` is the value itself, wherever the chain can give the value; None if none is.

    It is so where the right inverses map the value to itself: `symmetric`, masks, the direction of `weight_norm`.

    Arguments:
        site: the site; it does not change.
        place: which of its tensors.
    """
    inputs, members = site.read_inputs(), site.spec.members
    try:
        value = site.read(*inputs)
        wanted: Tensor = value if len(members) == 1 else value[place]
        if wanted.is_meta or not wanted.count_nonzero():  # zero times a scale is also zero
            return None
        with nothing_drawn():
            clone = copy_of(site)
            found = invert(clone, value, inputs)
            for target, source in zip(clone.originals, found, strict=True):
                target.copy_(source)
            reached = clone.evaluate(*inputs)
        # A step may have no right inverse. Power iterations come near to the value only.
        if not _close(reached if len(members) == 1 else reached[place], wanted, 0.05):
            return None
        return next((index for index, one in enumerate(found) if _close(one, wanted, 1e-3)), None)
    except Exception:  # a right inverse does not reach the value, or does not run on this kind of tensor
        return None


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    same = (one.shape, one.dtype) == (other.shape, other.dtype)
    return same and bool((one - other).norm() <= tolerance * other.norm())


@torch.no_grad()
def stored_for(
    site: Site, name: str, found: Sequence[Found], inputs: Sequence[Tensor], assign: bool
) -> dict[str, Tensor]:
    """Return the state of `site` with which it computes the tensors that were found, one for each of its members.

    Arguments:
        site: the site.
        name: of its tensor in the state dict.
        found: the tensors.
        inputs: the tensors that the chain reads.
        assign: whether the state keeps its own precision and device, as ``load_state_dict(assign=True)`` wants.

    Raises:
        StateError: the chain cannot produce the value; says why and what to do.
    """
    record = site.spec
    shown = " >> ".join(record.chain)
    like = found[0].value
    try:
        found = [replace(one, value=whole(one.value), originals=tuple(map(whole, one.originals))) for one in found]
        for member, one in zip(record.members, found, strict=True):
            check_shape(member.names[0], member.shape, one.value)
        with nothing_drawn():
            clone = _placed(copy_of(site), found[0].value, assign)
            values = [_like(clone, one.value, inputs) for one in found]
            if len(found) == 1 and found[0].originals and _fits(clone, found[0], values[0], inputs):
                return _distributed(clone, name, like)
            for target, source in zip(
                clone.originals, invert(clone, values[0] if len(values) == 1 else tuple(values), inputs), strict=True
            ):
                target.copy_(source)
            reached = clone.evaluate(*inputs)
            for value, result in zip(values, [reached] if len(values) == 1 else reached, strict=True):
                check_reached(clone, value, result)
    except Exception as problem:
        text = str(problem) if isinstance(problem, PlanError) else f"{shown} cannot produce its value: {problem}"
        raise StateError(f"{name}: {text.removeprefix(f'{name} ')}. {REMEDY}") from problem
    return _distributed(clone, name, like)


def _distributed(clone: Site, name: str, like: Tensor) -> dict[str, Tensor]:
    """Return the state of a site, the parameters distributed as `like` is."""
    parameters = {key for key, _ in clone.named_parameters()}
    state: dict[str, Tensor] = clone.state_dict()
    return {key: as_shards(name, tensor, like) if key in parameters else tensor for key, tensor in state.items()}


@torch.no_grad()
def value_from(site: Site, name: str, state: Mapping[str, Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors that `site` computes from a state of its own, in evaluation mode.

    Arguments:
        site: the site.
        name: of its tensor in the state dict.
        state: by the names that the site's own tensors have.
        inputs: the tensors that the chain reads.

    Raises:
        StateError: the state lacks a tensor, or does not fit.
    """
    try:
        with nothing_drawn():
            clone = copy_of(site)
            nn.Module.load_state_dict(clone, {key: whole(tensor) for key, tensor in state.items()}, assign=True)
            value = clone.evaluate(*inputs)
    except Exception as problem:
        raise StateError(f"{name}: {' >> '.join(site.spec.chain)} cannot be evaluated: {problem}") from problem
    values = [value] if len(site.spec.members) == 1 else list(value)
    like = next(filter(is_distributed, state.values()), None)
    return [as_shards(name, one.detach().clone(memory_format=torch.contiguous_format), like) for one in values]


def _placed(clone: Site, value: Tensor, assign: bool) -> Site:
    """Give the copy the device of the value where its own tensors have none, and for `assign` its precision too."""
    originals = {id(original) for original in clone.originals}
    tensors = [*clone.parameters(), *clone.buffers()]
    if any(tensor.is_meta for tensor in tensors) and not value.is_meta:
        if any(tensor.is_meta and id(tensor) not in originals for tensor in tensors):
            raise PlanError("the steps have no values yet (they are on the meta device), and a plain state has none")
        clone.to_empty(device=value.device)
    if assign:
        clone.to(value.device, value.dtype if value.is_floating_point() or value.is_complex() else None)
    return clone


def _like(clone: Site, value: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Return the value in the precision and at the place of what the copy computes from."""
    like = next(iter([*clone.originals, *inputs]), value)
    return value.detach().to(like.device, like.dtype if like.is_floating_point() else None)


def _fits(clone: Site, found: Found, value: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Put the tensors of an old form where the copy has ones of the same shape; whether that gives the value."""
    originals = clone.originals
    if [one.shape for one in originals] != [one.shape for one in found.originals] or len(clone.steps) != 1:
        return False
    buffers = dict(clone.steps[0].named_buffers(recurse=False))
    wanted = found.buffers or {}
    if any(name not in buffers or buffers[name].shape != part.shape for name, part in wanted.items()):
        return False
    before = [tensor.clone() for tensor in (*originals, *buffers.values())]
    for target, source in zip(originals, found.originals, strict=True):
        target.copy_(source)
    for name, part in wanted.items():
        buffers[name].copy_(part)
    reached = clone.evaluate(*inputs)
    for likely in (value, *found.less_likely):
        with contextlib.suppress(PlanError):
            check_reached(clone, likely, reached)
            return True
    for target, source in zip((*originals, *buffers.values()), before, strict=True):
        target.copy_(source)
    return False
