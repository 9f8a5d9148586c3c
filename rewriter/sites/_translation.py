"""A state dict and a whole model: keys of one form turned into keys of another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.serialization._checkpoint import without_count
from rewriter.sites._adapter_states import from_adapter, is_adapter_state
from rewriter.sites._bridge import REMEDY, StateError, stored_for, value_from
from rewriter.sites._container import sites_of
from rewriter.sites._forms import Found, find_form
from rewriter.sites._identity import difference
from rewriter.sites._places import CONTAINER
from rewriter.sites._shards import whole
from rewriter.sites._site import Site

_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, torch.compile and many training loops put before every key."""


class Place:
    """A site at one of its owners, with the keys that a state dict has for it.

    Arguments:
        owner: the module that has the tensors.
        path: of the owner in the model that is loaded, with a dot at the end unless it is empty.
        site: the site.
        key: the name under which the owner has the site.
    """

    def __init__(self, owner: nn.Module, path: str, key: str, site: Site) -> None:
        self.owner, self.path, self.site = owner, path, site
        names = [member.tensor for member in site.spec.members]
        if len(names) == 1:  # a tied tensor may have another name at another owner
            names = [key]
        self.tensors = names
        self.names = [path + name for name in names]
        self.prefix = f"{path}{CONTAINER}.{key}."

    @property
    def originals(self) -> list[str]:
        """The keys of the stored tensors that the chain starts from."""
        return [self.prefix + name for name in self.site.original_names]

    def respell(self, state: dict[str, Any]) -> None:
        """Give a single original the name that the site has for it: ``original``, or ``original0`` if it is listed."""
        if len(self.site.original_names) == 1:
            (wanted,) = self.originals
            other = self.prefix + ("original" if self.site.spec.listed else "original0")
            if other in state and wanted not in state:
                state[wanted] = state.pop(other)

    def own(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of a state dict that is the site's, by the names of the site's tensors."""
        return {key[len(self.prefix) :]: value for key, value in state.items() if key.startswith(self.prefix)}


def places_in(owner: nn.Module, path: str) -> list[Place]:
    """Return the sites of one owner."""
    found: dict[int, Place] = {}
    for key, site in sites_of(owner).items():
        found.setdefault(id(site), Place(owner, path, key, site))
    return list(found.values())


def all_places(model: nn.Module) -> Iterator[Place]:
    """Yield the sites of a model, a tied one at each of its owners."""
    for path, module in model.named_modules(remove_duplicate=False):
        yield from places_in(module, f"{path}." if path else "")


def bridge(place: Place, state: dict[str, Any], inputs: list[Tensor], assign: bool) -> None:
    """Replace what `state` has for a site in another form by the site's own keys.

    Raises:
        StateError: the chain cannot produce the value; `state` lost the keys of the value.
    """
    found = _other_form(place, state)
    if found is None:
        return
    lacking = [name for name, one in zip(place.names, found, strict=True) if one is None]
    present = [one for one in found if one is not None]
    for one in present:
        for key in one.keys:
            del state[key]
    if lacking:
        raise StateError(
            f"{place.names[0]}: {' and '.join(place.names)} are computed together, and the state lacks "
            f"{' and '.join(lacking)}. {REMEDY}"
        )
    made = stored_for(place.site, place.names[0], present, inputs, assign)
    state.update({place.prefix + name: tensor for name, tensor in made.items()})


def needs_bridge(place: Place, state: Mapping[str, Any]) -> bool:
    """Whether the state has the site's value in another form than the site's own."""
    return _other_form(place, state) is not None


def _other_form(place: Place, state: Mapping[str, Any]) -> list[Found | None] | None:
    originals = place.originals
    if originals and all(key in state for key in originals):
        return None
    slots = {**place.owner._parameters, **place.owner._buffers}
    own = {place.path + name for name, tensor in slots.items() if tensor is not None}
    found = [find_form(state, name, own) for name in place.names]
    return None if all(one is None for one in found) else found


class Translation:
    """A state dict on its way into another form, and the values that chains read from it.

    Arguments:
        model: the model whose sites decide the form.
        state: the state dict; it stays as it is.
        assign: whether tensors keep their own precision and device.

    Raises:
        StateError: the state is that of a PEFT adapter which the model does not compute.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Any], assign: bool = False) -> None:
        self.state, self.metadata = _without_prefixes(model, state)
        self.assign = assign
        self.places = list(all_places(model))
        for place in self.places:
            place.respell(self.state)
        if is_adapter_state(self.state):
            self.state = from_adapter(self.places, self.state, self.metadata, model.state_dict())
            self.metadata = {}
        self.paths = {id(module): path for path, module in model.named_modules()}
        self._running: list[str] = []

    def check_identity(self) -> None:
        """Refuse a state that was saved from other chains.

        Raises:
            StateError: lists every site with both chains.
        """
        found = [
            difference(place.names[0], place.site.spec, self.metadata.get(place.prefix[:-1], {}))
            for place in self.places
        ]
        problems = [text for text in dict.fromkeys(found) if text]
        if problems:
            raise StateError("\n\t".join(["the state dict is of another model:", *problems]))

    def to_rewritten(self) -> OrderedDict[str, Any]:
        """Return the state with the keys of the rewritten model.

        Raises:
            StateError: lists every tensor that cannot be converted.
        """
        problems: list[str] = []
        for place in self.places:
            try:
                self._bridge(place)
            except StateError as problem:
                problems.append(str(problem))
        if problems:
            raise StateError("\n\t".join(["the state dict cannot be converted:", *dict.fromkeys(problems)]))
        return self._finished(self.state)

    def to_plain(self) -> OrderedDict[str, Any]:
        """Return the state with the keys of the model before it was rewritten.

        Raises:
            StateError: a chain cannot be evaluated from the state.
        """
        values: dict[str, Tensor] = {}
        for place in self.places:
            if any(name not in self.state for name in place.names):
                members = zip(place.site.spec.members, place.names, self._values(place), strict=True)
                values.update({name: value for member, name, value in members if member.persistent})
        prefixes = tuple(place.prefix for place in self.places)
        rest = {key: value for key, value in self.state.items() if not key.startswith(prefixes)}
        for place in self.places:
            for path in [*self.metadata]:
                if f"{path}.".startswith((place.prefix, f"{place.path}{CONTAINER}.")):
                    del self.metadata[path]
        return self._finished({**rest, **values})

    def _bridge(self, place: Place) -> None:
        if needs_bridge(place, self.state):
            bridge(place, self.state, self._inputs(place), self.assign)

    def _inputs(self, place: Place) -> list[Tensor]:
        return [whole(self._tensor(reference.module, name)) for reference, name in place.site._places]

    def _tensor(self, owner: nn.Module, name: str) -> Tensor:
        """Return the tensor that a chain reads: from the state, or as the model has it where the state lacks it."""
        path = self.paths.get(id(owner))
        computed = sites_of(owner).get(name)
        full = f"{path}.{name}" if path else name
        if computed is not None and path is not None:
            place = next(one for one in self.places if one.owner is owner and name in one.tensors)
            if all(key in self.state for key in place.originals) or full in self.state:
                return self._values(place)[place.tensors.index(name)]
        found = self.state.get(full) if path is not None else None
        with torch.no_grad():
            tensor: Tensor = found if isinstance(found, Tensor) else getattr(owner, name).detach()
        return tensor

    def _values(self, place: Place) -> list[Tensor]:
        self._bridge(place)
        return value_from(place.site, place.names[0], place.own(self.state), self._inputs(place))

    def _finished(self, state: Mapping[str, Any]) -> OrderedDict[str, Any]:
        finished: OrderedDict[str, Any] = OrderedDict(state)
        finished._metadata = self.metadata  # type: ignore[attr-defined]
        return finished


def _without_prefixes(model: nn.Module, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a copy of a state dict and of its metadata, without the prefixes that its keys have and the model not."""
    found = dict(state) if "module" in model._modules else without_count(state)
    metadata = {path: dict(entry) for path, entry in getattr(state, "_metadata", {}).items()}
    while True:
        prefix = next((one for one in _PREFIXES if found and all(str(key).startswith(one) for key in found)), None)
        if prefix is None or prefix[:-1] in model._modules:
            return found, metadata
        found = {key[len(prefix) :]: value for key, value in found.items()}
        inner = {path: entry for path, entry in metadata.items() if f"{path}.".startswith(prefix)}
        metadata = {path[len(prefix) :]: entry for path, entry in inner.items()}
