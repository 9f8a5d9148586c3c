"""Fitting the state of steps to originals that were loaded without it."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, Any

import torch

from rewriter.sites._steps import apply_steps

if TYPE_CHECKING:
    from rewriter.sites._site import Site


@torch.no_grad()
def refit(site: Site, loaded: Set[str]) -> None:
    """Fit the steps whose state was not loaded with the originals to the originals that were.

    Arguments:
        site: whose originals were loaded.
        loaded: names of the loaded tensors, as the site names them.
    """
    record = site.spec
    for index, step in enumerate(site.steps if not record.reads else ()):
        state = {f"{index}.{name}" for name, _ in step.named_buffers()}
        fit: Any = getattr(step, "right_inverse", None)
        if getattr(step, "stateful", False) and fit is not None and state and not state & loaded:
            before = site.settled()
            first = record.layout.part.inward(before.originals[0]) if record.outer else before.originals[0]
            fit(apply_steps(record, before.steps[:index], before.originals, ()) if index else first)
