"""Freezing what no rule rewrites (``trainable: rewritten``), until bake."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from rewriter.sites import Site

FROZEN = "_reparam_frozen"
"""The attribute of a module with the names of its parameters that were frozen."""


def freeze_rest(model: nn.Module, sites: Iterable[Site]) -> None:
    """Freeze each parameter of `model` but those of the given sites, and note which were trained."""
    own = {id(parameter) for site in sites for parameter in rewritten_parameters(site)}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in own:
                parameter.requires_grad_(False)
                parameter.grad = None  # an optimizer would make a step with it
                module.__dict__[FROZEN] = (*module.__dict__.get(FROZEN, ()), name)


def rewritten_parameters(site: Site) -> Iterator[nn.Parameter]:
    """Yield the parameters of a site; not the chunks of its tensor that no chain computes."""
    rest = site.originals[-1] if site.spec.layout.only else None
    return (parameter for parameter in site.parameters() if parameter is not rest)


def unfreeze_rest(model: nn.Module) -> None:
    """Let the parameters that `freeze_rest` froze be trained."""
    for module in model.modules():
        for name in module.__dict__.pop(FROZEN, ()):
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(True)
