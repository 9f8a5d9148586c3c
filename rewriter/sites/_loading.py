"""`load_state_dict` of rewritten models: other forms of a checkpoint are converted, and a wrong one changes nothing."""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rewriter._undo import undone_on_failure
from rewriter.sites._bridge import REMEDY, StateError
from rewriter.sites._places import CONTAINER
from rewriter.sites._site import Site
from rewriter.sites._translation import Place, Translation, bridge, needs_bridge, places_in

CONVERTED = "reparam_converted"
"""Marks the metadata of an owner whose part of a state dict was converted together with the whole."""


_OTHER = (
    "The state was saved from other chains: load it into a model that has them (rewriter.absorb takes over torch's "
    "own), and rewriter.state.convert_state_dict(state, that_model, to='plain') gives values that any chain can load"
)

_in_parts: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models on the meta device that are loaded shard by shard. The first shard warns; what stays on meta fails in use."""


def converting(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `load_state_dict` that takes states of other forms, and leaves the model as it was if it fails.

    The model's tensors are copied meanwhile, unless ``assign=True``.
    """

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(state_dict, Mapping):
            return load(self, state_dict, *args, **kwargs)
        strict = args[0] if args else kwargs.get("strict", True)
        assign = args[1] if len(args) > 1 else kwargs.get("assign", False)
        translation = Translation(self, state_dict, assign)
        translation.check_identity()
        state = translation.to_rewritten()
        for place in translation.places:
            state._metadata.setdefault(place.path[:-1], {})[CONVERTED] = True  # type: ignore[attr-defined]
        quiet = _warned(self, translation.places, assign)
        with unchanged_on_error(self, assign):
            try:
                result = load(self, state, *args, **kwargs)
            except RuntimeError as problem:
                odd = [text for text in _other_steps(translation.places, state) if "(has" in text]
                if odd:
                    raise StateError(
                        f"the state dict does not fit:\n\t{'; '.join(odd)}. {_OTHER}\n\t{problem}"
                    ) from None
                raise
        if not strict and not quiet:
            _warn_of_partial(translation.places, state)
        return result

    return load_state_dict


def converting_owner(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `_load_from_state_dict` for an owner inside a model whose `load_state_dict` is torch's."""

    @functools.wraps(load)
    def _load_from_state_dict(
        self: Any,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if CONVERTED not in local_metadata:
            assign = bool(local_metadata.get("assign_to_params_buffers", False))
            places = places_in(self, prefix)
            for place in places:
                _convert_nested(place, state_dict, assign, error_msgs)
            if not error_msgs and not _warned(self, places, assign):
                untied = [place for place in places if len(place.site.spec.members[0].names) == 1]
                _warn_of_partial(untied, state_dict)
        load(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    return _load_from_state_dict


def _convert_nested(place: Place, state: dict[str, Any], assign: bool, errors: list[str]) -> None:
    place.respell(state)
    if not needs_bridge(place, state):
        return
    try:
        if place.site.spec.reads:
            for name in place.names:
                state.pop(name, None)
            raise StateError(
                f"{place.names[0]}: it is computed from {', '.join(place.site.spec.reads)}, which may come later: "
                f"call load_state_dict of the rewritten module itself. {REMEDY}"
            )
        bridge(place, state, [], assign)
    except StateError as problem:
        errors.append(str(problem))


def _warned(model: nn.Module, places: list[Place], assign: bool) -> bool:
    """Whether a shard was loaded into `model` when it was on the meta device; note that this is one."""
    warned = assign and model in _in_parts
    if assign and any(original.is_meta for place in places for original in place.site.originals):
        _in_parts.add(model)
    return warned


def _warn_of_partial(places: list[Place], state: Mapping[str, Any]) -> None:
    """Name the computed tensors that a partial state leaves as they are, or has from other chains: torch is silent.

    A tied tensor may be saved under one of its names. The file of an adapter has the steps without the frozen original.
    """
    lacking: list[str] = []
    filled = {place.site for place in places if all(key in state for key in place.originals)}
    for place in places:
        if place.site in filled:
            continue
        found = zip(place.site.original_names, place.originals, place.site.originals, strict=True)
        frozen_missing = bool(place.own(state))
        missing = [
            name for name, key, tensor in found if key not in state and (tensor.requires_grad or not frozen_missing)
        ]
        if missing:
            lacking.append(f"{place.names[0]} ({', '.join(missing)})")
    if lacking:
        warnings.warn(
            f"the state dict has no value for computed tensors, which stay as they are: {'; '.join(lacking)}",
            stacklevel=3,
        )
    odd = _other_steps([place for place in places if place.site in filled], state)
    if odd:
        warnings.warn(f"values of computed tensors differ: {'; '.join(odd)}. {_OTHER}", stacklevel=3)


def _other_steps(places: list[Place], state: Mapping[str, Any]) -> list[str]:
    """Say what a state has for sites that their chains have not, and what it lacks, unless a site fits that itself."""
    given: dict[str, set[str]] = {}
    for key in state:
        path, container, rest = key.partition(f"{CONTAINER}.")
        name, _, own = rest.partition(".")
        given.setdefault(f"{path}{container}{name}.", set()).add(own)
    found: list[str] = []
    for place in places:
        has, wants = given.get(place.prefix, set()), place.site.state_dict().keys()
        steps = enumerate(place.site.steps)
        refitted = tuple(f"{index}." for index, step in steps if getattr(step, "stateful", False))
        lacks = [key for key in wants - has if has and not key.startswith(refitted)]
        parts = [("has", sorted(has - wants)), ("lacks", sorted(lacks))]
        shown = "; ".join(f"{verb} {', '.join(keys)}" for verb, keys in parts if keys)
        if shown:
            found.append(f"{place.names[0]} ({shown})")
    return found


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module, assign: bool) -> Iterator[None]:
    """Put the parameters and buffers of `model` back if what runs inside raises.

    Arguments:
        model: the model.
        assign: whether parameters are replaced rather than written to, so that no copies are needed.
    """
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    tensors = () if assign and not swaps else {*model.parameters(), *model.buffers()}
    copies = [(tensor, tensor.detach().clone()) for tensor in tensors]
    with undone_on_failure(model):
        try:
            yield
        except BaseException:
            _copy_back(copies)
            for site in model.modules():
                if isinstance(site, Site):
                    site.policy.invalidate()
            raise


@torch.no_grad()
def _copy_back(copies: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, content in copies:
        if not tensor.is_meta and not torch.equal(tensor, content):
            tensor.copy_(content)
