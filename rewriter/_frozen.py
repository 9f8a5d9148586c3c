"""Freezing what no rule rewrites (``trainable: rewritten``), until bake."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from rewriter.sites import Site

FROZEN = "_reparam_frozen"
"""The attribute of a module with the names of its parameters that were frozen."""


def trained_rest(
    model: nn.Module, sites: Iterable[Site], rewritten: Iterable[Tensor | None] = ()
) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield the trained parameters of `model` that no rule rewrites: path, module, name and parameter.

    Arguments:
        model: with or without the sites in it.
        sites: of the rules. The chunks of their tensors that no chain computes belong to the rest.
        rewritten: tensors in whose places sites will be put.
    """
    seen = {id(tensor) for tensor in rewritten}
    for site in sites:
        chunks = site.originals[-1] if site.spec.layout.only else None
        seen.update(id(parameter) for parameter in site.parameters() if parameter is not chunks)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield path, module, name, parameter


def freeze_rest(model: nn.Module, sites: Iterable[Site]) -> None:
    """Freeze each parameter of `model` but those of the given sites, and note which were trained."""
    for _, module, name, parameter in trained_rest(model, sites):
        parameter.requires_grad_(False)
        parameter.grad = None  # an optimizer would make a step with it
        module.__dict__[FROZEN] = (*module.__dict__.get(FROZEN, ()), name)


def unfreeze_rest(model: nn.Module) -> None:
    """Let the parameters that `freeze_rest` froze be trained."""
    for module in model.modules():
        for name in module.__dict__.pop(FROZEN, ()):
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(True)
