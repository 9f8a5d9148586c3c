"""Putting the sites of a plan into a model's modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from rewriter.bindings import attach
from rewriter.context import Contexts
from rewriter.planning import Entry, Plan


def attach_sites(plan: Plan) -> Contexts:
    """Put the sites of a plan into the model's modules; they have tensors of their own."""
    contexts = plan.existing[0].contexts if plan.existing else Contexts()
    order = {id(entry): index for index, entry in enumerate(plan.entries)}
    made = [*((claim.entries, site) for claim, site in plan.new)]
    made += [([entry], site) for entry, site in plan.absorbed]
    for entries, site in sorted(made, key=lambda pair: order[id(pair[0][0])]):
        site.__dict__["contexts"] = contexts
        for owner, tensors in _places(entries):
            attach(owner, tensors, site)
    by_name = {name: entry for entry in plan.entries for name in entry.names}
    for _, site in plan.new:
        if site.spec.reads:
            site.place_inputs([by_name[name].owners[0] for name in site.spec.reads])
    return contexts


def _places(entries: Sequence[Entry]) -> Iterable[tuple[nn.Module, list[str]]]:
    """Return where one site belongs: owners, each with the tensors that the site computes for it together."""
    places: dict[nn.Module, list[str]] = {}
    for entry in entries:
        for owner, tensor in entry.owners:
            places.setdefault(owner, []).append(tensor)
    # A tensor that one owner has under several names gets the site under each.
    return places.items() if len(entries) > 1 else ((owner, [tensor]) for owner, tensor in entries[0].owners)


def keep_parameters(plan: Plan) -> None:
    """Store the originals in the model's own Parameter objects where the shapes allow it."""
    storages = Counter(_address(entry.tensor) for entry in plan.entries if entry.tensor is not None)
    shared = {address for address, count in storages.items() if count > 1 and address}
    for claim, site in plan.new:
        free = [entry.tensor for entry in claim.entries if isinstance(entry.tensor, nn.Parameter)]
        for name, original in zip(site.original_names, site.originals, strict=True):
            if not isinstance(original, nn.Parameter):
                continue
            parameter = next((one for one in free if _same_form(one, original)), None)
            if parameter is not None:
                _refill(parameter, original.data, shared)
                parameter.requires_grad = original.requires_grad
                site._parameters[name] = parameter
                free = [one for one in free if one is not parameter]


def _same_form(one: nn.Parameter, other: nn.Parameter) -> bool:
    same = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return same and not one.is_inference()  # it could never be trained


def _refill(parameter: nn.Parameter, value: Tensor, shared: set[int]) -> None:
    """Put `value` into `parameter`: into its memory, or into memory of its own where others lie in it too.

    Arguments:
        parameter: the object that stays the same.
        value: of the same shape, dtype and device.
        shared: addresses of storages that other tensors use, too.
    """
    if _dense(parameter) and _address(parameter) not in shared:
        parameter.data.copy_(value)
    else:
        parameter.data = value.clone()


def _address(tensor: Tensor) -> int:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return tensor.untyped_storage().data_ptr() if plain else 0


def _dense(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return True
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))
