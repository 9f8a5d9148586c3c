"""Referring to a module without owning it."""

from __future__ import annotations

from torch import nn

from rewriter.serialization._names import loadable


@loadable()
class Reference:
    """A module that is not a submodule: outside state dicts and the module tree, and copied with the model."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
