"""Putting the sites of a plan into a model's modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rewriter.bindings import attach
from rewriter.context import Contexts
from rewriter.planning import Entry, Plan
from rewriter.sites import Site
from rewriter.sites._memory import refill, shared_storages


def attach_sites(plan: Plan) -> Contexts:
    """Put the sites of a plan into the model's modules; they have tensors of their own."""
    contexts = plan.existing[0].contexts if plan.existing else Contexts()
    order = {id(entry): index for index, entry in enumerate(plan.entries)}
    made = [*((claim.entries, site) for claim, site in plan.new)]
    made += [([entry], site) for entry, site in plan.absorbed]
    for entries, site in sorted(made, key=lambda pair: order[id(pair[0][0])]):
        _attach(entries, site, contexts)
    _connect(plan)
    return contexts


def _attach(entries: Sequence[Entry], site: Site, contexts: Contexts) -> None:
    site.__dict__["contexts"] = contexts
    for owner, tensors in _places(entries):
        attach(owner, list(tensors), site)


def _places(entries: Sequence[Entry]) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Return where one site belongs: owners, each with the tensors that the site computes for it together."""
    if len(entries) == 1:
        return [(owner, {tensor: entries[0].tensor}) for owner, tensor in entries[0].owners]
    places: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
    for entry in entries:
        for owner, tensor in entry.owners:
            places.setdefault(id(owner), (owner, {}))[1][tensor] = entry.tensor
    return list(places.values())


def keep_parameters(plan: Plan) -> None:
    """Store the originals in the model's own Parameter objects where the shapes allow it."""
    shared = shared_storages(entry.tensor for entry in plan.entries if entry.tensor is not None)
    for claim, site in plan.new:
        _keep(claim.entries, site, shared)


def _keep(entries: Sequence[Entry], site: Site, shared: frozenset[int]) -> None:
    free = [entry.tensor for entry in entries if isinstance(entry.tensor, nn.Parameter)]
    for name, original in zip(site.original_names, site.originals, strict=True):
        for index, parameter in enumerate(free):
            if isinstance(original, nn.Parameter) and _same_form(parameter, original):
                refill(parameter, original.data, shared)
                parameter.requires_grad = original.requires_grad
                site._parameters[name] = parameter
                del free[index]
                break


def _same_form(one: nn.Parameter, other: nn.Parameter) -> bool:
    same = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return same and not one.is_inference()  # it could never be trained


def _connect(plan: Plan) -> None:
    """Tell each site that reads other tensors where they are."""
    entries = {name: entry for entry in plan.entries for name in entry.names}
    for _, site in plan.new:
        if site.spec.reads:
            site.place_inputs([_place(entries[name]) for name in site.spec.reads])


def _place(entry: Entry) -> tuple[nn.Module, str]:
    return entry.owners[0]
