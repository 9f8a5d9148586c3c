"""Another chain for a site that is in a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rewriter.sites._site import Site
from rewriter.sites._spec import SiteSpec


def reassemble(site: Site, steps: Sequence[nn.Module], originals: Sequence[Tensor], record: SiteSpec) -> None:
    """Give a site other steps and originals. A graph that evaluates it has to be lowered again.

    Arguments:
        site: in its model.
        steps: the whole chain.
        originals: all of them.
        record: of the new chain.
    """
    for name in (*site.original_names, *map(str, range(len(site.spec.chain)))):
        delattr(site, name)
    site.original_names = record.original_names(len(originals))
    for name, original in zip(site.original_names, originals, strict=True):
        if isinstance(original, nn.Parameter):
            site.register_parameter(name, original)
        else:
            site.register_buffer(name, original, persistent=record.members[0].persistent)
    for index, step in enumerate(steps):
        site.add_module(str(index), step)
    site.hoisted, site.fused = 0, ()
    site.policy.invalidate()
    site.spec = record
