"""Giving a site a new value, through the right inverses of its chain."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter._given import is_distributed, is_managed, kind_of
from rewriter.errors import PlanError, RewriterError
from rewriter.sites._inverse import invert_chain
from rewriter.sites._shards import all_whole, whole
from rewriter.sites._site import Site


def invert(site: Site, value: Any, inputs: Sequence[Tensor] = ()) -> list[Tensor]:
    """Return the stored tensors from which `site` computes `value`, as near as its right inverses allow."""
    record = site.spec
    further = list(inputs)[1:] if record.source is not None else list(inputs)
    ends = list(itertools.accumulate(map(len, record.inputs), initial=0))
    found = invert_chain(
        site.steps,
        value if record.layout.plain else record.layout.inward(value),
        [further[start:end] for start, end in itertools.pairwise(ends)],
        from_source=record.source is not None,
    ).originals
    if record.outer:
        found[0] = record.layout.part.outward(found[0])
    return [*found, record.layout.rest(value)] if record.layout.only else found


@torch.no_grad()
def has_value(site: Site, name: str, value: Any) -> bool:
    """Say whether one of the tensors that `site` computes, by its name at the owner, is `value` already."""
    member = site.member(name)
    if not isinstance(value, Tensor) or value.is_meta or tuple(value.shape) != member.shape:
        return False
    found = site.read(*site.read_inputs())
    now: Tensor = found if len(site.spec.members) == 1 else found[site.position(name)]
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
def assign_value(site: Site, name: str, value: Any) -> None:
    """Set the originals of `site` so that it computes `value`; they stay as they were if it cannot.

    Raises:
        PlanError: the value has another shape, or the chain cannot produce it; or its tensors are whole for a forward.
    """
    record = site.spec
    site.policy.forgive(value)
    if len(record.members) > 1:
        raise PlanError(f"{name} is computed together with {', '.join(record.names)}; set them together")
    check_shape(record.name, record.members[0].shape, value)
    if not is_managed(site):
        _assign(site, value)
        return
    if not any(map(is_distributed, site.parameters())):
        raise PlanError(
            f"{record.name} cannot be set now: fully_shard has put whole tensors in place for a forward. Call "
            "rewriter.state.set_value in every process, outside of a forward"
        )
    with all_whole(site, keep=True):
        _assign(site, whole(value))


def _assign(site: Site, value: Tensor) -> None:
    record = site.spec
    tensors = [*site.parameters(), *site.buffers()]
    before = [tensor.clone() for tensor in tensors]
    try:
        inputs = site.read_inputs()
        for target, source in zip(site.originals, invert(site, value, inputs), strict=True):
            target.copy_(source)
        site.policy.invalidate()
        check_reached(site, value, site.read(*inputs))
        _check_shared(site, before)
    except Exception as problem:
        for tensor, content in zip(tensors, before, strict=True):
            tensor.copy_(content)
        site.policy.invalidate()
        if isinstance(problem, RewriterError):
            raise
        raise PlanError(f"{record.name} cannot be set: {' >> '.join(record.chain)}: {problem}") from problem


def _check_shared(site: Site, before: Sequence[Tensor]) -> None:
    """Refuse a value for which steps change that compute other tensors too.

    Raises:
        PlanError: they did.
    """
    record = site.spec
    if "share=True" not in record.options:
        return
    originals = {id(original) for original in site.originals}
    for tensor, content in zip([*site.parameters(), *site.buffers()], before, strict=True):
        if id(tensor) not in originals and not torch.equal(tensor, content):
            raise PlanError(
                f"{record.name} cannot be set: it shares {' >> '.join(record.chain)} with other tensors "
                "(`share: true`), and the right inverse would change them"
            )


def assign_attribute(site: Site, name: str, value: Any) -> None:
    """Give a computed tensor a value because an attribute of its owner was assigned."""
    site.policy.forgive(value)  # `module.counter += 1` writes to what it read, and then assigns it
    if not has_value(site, name, value):  # tying weights that are tied already comes to that
        assign_value(site, name, value)
        running = site.contexts.running.context
        if running is not None:
            running.forget(site)


def check_reached(site: Site, wanted: Tensor, reached: Tensor) -> None:
    """Refuse a value that the chain of `site` does not give, up to rounding in the coarser precision of the two.

    Raises:
        PlanError: says how far off it is.
    """
    if wanted.is_meta or reached.is_meta or not wanted.numel():
        return
    kind = torch.complex128 if reached.is_complex() else torch.float64
    floating = [one.dtype for one in (wanted, reached) if one.is_floating_point() or one.is_complex()]
    precision = max((torch.finfo(dtype).eps for dtype in floating), default=0.0)
    difference = reached.to(kind) - wanted.to(reached.device, kind)
    # A chain that drops one entry of many is near by the norm of the whole, and far by the largest entry.
    away = max(_relative(difference, wanted.to(kind), order, precision) for order in (2, torch.inf))
    if not away <= precision**0.5:
        lacking = [type(step).__name__ for step in site.steps if not hasattr(step, "right_inverse")]
        why = f"{lacking[0]} has no right inverse" if lacking else "the value has to be in the chain's image"
        raise PlanError(
            f"{site.spec.name} cannot be set to this value: {' >> '.join(site.spec.chain)} gives one that is "
            f"{away:.1e} of its norm, or of its largest entry, away; {why}"
        )


def _relative(difference: Tensor, wanted: Tensor, order: float, precision: float) -> float:
    """Return the size of a difference in relation to that of the tensor; the least size is `precision`."""
    away, size = (float(torch.linalg.vector_norm(one, order)) for one in (difference, wanted))
    size = max(size, precision)
    return away / size if size else away
