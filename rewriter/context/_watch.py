"""Telling at every forward, in a few microseconds, whether anything that a value depends on has changed.

A `Signature` writes everything down; a `Watch` has looked once at where everything is and compares in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from rewriter.context._fingerprint import changes_in_place, same_setting, settings_of, snapshot

_END = object()
_flat = chain.from_iterable


class Watch:
    """Modules and tensors as they were at one moment, held so that no other object can take their place.

    Between the layers of a forward all that is looked at lies in cold memory. So the objects that modules hold are
    compared in one row, and nothing is looked up by its name.

    Arguments:
        modules: whose tensors, settings and modes are watched.
        tensors: further tensors.
        content: whether what is in the tensors matters, or only their forms.
        holders: the modules that hold `modules` and `tensors`: they are watched for others in their place.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module] = (),
        tensors: Sequence[Tensor] = (),
        content: bool = True,
        holders: Sequence[nn.Module] = (),
    ) -> None:
        self.places: list[dict[str, Any]] = []
        self.empty: list[Any] = []
        self.containers: list[tuple[dict[str, Any], str, Any]] = []
        watched = list(tensors)
        for holder in holders:  # of which nothing else counts; and it may itself hold this watch
            self._add_places(holder)
        for module in modules:
            self._add(module, watched)
        # The end is compared too: what is added anywhere moves it.
        self.rows = [*(place.values() for place in self.places), (_END,)]
        self.held = [*_flat(self.rows)]
        self.watched = watched
        self.forms = [*map(_form, watched)]
        self.tensors = [_content(tensor) for tensor in watched] if content else []

    @classmethod
    def joined(cls, watches: Sequence[Watch]) -> Watch:
        """Return one watch over all that several watch, as it was when they began."""
        joined = cls(content=False)
        for name in ("empty", "containers", "rows", "held", "watched", "forms", "tensors"):
            setattr(joined, name, [*_flat(getattr(watch, name) for watch in watches)])
        return joined

    def unchanged(self) -> bool:
        """Whether all is as it was, and still in its holder: in one go, since this is asked at every forward."""
        if any(self.empty) or not all(map(is_, _flat(self.rows), self.held)):
            return False
        for tensor, marks, address_of, address, strides_of, strides, _ in self.tensors:
            if _marks(tensor) != marks or address_of() != address or strides_of() != strides:
                return False
        return not self.containers or all(same_setting(state[name], value) for state, name, value in self.containers)

    def same_forms(self) -> bool:
        """Whether all objects are the same, unchanged, and the tensors have the forms that they had."""
        return self.unchanged() and [*map(_form, self.watched)] == self.forms

    def _add(self, module: nn.Module, watched: list[Tensor]) -> None:
        state = module.__dict__
        self.places.append(state)
        self.empty += (state["_forward_hooks"], state["_forward_pre_hooks"])
        for name, value in settings_of(module).items():
            if isinstance(value, Tensor):
                watched.append(value)
            elif changes_in_place(value):
                self.containers.append((state, name, snapshot(value)))
        for name in ("_parameters", "_buffers"):
            watched += [tensor for tensor in state[name].values() if tensor is not None]
        self._add_places(module)
        for child in module._modules.values():
            if child is not None:
                self._add(child, watched)

    def _add_places(self, module: nn.Module) -> None:
        for place in (module._parameters, module._buffers, module._modules):
            (self.places if place else self.empty).append(place)


# One call for what would be four look-ups: this is done for every tensor in every forward.
_marks = attrgetter("_version", "requires_grad", "dtype", "shape")
_form = attrgetter("shape", "dtype", "device")


def _content(tensor: Tensor) -> tuple[Any, ...]:
    """Return all that `unchanged` compares of a tensor, and an alias, for its address to stay taken."""
    return (tensor, _marks(tensor), tensor.data_ptr, tensor.data_ptr(), tensor.stride, tensor.stride(), tensor.detach())
