"""Absorbing: hooks, classes and wrappers of other tools go; their stored tensors and steps become sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from rewriter._copy import copied
from rewriter.absorbing import _old_hooks, _peft, _prune, _torch_parametrize
from rewriter.absorbing._source import Holder, Place
from rewriter.context._random import nothing_drawn
from rewriter.errors import PlanError
from rewriter.language import Spec, TensorInfo, class_names
from rewriter.planning import Entry, dtype_name, resolve, survey
from rewriter.sites import CONTAINER, Member, Site, SiteSpec, layout_of, plain_class

_SOURCES: tuple[Callable[[nn.Module], Iterator[Holder]], ...] = (
    _prune.holders,
    _old_hooks.holders,
    _torch_parametrize.holders,
    _peft.holders,
)
_TRACES = frozenset({CONTAINER, "base_layer"})
"""Submodules that a tool leaves on a module; the others leave hooks that run before the forward."""
# A tensor that is put back goes to its end of the list of parameters; torch.nn's modules have them in this order.
_ORDER = (
    *("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"),
    *("weight", "weight_ih", "weight_hh", "bias", "bias_ih", "bias_hh"),
)


@dataclass
class Taken:
    """One absorbed tensor. The model has its value as a plain tensor.

    Arguments:
        steps: the parametrizations.
        originals: the stored tensors: the very objects the model had.
        counts: for each step, how many stored tensors it reads.
        carries: for each step, which of its inputs is the previous step's result.
        sources: who computed it.
        kind: ``"parameter"`` or ``"buffer"``.
        listed: whether torch numbers a single original: ``original0``.
    """

    place: Place
    steps: list[nn.Module]
    originals: list[Tensor]
    counts: list[int]
    carries: list[int]
    sources: list[str]
    kind: str = "parameter"
    listed: bool = False


def holders_of(model: nn.Module) -> list[Holder]:
    """Find every tensor of `model` that another tool computes; those that others read come first.

    What a parametrization of torch computes for itself belongs to that parametrization, and is not in the list.
    """
    lists = [module for module in model.modules() if isinstance(module, ParametrizationList)]
    private = {id(module) for found in lists for step in found for module in step.modules()}
    waiting = [
        holder
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule) and id(module) not in private
        if module._forward_pre_hooks or not _TRACES.isdisjoint(module._modules)
        for find in _SOURCES
        for holder in find(module)
    ]
    # An adapter changes a tensor where it is: it comes after the source that computes the tensor.
    waiting.sort(key=lambda holder: any(_key(place) == _key(holder.place) for place in holder.stored))
    ordered: list[Holder] = []
    while waiting:
        at: dict[tuple[int, str], list[Holder]] = {}
        for holder in waiting:
            at.setdefault(_key(holder.place), []).append(holder)
        # If several compute the same tensor, the first one stores it.
        ready = [holder for holder in waiting if not any(_before(holder, at.get(_key(p), ())) for p in holder.stored)]
        ordered += ready or waiting
        chosen = {id(holder) for holder in ready or waiting}
        waiting = [holder for holder in waiting if id(holder) not in chosen]
    return ordered


def absorbable(model: nn.Module, spec: Spec, found: list[Holder]) -> list[Holder]:
    """Return what a spec takes over of what `holders_of` found in a model; nothing changes.

    With `absorb: true` that is everything. Without it, torch's parametrizations at the modules whose other tensors
    the rules claim: a module has one class and one container for its computed tensors.
    """
    if spec.absorb or not any(holder.source == "torch.parametrize" for holder in found):
        return found if spec.absorb else []
    foreign = [entry for entry, _ in foreign_entries(model, found)]
    claims, _ = resolve(spec, [*survey(model), *foreign])
    claimed = [entry for claim in claims for entry in claim.entries]
    if any(entry in foreign for entry in claimed):  # refused by the plan, which names it
        return []
    owners = {id(owner) for entry in claimed for owner, _ in entry.owners}
    beside = {id(holder.owner) for holder in found if id(holder.owner) in owners}
    lists = {id(part) for holder in found if id(holder.owner) in beside for part, _ in holder.stored}
    return [holder for holder in found if id(holder.owner) in beside | lists]


def _before(holder: Holder, others: Sequence[Holder]) -> bool:
    """Whether one of `others` has to be taken before `holder`."""
    return bool(others) and others[0] is not holder


def take_over(model: nn.Module, holders: Sequence[Holder]) -> tuple[nn.Module, list[Taken]]:
    """Make the tensors of `holders` plain ones; the model is changed.

    Returns:
        The model, which is another one if PEFT had wrapped the root, and the tensors that were computed.

    Raises:
        PlanError: a layer cannot be absorbed.
    """
    taken: dict[tuple[int, str], Taken] = {}
    prepared = [(holder, _steps(holder, model)) for holder in holders]
    for holder, steps in prepared:
        _take(holder, steps, taken)
    if any(holder.source.startswith("peft") for holder in holders):
        model = _peft.remove_wrappers(model)
    return model, list(taken.values())


def taken_over(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in which every tensor that another tool computes is a plain one with its value."""
    copy = copied(model)
    return take_over(copy, holders_of(copy))[0]


def _steps(holder: Holder, model: nn.Module) -> list[nn.Module]:
    try:
        return holder.steps()
    except PlanError as problem:
        path = next((path for path, module in model.named_modules() if module is holder.owner), "")
        name = ".".join((*(part for part in path.split(".") if part not in ("", "base_layer")), holder.tensor))
        raise PlanError(f"{name}: {problem}") from problem


def absorbed_sites(taken: Sequence[Taken], entries: Sequence[Entry]) -> list[tuple[Entry, Site]]:
    """Return the sites of the absorbed tensors, in the model's order."""
    by_place = {(id(owner), tensor): entry for entry in entries for owner, tensor in entry.owners}
    order = {id(entry): index for index, entry in enumerate(entries)}
    found = []
    for one in taken:
        entry = by_place.get((id(one.place[0]), one.place[1]))
        if entry is None:
            raise PlanError(
                f"{one.place[1]} of a {type(one.place[0]).__name__} is not reached as a tensor of the model"
            )
        found.append((entry, _site(one, entry)))
    return sorted(found, key=lambda pair: order[id(pair[0])])


def foreign_entries(model: nn.Module, holders: Sequence[Holder]) -> list[tuple[Entry, str]]:
    """Return the tensors that other tools compute, as selectors see them, each with the tool's name."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    found = []
    for holder in holders:
        if isinstance(holder.owner, ParametrizationList):
            continue
        like = getattr(*holder.stored[-1])
        kind: Any = plain_class(holder.owner)
        if holder.source == "torch.parametrize":
            kind = kind.__bases__[0]
        infos = []
        for path in paths.get(id(holder.owner), []):
            path = ".".join(part for part in path.split(".") if part != "base_layer")
            name = f"{path}.{holder.tensor}" if path else holder.tensor
            kinds: Any = holder.kind
            shape, dtype = tuple(like.shape), dtype_name(like.dtype)
            infos.append(TensorInfo(name, class_names(kind), kinds, shape, dtype, like.requires_grad))
        if infos:
            found.append((Entry(infos, [holder.place], None), holder.source))
    return found


@torch.no_grad()
def _take(holder: Holder, steps: list[nn.Module], taken: dict[tuple[int, str], Taken]) -> None:
    before = [taken.pop((id(module), name), None) for module, name in holder.stored]
    inputs = [getattr(module, name) for module, name in holder.stored]
    inner = [index for index, one in enumerate(before) if one is not None]
    if len(inner) > 1:
        raise PlanError(f"{holder.tensor} is computed from several tensors that are computed themselves")
    if not steps:
        return
    value = _value(steps, inputs)
    holder.release()
    for step in steps:
        step.train(holder.owner.training)
    plain = Taken(holder.place, steps, inputs, [len(inputs)] + [0] * (len(steps) - 1), [0] * len(steps), [])
    plain.listed = any(name == "original0" for _, name in holder.stored)
    if inner:
        first = before[inner[0]]
        assert first is not None
        plain.steps = first.steps + steps
        plain.originals = first.originals + [tensor for index, tensor in enumerate(inputs) if index != inner[0]]
        plain.counts = [*first.counts, len(inputs) - 1, *plain.counts[1:]]
        plain.carries = [*first.carries, inner[0], *plain.carries[1:]]
        plain.sources = list(first.sources)
        plain.listed = first.listed
    plain.sources.append(holder.source)
    plain.kind = holder.kind
    trained = any(original.requires_grad for original in plain.originals)
    _put(holder, value, trained)
    taken[id(holder.owner), holder.tensor] = plain


def _value(steps: Iterable[nn.Module], inputs: Sequence[Tensor]) -> Tensor:
    """Evaluate the steps in evaluation mode; no state of theirs advances."""
    arguments: Any = inputs
    with nothing_drawn(inputs):
        for step in steps:
            arguments = (copied(step).eval()(*arguments),)
    value: Tensor = arguments[0]
    return value.detach().clone()


def _put(holder: Holder, value: Tensor, trained: bool) -> None:
    owner, name = holder.place
    if holder.kind == "buffer":
        owner._buffers[name] = value
        return
    owner._parameters[name] = nn.Parameter(value, requires_grad=trained)
    names = list(owner._parameters)
    order = owner._flat_weights_names if isinstance(owner, nn.RNNBase) else list(_ORDER)
    if all(known in order for known in names):
        for known in sorted(names, key=order.index):
            owner._parameters[known] = owner._parameters.pop(known)
    if isinstance(owner, nn.RNNBase) and all(known in owner._parameters for known in order):
        owner._init_flat_weights()


def _site(one: Taken, entry: Entry) -> Site:
    info = entry.infos[0]
    trained = any(original.requires_grad for original in one.originals)
    record = SiteSpec(
        members=(Member(entry.names, info.kind, info.shape, info.dtype, entry.persistent, trained),),
        rule="absorbed:" + "+".join(dict.fromkeys(one.sources)),
        chain=tuple(type(step).__name__ for step in one.steps),
        labels=(None,) * len(one.steps),
        options="",
        cache="forward",
        stored=tuple(one.counts),
        carries=tuple(one.carries),
        inputs=((),) * len(one.steps),
        source=None,
        layout=layout_of(info.shape),
        outer=False,
        batch="never",
        listed=one.listed,
    )
    site = Site(one.steps, one.originals, record)
    site.training = one.place[0].training
    return site


def _key(place: Place) -> tuple[int, str]:
    return (id(place[0]), place[1])
