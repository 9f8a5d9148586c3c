"""fuse: neighbouring steps that merge are evaluated as one, and those that undo each other not at all.

Two masks are one mask, two scales one factor, a cast to a wider dtype and back nothing. What merges says so itself:
``fuse(next)`` returns one module equal to ``next(self(x))``, ``cancels(next)`` says that ``next(self(x))`` is ``x``.
The state dict keeps every step that the spec wrote; see `rewriter.context._fused`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rewriter.context._fused import groups_of
from rewriter.passes._infra import Pass, same_values
from rewriter.sites import Site


def fuse(sites: Iterable[Site]) -> bool:
    """Decide for each site which of its steps are evaluated as one."""
    fused = False
    for site in sites:
        groups = groups_of(site) if len(site.spec.chain) > 1 else ()
        if groups != site.fused:
            site.fused = groups
        fused = fused or bool(groups)
    return fused


@torch.no_grad()
def why_not_fused(site: Site, inputs: Sequence[Tensor]) -> str:
    """Return in which way the value is another when steps are evaluated as one; nothing where it is the same.

    Arguments:
        site: on which it was decided.
        inputs: the tensors that it reads.
    """
    if not site.fused or any(tensor.is_meta for tensor in (*site.originals, *inputs)):
        return ""
    shorter = site.read(*inputs)
    groups, site.fused = site.fused, ()
    try:
        written = site.read(*inputs)
    finally:
        site.fused = groups
    values = zip(shorter, written, strict=True) if isinstance(written, tuple) else [(shorter, written)]
    for one, other in values:
        rounding = 1e2 * torch.finfo(other.dtype).eps if other.is_floating_point() or other.is_complex() else 0.0
        if one.dtype != other.dtype or one.shape != other.shape or not torch.allclose(one, other, rounding, rounding):
            steps = ", ".join(f"{start + 1}–{stop}" for start, stop in groups)
            return (
                f"steps {steps} of {' >> '.join(site.spec.chain)} give another value as one than one after the "
                "other; their `fuse` or `cancels` is wrong (rewrite(…, without=['fuse']) leaves them alone)"
            )
    return ""


fuse_pass = Pass("fuse", lambda lowering: fuse(lowering.order), ensures=same_values(why_not_fused))
