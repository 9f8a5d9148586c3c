"""The fingerprint of a value: what it depends on, and whether any of that has changed.

Tensors and settings are compared as objects, never by ``id()``: the fingerprint refers to them, so no other object can
take the place of one that was freed. Version counters show every in-place change, and addresses show
``parameter.data = …``. No counter shows a write *through* ``.data``; `rewriter.state.invalidate` is for that.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from enum import Enum
from itertools import chain
from operator import attrgetter, is_
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from rewriter._torch import dispatch_modes
from rewriter.context._tracers import traced

_CONTAINERS = frozenset({tuple, list, dict, set})
COMPARED = _CONTAINERS | {bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device}
_LASTING = frozenset({type(None), frozenset, range, FunctionType, BuiltinFunctionType})
_BOOKKEEPING = frozenset(nn.Module().__dict__) | {"_is_replica", "_former_parameters"}
PLAIN = frozenset({Tensor, nn.Parameter})
_END = object()
_flat = chain.from_iterable


class Fingerprint:
    """Modules and tensors as they were at one moment.

    Between the layers of a forward everything that is compared lies in cold memory. So the objects that modules refer
    to are compared in one row, and nothing is looked up by its name.

    Arguments:
        modules: their tensors, settings and modes count.
        tensors: further tensors.
        owners: modules that refer to `modules` and `tensors`; only other objects in their places count.
        content: whether the content of the tensors counts, or only their forms.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module] = (),
        tensors: Sequence[Tensor] = (),
        *,
        owners: Sequence[nn.Module] = (),
        content: bool = True,
    ) -> None:
        self.repeatable = True
        """Whether evaluating again gives the same value, as far as the modules declare."""
        self.tensors = list(tensors)
        self._places: list[dict[str, Any]] = []
        self._empty: list[Any] = []
        self._containers: list[tuple[dict[str, Any], str, Any]] = []
        for owner in owners:
            self._add_places(owner)
        for module in modules:
            self._add(module)
        # The end is compared too: an object added anywhere moves it.
        self._rows = [*(place.values() for place in self._places), (_END,)]
        self._objects = [*_flat(self._rows)]
        self._forms = [*map(_form, self.tensors)]
        self.trusted = not any(self._empty) and all(map(_is_counted, self.tensors))
        """Whether a change would show: not in tensors of other classes, and hooks may do anything."""
        self._contents = [_content(tensor) for tensor in self.tensors] if content and self.trusted else []

    @classmethod
    def joined(cls, several: Sequence[Fingerprint]) -> Fingerprint:
        """Return one fingerprint of everything that `several` are of."""
        joined = cls(content=False)
        for name in ("tensors", "_empty", "_containers", "_rows", "_objects", "_forms", "_contents"):
            setattr(joined, name, [*_flat(getattr(one, name) for one in several)])
        return joined

    def unchanged(self) -> bool:
        """Say whether everything is as it was."""
        for tensor, marks, address_of, address, strides_of, strides, _ in self._contents:
            if _marks(tensor) != marks or address_of() != address or strides_of() != strides:
                return False
        return self.same_settings()

    def same_settings(self) -> bool:
        """Say whether the modules refer to the same objects, with equal settings."""
        if any(self._empty) or not all(map(is_, _flat(self._rows), self._objects)):
            return False
        return not self._containers or all(same_setting(state[name], value) for state, name, value in self._containers)

    def same_forms(self) -> bool:
        """Say whether the settings and the forms of the tensors are as they were."""
        return self.same_settings() and [*map(_form, self.tensors)] == self._forms

    def same_content(self) -> bool:
        """Say whether the tensors have the content that they had; whether they are trained does not count."""
        for tensor, (version, _, *form), address_of, address, strides_of, strides, _ in self._contents:
            now_version, _, *now_form = _marks(tensor)
            if (now_version, now_form) != (version, form) or address_of() != address or strides_of() != strides:
                return False
        return True

    def trained(self) -> list[Tensor]:
        """Return the tensors that are trained now."""
        return [tensor for tensor in self.tensors if tensor.requires_grad]

    def _add(self, module: nn.Module) -> None:
        state = module.__dict__
        self._places.append(state)
        self._empty += (state["_forward_hooks"], state["_forward_pre_hooks"])
        if state.get("training", True) and (declares(module, "stateful") or declares(module, "random")):
            self.repeatable = False
        for name, value in settings_of(module).items():
            if isinstance(value, Tensor):
                self.tensors.append(value)
                continue
            if changes_in_place(value):
                self._containers.append((state, name, snapshot(value)))
            self.repeatable = self.repeatable and _lasting(value)
        for name in ("_parameters", "_buffers"):
            self.tensors += [tensor for tensor in state[name].values() if tensor is not None]
        self._add_places(module)
        for child in module._modules.values():
            if child is not None:
                self._add(child)

    def _add_places(self, module: nn.Module) -> None:
        for place in (module._parameters, module._buffers, module._modules):
            (self._places if place else self._empty).append(place)


# One call for what would be four look-ups: this is done for every tensor in every forward.
_marks = attrgetter("_version", "requires_grad", "dtype", "shape")
_form = attrgetter("shape", "dtype", "device")


def _is_counted(tensor: Tensor) -> bool:
    """Say whether torch counts the writes to a tensor."""
    return type(tensor) in PLAIN and not tensor.is_inference() and tensor.layout is torch.strided


def _content(tensor: Tensor) -> tuple[Any, ...]:
    """Return everything that `unchanged` compares of a tensor, and an alias, for its address to stay in use."""
    return (tensor, _marks(tensor), tensor.data_ptr, tensor.data_ptr(), tensor.stride, tensor.stride(), tensor.detach())


def mark(tensor: Tensor) -> tuple[Any, ...]:
    """Return what changes when a tensor's content, storage or form does."""
    return (*_marks(tensor), tensor.data_ptr(), tensor.stride(), tensor.device)


def same_objects(one: Collection[Any], other: Collection[Any]) -> bool:
    """Say whether two collections consist of the very same objects in the same order."""
    return len(one) == len(other) and all(map(is_, one, other))


def same_setting(one: Any, other: Any) -> bool:
    """Say whether two attributes are one object or equal plain values."""
    if one is other:
        return True
    if type(one) is not type(other) or type(one) not in COMPARED:
        return False
    # Tensors and arrays in a container give no truth value when they are compared.
    return (type(one) not in _CONTAINERS or (_lasting(one) and _lasting(other))) and bool(one == other)


def snapshot(value: Any) -> Any:
    """Return what a setting is compared with later: itself, or a copy if it can change in place."""
    return copy.deepcopy(value) if type(value) in _CONTAINERS and _lasting(value) else value


def changes_in_place(value: Any) -> bool:
    """Say whether a setting can become another without being another object."""
    return type(value) in _CONTAINERS and not (type(value) is tuple and _CONTAINERS.isdisjoint(map(type, value)))


def version_of(tensor: Tensor | None) -> int:
    """Return how often torch counted a write to a tensor; it counts none for tensors made in inference mode."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def versions_of(value: Any) -> list[int]:
    """Return `version_of` each tensor of a value: one, or a tuple of them."""
    return [version_of(part) for part in (value if isinstance(value, tuple) else (value,))]


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that are not its tensors, submodules or torch's bookkeeping."""
    return {name: value for name, value in module.__dict__.items() if name not in _BOOKKEEPING}


def transformed() -> bool:
    """Say whether something else than plain execution runs: a trace, a transform, fake tensors, forward mode."""
    return dispatch_modes() > 0 or traced()


def declares(module: nn.Module, name: str, otherwise: object = False) -> bool:
    """Say whether a module or its class has a true attribute by this name; fast if neither has one."""
    value = module.__dict__.get(name, getattr(type(module), name, otherwise))
    return bool(getattr(module, name) if isinstance(value, property) else value)


def _lasting(value: Any) -> bool:
    """Say whether a comparison with its snapshot shows every change of a value.

    An array, a generator or an object of some class may change in place.
    """
    kind = type(value)
    if kind is dict:
        return all(map(_lasting, (*value.keys(), *value.values())))
    if kind in (tuple, list, set):
        return all(map(_lasting, value))
    return kind in COMPARED or kind in _LASTING or isinstance(value, (type, Enum))
