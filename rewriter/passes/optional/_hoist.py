"""hoist: the first steps of a chain that depend on nothing trained are not evaluated in every forward.

Their result cannot be written into the original: the state dict would have another tensor than torch's, and loading
one, or training the tensor again, would give wrong values. The result is cached beside it with a fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rewriter.passes._infra import Pass, same_values
from rewriter.sites import Site
from rewriter.sites._steps import apply_steps


def hoist(sites: Iterable[Site]) -> bool:
    """Decide for each site how many of its first steps are hoisted; the values stay the same."""
    hoisted = False
    for site in sites:
        count = _untrained_steps(site) if len(site.spec.chain) > 1 else 0
        if count != site.hoisted:
            site.hoisted = count
        hoisted = hoisted or bool(count)
    return hoisted


def _untrained_steps(site: Site) -> int:
    record = site.spec
    if record.source is not None or record.memory == "recompute":
        return 0
    count, used = 0, 0
    for step, stored, inputs in zip(site.steps[:-1], record.stored, record.inputs, strict=False):
        tensors = [*site.originals[used : used + stored], *step.parameters()]
        varies = any(getattr(part, "stateful", False) or getattr(part, "random", False) for part in step.modules())
        if inputs or varies or any(tensor.requires_grad for tensor in tensors):
            break
        count, used = count + 1, used + stored
    if not count or not any(parameter.requires_grad for parameter in site.parameters()):
        return 0
    return count if _fits(site, count, site.originals[:used]) else 0


@torch.no_grad()
def _fits(site: Site, count: int, stored: list[Tensor]) -> bool:
    """Whether the result is no bigger than what it is made of: a compressed weight is not cached unpacked."""
    value = apply_steps(site.spec, site.settled().steps[:count], stored, ())
    return isinstance(value, Tensor) and value.nbytes <= sum(tensor.nbytes for tensor in stored)


@torch.no_grad()
def why_not_hoisted(site: Site, inputs: Sequence[Tensor]) -> str:
    """Return in which way the value is another when its first steps are hoisted; nothing where it is the same.

    Arguments:
        site: on which it was decided.
        inputs: the tensors that it reads.
    """
    if not site.hoisted or any(tensor.is_meta for tensor in site.originals):
        return ""
    with_it = site.read(*inputs)
    count, site.hoisted = site.hoisted, 0
    try:
        without = site.read(*inputs)
    finally:
        site.hoisted = count
    if torch.equal(with_it, without):
        return ""
    return "it has another value when its first steps are hoisted; they are not a function of their tensors alone"


hoist_pass = Pass("hoist", lambda lowering: hoist(lowering.order), ensures=same_values(why_not_hoisted))
