"""Telling at every forward, in a few microseconds, whether anything that a value depends on has changed.

A `Signature` writes everything down; a `Watch` has looked once at where everything is and compares in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rewriter.runtime._signature import same_setting, settings_of

_MISSING = object()


class Watch:
    """Modules and tensors as they were at one moment, held so that no other object can take their place.

    Arguments:
        modules: whose tensors, settings and modes are watched.
        tensors: further tensors.
    """

    def __init__(self, modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> None:
        self.modules = tuple(modules)
        self.given = tuple(tensors)
        self.states: list[tuple[Any, ...]] = []
        watched = list(tensors)
        for module in modules:
            self._add(module, watched)
        self.tensors = [
            (t, t._version, t.data_ptr(), t.requires_grad, t.shape, t.stride(), t.dtype, t.untyped_storage())
            for t in watched
        ]

    def unchanged(self, modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same objects, and all as it was."""
        if len(modules) != len(self.modules) or len(tensors) != len(self.given):
            return False
        for now, then in zip(modules, self.modules, strict=True):
            if now is not then:
                return False
        for tensor, other in zip(tensors, self.given, strict=True):
            if tensor is not other:
                return False
        for state, training, size, settings, places in self.states:
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
                    if place.get(key, _MISSING) is not value:
                        return False
        for tensor, version, address, trained, shape, stride, dtype, _ in self.tensors:
            if (
                tensor._version != version
                or tensor.data_ptr() != address
                or tensor.requires_grad is not trained
                or tensor.shape != shape
                or tensor.stride() != stride
                or tensor.dtype is not dtype
            ):
                return False
        return True

    def _add(self, module: nn.Module, watched: list[Tensor]) -> None:
        state = module.__dict__
        settings = settings_of(module)
        watched += [value for value in settings.values() if isinstance(value, Tensor)]
        places = []
        for name in ("_parameters", "_buffers", "_modules"):
            items = list(state[name].items())
            if name != "_modules":
                watched += [tensor for _, tensor in items if tensor is not None]
            places.append((name, len(items), items))
        self.states.append((state, state["training"], len(state), list(settings.items()), places))
        for child in module._modules.values():
            if child is not None:
                self._add(child, watched)
