"""Equal chains over equal shapes, or equal steps over any shapes, evaluated in one call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.context._checkpoint import may_run_again
from rewriter.context._fingerprint import COMPARED, Fingerprint, settings_of, transformed
from rewriter.context._tracers import autocast_anywhere, ordinary
from rewriter.sites._reference import Reference
from rewriter.sites._site import Site
from rewriter.sites._spec import SiteSpec

_FORMS = "_forms"
Batch = Sequence[Tensor]
Run = Callable[[], Batch | None]
_SIMPLE = frozenset({bool, int, float, str})


class BatchedEvaluation(nn.Module):
    """A node that evaluates several sites at once; each site takes its own slice.

    It refers to the sites without owning them, so that it shows in no state dict. Wherever the sites are not alike
    at the moment it gives nothing, and each of them is evaluated by itself: in a replica, under torch.compile (which
    fuses in its own way), while a site is frozen or cached, and after one of them was moved or changed.

    A member that no gradient reaches gets a gradient of zeros, where alone it would get none; with steps that are
    evaluated `together` it gets none.

    Arguments:
        sites: sites with equal chains over equal shapes, of steps that broadcast over leading dimensions, or with one
            step each, of a class that evaluates them `together`.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self.references = tuple(map(Reference, sites))
        self._is_replica = False

    @property
    def sites(self) -> list[Site]:
        """The sites, in the order of the values."""
        return [reference.module for reference in self.references]  # type: ignore[misc]

    def forward(self) -> Batch | None:
        """Return the sites' values, or ``None`` if each has to be evaluated by itself."""
        if torch.compiler.is_compiling() or self.__dict__.get("_is_replica"):
            return None
        sites = self.sites
        if any(site.policy.busy for site in sites):
            return None
        # A checkpointed region, or a backward that runs it again, notes the state of each site.
        if joint(sites[0]) and not (ordinary() and not (sites[0].training and may_run_again())):
            return None
        run = self._run(sites)
        return None if run is None else run()

    def _run(self, sites: Sequence[Site]) -> Run | None:
        """Return what evaluates the sites, the same as long as nothing about them changes."""
        known: tuple[Fingerprint, Run | None] | None = self.__dict__.get(_FORMS)
        if known is not None and known[0].same_forms():
            return known[1]
        run = running(sites)
        steps = [step for site in sites for step in site.steps]
        originals = [original for site in sites for original in site.originals]
        # A tensor that was put in for one call is not referred to beyond it.
        lasting = run is not None and not transformed() and all(tensor.is_leaf for tensor in originals)
        self.__dict__[_FORMS] = (Fingerprint(steps, originals, content=False, owners=sites), run) if lasting else None
        return run

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _FORMS}

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._is_replica = True  # its references are to the sites that it was made from
        return replica

    def extra_repr(self) -> str:
        return ", ".join(site.spec.name for site in self.sites)


def joint(site: Site) -> bool:
    """Whether the site's one step is of a class that evaluates several of them `together`."""
    steps = site.steps
    return len(steps) == 1 and site.spec.simple and "together" in vars(type(steps[0]))


def running(sites: Sequence[Site]) -> Run | None:
    """Return what evaluates the sites together, if they are alike now."""
    if not alike(sites):
        return None
    if not joint(sites[0]):
        return partial(evaluate_together, sites)
    steps: list[Any] = [site.steps[0] for site in sites]
    return type(steps[0]).together(steps, [site.originals for site in sites])  # type: ignore[no-any-return]


def alike(sites: Sequence[Site]) -> bool:
    """Whether the sites differ in nothing but the numbers in their tensors, or the shapes where they are `joint`."""
    first, *others = map(likeness, sites)
    return all(other == first for other in others)


def likeness(site: Site) -> Hashable:
    """Return what is equal for sites that are `alike`, as long as nothing about them changes."""
    if not joint(site):
        return (site.spec.layout, _form(site.originals[0]), *map(likeness_of_step, site.steps))
    (step,), first = site.steps, site.originals[0]
    hooked = step._forward_hooks or step._forward_pre_hooks or "forward" in step.__dict__
    return object() if hooked else (type(step), step.training, first.dtype, first.device)


def evaluate_together(sites: Sequence[Site]) -> Batch:
    """Return the values of sites that are `alike`, from one run of their chain."""
    if autocast_anywhere():
        device = sites[0].originals[0].device.type
        with torch.autocast(device, enabled=False):
            return _together(sites)
    return _together(sites)


def stacked(sites: Sequence[Site]) -> tuple[Tensor, list[Any]]:
    """Return the sites' stored tensors as one, and steps that work on it; what they do to buffers stays with them."""
    record: SiteSpec = sites[0].spec
    originals = [site.originals[0] for site in sites]
    if record.outer:
        originals = [record.layout.inward(original) for original in originals]
    value = torch.stack(originals)
    width = value.ndim
    return value, [stacked_step(steps, width) for steps in zip(*(site.steps for site in sites), strict=True)]


def _together(sites: Sequence[Site]) -> Batch:
    layout = sites[0].spec.layout
    value, steps = stacked(sites)
    for step in steps:
        value = step(value)
    if layout.plain:
        return value.unbind(0)
    return tuple(map(layout.outward, value.unbind(0)))


def stacked_step(modules: Sequence[Any], width: int) -> Any:
    """Return a module like each of `modules`, with all their tensors along a new first dimension.

    Between that dimension and a tensor's own stand as many of size one as make it broadcast like the tensor did.
    """
    first = modules[0]
    if not first._parameters and not first._buffers and not first._modules:
        return first
    clone = first.__class__.__new__(first.__class__)
    clone.__dict__.update(first.__dict__)
    for kind in ("_parameters", "_buffers"):
        clone.__dict__[kind] = {
            name: None if tensor is None else _stack([getattr(module, name) for module in modules], width)
            for name, tensor in first.__dict__[kind].items()
        }
    clone.__dict__["_modules"] = {
        name: None if child is None else stacked_step([module._modules[name] for module in modules], width)
        for name, child in first._modules.items()
    }
    return clone


def _stack(tensors: Sequence[Tensor], width: int) -> Tensor:
    stacked = torch.stack(list(tensors))
    padding = [1] * (width - stacked.ndim)
    return stacked.reshape(len(tensors), *padding, *tensors[0].shape)


def likeness_of_step(step: nn.Module) -> Hashable:
    state = step.__dict__
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return object()  # a hook may do anything: like nothing else
    found: list[Any] = [type(step), state["training"]]
    for name, value in settings_of(step).items():
        found += (name, type(value), _setting(value))
    for kind in ("_parameters", "_buffers"):
        for name, tensor in state[kind].items():
            found += (kind, name, _form(tensor))
    for name, child in state["_modules"].items():
        found += (name, None if child is None else likeness_of_step(child))
    return tuple(found)


class _Same:
    """An object that is equal to nothing but itself, whatever its class says."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _setting(value: Any) -> Hashable:
    if type(value) in _SIMPLE:
        return value  # type: ignore[no-any-return]
    if type(value) in COMPARED:
        try:
            hash(value)
        except TypeError:  # a tuple of lists
            return _Same(value)
        return value  # type: ignore[no-any-return]
    return _Same(value)


def _form(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)
