"""Vetting a model that was read from a file: once, when it is complete, before any code of its graphs is generated.

A pickle may change an object after it was used elsewhere. So the graphs of a file stay data while it is read. Then the
module tree and the state of every object in it are checked, and only then are graphs made from the data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import threading
import types
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from rewriter._given import kind_of
from rewriter.errors import ModelFileError, printable
from rewriter.serialization._functions import is_own_module, name_of_function
from rewriter.serialization._names import is_listed

DEEPEST = 100
"""Levels of modules. Python's recursion limit breaks copying and printing of models with some more."""

_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, types.EllipsisType, enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    *(torch.UntypedStorage, torch.storage.TypedStorage),
)
_CONTAINERS = (tuple, list, set, frozenset)
_MAPPINGS = (dict, OrderedDict, Counter)
_FUNCTIONS = (type, types.FunctionType, types.BuiltinFunctionType)
_OF_THE_PROCESS = (weakref.WeakSet, type(threading.Lock()), type(threading.RLock()))
"""What constructors of this package make, and no file can."""
_TABLES = {"_modules": nn.Module, "_parameters": torch.Tensor, "_buffers": torch.Tensor}
_WRITTEN_BY_TORCH = frozenset({"_graph", "_code", "_lineno_map", "_prologue_start"})


class _Reading(threading.local):
    unfinished: list[tuple[nn.Module, Callable[[], None]]] | None = None


_reading = _Reading()


def when_vetted(module: nn.Module, finish: Callable[[], None]) -> None:
    """Call `finish`, which makes graphs of `module` from data: while `load_model` reads, after the file is vetted.

    Call it when `module` has its class and state. Outside `load_model`, as in `copy` and `pickle`, `finish` runs at
    once.
    """
    if _reading.unfinished is None:
        finish()
    else:
        _reading.unfinished.append((module, finish))


@contextlib.contextmanager
def vetted_reading(allow: tuple[str, ...]) -> Iterator[Callable[[Any], Any]]:
    """Delay the graphs of the modules that are read in the body; give it the function that vets and finishes."""

    def vetted(loaded: Any) -> Any:
        unfinished, _reading.unfinished = _reading.unfinished or [], None
        modules = [module for module, _ in unfinished]
        _vet([loaded, *modules], allow, frozenset(map(id, modules)))
        for _, finish in unfinished:
            finish()
        return loaded

    _reading.unfinished = []
    try:
        yield vetted
    finally:
        _reading.unfinished = None


def check_depth(*roots: nn.Module) -> None:
    """Refuse modules that are nested too deeply, or contain themselves.

    Raises:
        ModelFileError: says how deep.
    """
    depths: dict[int, int] = {}  # 0 while the module's children are visited
    pending = list(roots)
    while pending:
        module = pending[-1]
        children = [child for child in module._modules.values() if isinstance(child, nn.Module)]
        if id(module) not in depths:
            depths[id(module)] = 0
            pending.extend(child for child in children if id(child) not in depths)
            continue
        pending.pop()
        if depths[id(module)]:
            continue
        below = [depths[id(child)] for child in children]
        if 0 in below:
            raise ModelFileError(f"a {type(module).__name__} contains itself")
        depths[id(module)] = 1 + max(below, default=0)
    deepest = max(depths.values(), default=0)
    if deepest > DEEPEST:
        raise ModelFileError(f"modules are nested {deepest} deep; reparam supports {DEEPEST} levels")


def _vet(roots: list[Any], allow: tuple[str, ...], unfinished: frozenset[int]) -> None:
    """Check the state of every object that `roots` reach."""
    modules: list[nn.Module] = []
    seen: set[tuple[int, bool]] = set()
    pending: list[tuple[Any, str, bool]] = [(root, type(root).__name__, False) for root in roots]
    while pending:
        value, place, hook = pending.pop()
        if isinstance(value, _PLAIN) or (id(value), hook) in seen:
            continue
        seen.add((id(value), hook))
        if type(value) in _CONTAINERS:
            pending.extend((item, place, hook) for item in value)
        elif type(value) in _MAPPINGS:
            pending.extend((key, place, hook) for key in value if type(key) is not str)
            pending.extend((item, f"{place:.300}.{key!s:.60}", hook) for key, item in value.items())
        elif not _is_expected(value, hook, allow):
            raise ModelFileError(f"{_shown(place)} is {_described(value)}, which a model file may not set")
        elif isinstance(value, fx.GraphModule) and id(value) not in unfinished:
            raise ModelFileError(f"{_shown(place)} is a graph module without its graph")
        elif not isinstance(value, (*_FUNCTIONS, *_OF_THE_PROCESS)):
            pending.extend(_state_of(value, place))
            if isinstance(value, nn.Module):
                modules.append(value)
    check_depth(*modules)


def _is_expected(value: Any, hook: bool, allow: tuple[str, ...]) -> bool:
    """Return whether `value` is a tensor, a module, data of this package, or a function that is known or allowed."""
    named = value if isinstance(value, _FUNCTIONS) else type(value)
    if is_listed(f"{named.__module__}.{named.__qualname__}", allow):
        return True
    if hook:  # torch calls what is here
        return False
    if isinstance(value, type):
        return issubclass(value, nn.Module)
    if isinstance(value, _FUNCTIONS):
        return name_of_function(value) is not None
    if isinstance(value, weakref.ref):  # torch's recurrent layers have some of their parameters
        return isinstance(value(), (torch.Tensor, type(None)))
    if isinstance(value, torch.Tensor):
        return not value._backward_hooks and not getattr(value, "_post_accumulate_grad_hooks", None)
    return isinstance(value, (nn.Module, *_OF_THE_PROCESS)) or is_own_module(type(value).__module__)


def _state_of(value: Any, place: str) -> Iterator[tuple[Any, str, bool]]:
    state = dict(getattr(value, "__dict__", {}))
    if dataclasses.is_dataclass(value):
        state |= {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    if isinstance(value, nn.Module):
        for table, kind in _TABLES.items():
            entries = state.get(table)
            if not isinstance(entries, dict) or not all(
                isinstance(name, str) and isinstance(entry, (kind, type(None))) for name, entry in entries.items()
            ):
                raise ModelFileError(f"{_shown(place)}.{table} is damaged")
    if isinstance(value, fx.GraphModule) and not _WRITTEN_BY_TORCH.isdisjoint(state):
        raise ModelFileError(f"{_shown(place)} comes with the code of its graph, which a model file may not set")
    for name, item in state.items():
        if isinstance(item, types.FunctionType) and item.__name__ == name and is_own_module(item.__module__):
            continue  # this package's stand-in for a method
        if callable(item) and callable(getattr(type(value), str(name), None)):
            raise ModelFileError(f"{_shown(place)} replaces its method {name!r}, which a model file may not")
        yield item, f"{place:.300}.{name!s:.60}", "_hooks" in str(name)


def _shown(place: str) -> str:
    return printable(place.replace("._modules", ""))


def _described(value: Any) -> str:
    if isinstance(value, _FUNCTIONS):
        return f"{value.__module__}.{value.__qualname__}"
    return kind_of(value)
