"""Telling at every forward, in a few microseconds, whether anything that a value depends on has changed.

A `Signature` writes everything down; a `Watch` has looked once at where everything is and compares in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from rewriter.runtime._signature import same_objects, same_setting, settings_of, snapshot

_MISSING = object()
_PLACES = ("_parameters", "_buffers", "_modules")


class Watch:
    """Modules and tensors as they were at one moment, held so that no other object can take their place.

    Arguments:
        modules: whose tensors, settings and modes are watched.
        tensors: further tensors.
        content: whether what is in the tensors matters, or only their forms.
        holder: the module that holds `modules` and `tensors`, where one does: it is watched for others in their place.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        tensors: Sequence[Tensor],
        content: bool = True,
        holder: nn.Module | None = None,
    ) -> None:
        self.modules = tuple(modules)
        self.given = tuple(tensors)
        self.states: list[tuple[Any, ...]] = []
        watched = list(tensors)
        if holder is not None:  # of which nothing else counts; and it may itself hold this watch
            state = {name: getattr(holder, name) for name in _PLACES}
            self.states.append((state, None, None, (), _places(holder)))
        for module in modules:
            self._add(module, watched)
        self.forms = [(tensor, tensor.shape, tensor.dtype, tensor.device) for tensor in watched]
        self.tensors = [_content(tensor) for tensor in watched] if content else []

    def unchanged(self) -> bool:
        """Whether all is as it was, and still in its holder: in one go, since this is asked at every forward."""
        for state, training, size, settings, places in self.states:
            if training is not None:
                if state["training"] is not training or len(state) != size:
                    return False
                if state["_forward_hooks"] or state["_forward_pre_hooks"]:
                    return False
            for name, value in settings:
                now = state.get(name, _MISSING)
                if now is not value and not same_setting(now, value):
                    return False
            for name, count, items in places:
                place = state[name]
                if len(place) != count:
                    return False
                for key, value in items:
                    if place.get(key) is not value:
                        return False
        for tensor, marks, address_of, address, strides_of, strides, _ in self.tensors:
            if _marks(tensor) != marks or address_of() != address or strides_of() != strides:
                return False
        return True

    def same_forms(self, modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same objects, unchanged, with tensors of the same forms."""
        if not same_objects(modules, self.modules) or not same_objects(tensors, self.given) or not self.unchanged():
            return False
        for tensor, shape, dtype, device in self.forms:
            if tensor.shape != shape or tensor.dtype is not dtype or tensor.device != device:
                return False
        return True

    def _add(self, module: nn.Module, watched: list[Tensor]) -> None:
        state = module.__dict__
        settings = settings_of(module)
        watched += [value for value in settings.values() if isinstance(value, Tensor)]
        for name in ("_parameters", "_buffers"):
            watched += [tensor for tensor in state[name].values() if tensor is not None]
        compared = [(name, snapshot(value)) for name, value in settings.items()]
        self.states.append((state, state["training"], len(state), compared, _places(module)))
        for child in module._modules.values():
            if child is not None:
                self._add(child, watched)


def _places(module: nn.Module) -> list[tuple[str, int, list[tuple[str, Any]]]]:
    """Return which objects a module holds, by kind."""
    held = [(name, list(getattr(module, name).items())) for name in _PLACES]
    return [(name, len(items), items) for name, items in held]


# One call for what would be four look-ups: this is done for every tensor in every forward.
_marks = attrgetter("_version", "requires_grad", "dtype", "shape")


def _content(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor,
        _marks(tensor),
        tensor.data_ptr,
        tensor.data_ptr(),
        tensor.stride,
        tensor.stride(),
        tensor.untyped_storage(),
    )
