"""Modules of which torch.nn.utils.parametrize computes a tensor as well."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from rewriter.errors import RewriterError
from rewriter.sites._places import CONTAINER, CONTEXTS, GRAPH_OF
from rewriter.sites._site import Site


def refuse_mixed(modules: Iterable[nn.Module]) -> None:
    """Refuse modules of ours that torch's parametrizations gave another class, which their copies would not have.

    Raises:
        RewriterError: there is one.
    """
    for module in modules:
        if module.__dict__.keys().isdisjoint((CONTEXTS, GRAPH_OF)) or CONTAINER not in module._modules:
            continue
        for name, child in module._modules[CONTAINER]._modules.items():  # type: ignore[union-attr]
            if not isinstance(child, Site):
                raise RewriterError(
                    f"{name} of {type(module).__name__} is parametrized by torch.nn.utils.parametrize, which a copy "
                    "would lose: remove that and name the tensor in the spec, or register it before the model is "
                    "rewritten, which takes it over"
                )
