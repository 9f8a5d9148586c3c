"""What a value depends on, written down so that a later forward can tell whether any of it has changed.

Tensors are compared as objects, never by ``id()``: a signature holds them, so that no other tensor can take the
place of one that was freed. Their version counters see every in-place change, and the storages, held as well, see
``parameter.data = …``. What no counter sees is a write *through* ``.data``; `rewriter.state.invalidate` is for that.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from operator import is_
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_CONTAINERS = frozenset({tuple, list, dict, set})
_COMPARED = _CONTAINERS | {bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device}
_LASTING = frozenset({type(None), frozenset, range, FunctionType, BuiltinFunctionType})
_BOOKKEEPING = frozenset(nn.Module().__dict__) | {"_is_replica", "_former_parameters"}
PLAIN = frozenset({Tensor, nn.Parameter})
# Asked at every forward for every site, where finding them would take longer than calling them.
_interpreter = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
TRAINED = 2
"""Where a mark says whether the tensor is trained."""


@dataclass
class Signature:
    """The state of some modules and tensors at one moment.

    Arguments:
        tensors: every tensor the value depends on.
        marks: for each of them, what changes when it does.
        settings: everything else that the modules hold.
        flags: train or eval, of each module.
        storages: kept so that no address is used twice.
        repeatable: whether evaluating again would give the same value, as far as the modules say.
    """

    tensors: list[Tensor] = field(default_factory=list)
    marks: list[tuple[Any, ...]] = field(default_factory=list)
    settings: list[Any] = field(default_factory=list)
    flags: list[bool] = field(default_factory=list)
    storages: list[Any] = field(default_factory=list)
    repeatable: bool = True

    def hold(self) -> Signature:
        """Keep the storages alive, so that their addresses stay taken as long as this signature does."""
        self.storages = [tensor.untyped_storage() for tensor in self.tensors]
        return self

    def same_tensors(self, other: Signature) -> bool:
        """Whether both are about the same tensor objects."""
        return same_objects(self.tensors, other.tensors)

    def same_settings(self, other: Signature) -> bool:
        """Whether modules are in the same mode, with equal settings."""
        if self.flags != other.flags or len(self.settings) != len(other.settings):
            return False
        return all(map(same_setting, self.settings, other.settings))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Signature):
            return NotImplemented
        return self.same_tensors(other) and self.marks == other.marks and self.same_settings(other)

    __hash__ = None  # type: ignore[assignment]


def sign(modules: Iterable[nn.Module], tensors: Sequence[Tensor]) -> Signature | None:
    """Return the signature of `tensors` and of all that `modules` hold; ``None`` where it could not be trusted.

    Tensors of other classes (fake tensors, distributed ones) and inference tensors have no version counter to go
    by, and hooks on a step may do anything.
    """
    signature = Signature(tensors=list(tensors))
    for module in modules:
        if not _add(module, signature):
            return None
    for tensor in signature.tensors:
        if type(tensor) not in PLAIN or tensor.is_inference() or tensor.layout is not torch.strided:
            return None
        signature.marks.append(mark(tensor))
    return signature


def mark(tensor: Tensor) -> tuple[Any, ...]:
    """Return what changes when a tensor's content, storage or form does."""
    return (
        tensor._version,
        tensor.data_ptr(),
        tensor.requires_grad,
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.device,
    )


def same_objects(one: Collection[Any], other: Collection[Any]) -> bool:
    """Whether two collections hold the very same objects in the same order."""
    return len(one) == len(other) and all(map(is_, one, other))


def same_setting(one: Any, other: Any) -> bool:
    """Whether two attributes are one object or equal plain values."""
    if one is other:
        return True
    if type(one) is not type(other) or type(one) not in _COMPARED:
        return False
    # What tensors and arrays in a container answer when they are compared is no truth value.
    return (type(one) not in _CONTAINERS or (_lasting(one) and _lasting(other))) and bool(one == other)


def snapshot(value: Any) -> Any:
    """Return what a setting is compared with later: itself, or a copy of what can be changed where it is."""
    return copy.deepcopy(value) if type(value) in _CONTAINERS and _lasting(value) else value


def changes_in_place(value: Any) -> bool:
    """Whether a setting can become another without being another object."""
    return type(value) in _CONTAINERS and not (type(value) is tuple and _CONTAINERS.isdisjoint(map(type, value)))


def version_of(tensor: Tensor | None) -> int:
    """Return how often a tensor was written to, as far as torch counts: not for one made in inference mode."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds beside tensors of its own, submodules and torch's bookkeeping."""
    return {name: value for name, value in module.__dict__.items() if name not in _BOOKKEEPING}


def transformed() -> bool:
    """Whether something else than plain execution is going on: a trace, a transform, fake tensors, forward mode."""
    return (
        _interpreter() is not None
        or _dispatch_modes() > 0
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
    )


def _add(module: nn.Module, signature: Signature) -> bool:
    state = module.__dict__
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return False
    training = state.get("training", True)
    signature.flags.append(training)
    if training and (declares(module, "stateful") or declares(module, "random")):
        signature.repeatable = False
    for name, value in state.items():
        if name not in _BOOKKEEPING:
            if isinstance(value, Tensor):
                signature.tensors.append(value)
            else:
                signature.settings.append(snapshot(value))
                if not _lasting(value):
                    signature.repeatable = False
    for tensors in (state["_parameters"], state["_buffers"]):
        signature.tensors.extend(tensor for tensor in tensors.values() if tensor is not None)
    return all(_add(child, signature) for child in state["_modules"].values() if child is not None)


def _lasting(value: Any) -> bool:
    """Whether a comparison with its snapshot shows every change of a value.

    An array, a generator or an object of some class may be changed where it is.
    """
    kind = type(value)
    if kind is dict:
        return all(map(_lasting, (*value.keys(), *value.values())))
    if kind in (tuple, list, set):
        return all(map(_lasting, value))
    return kind in _COMPARED or kind in _LASTING or isinstance(value, (type, Enum))


def declares(module: nn.Module, name: str, otherwise: object = False) -> bool:
    """Whether a module, or its class, has an attribute by this name that is true; quick where there is none."""
    value = module.__dict__.get(name, getattr(type(module), name, otherwise))
    return bool(getattr(module, name) if isinstance(value, property) else value)
