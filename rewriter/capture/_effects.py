"""What a forward left behind while it was recorded: in its containers, in the random state, in other people's hands."""

from __future__ import annotations

import collections
import gc
import operator
import random
import sys
import types
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

_CONTAINERS = (list, dict, set, collections.deque)
_DEPTH = 4


class Snapshot:
    """The Python state of modules before a forward is recorded.

    Arguments:
        modules: the modules; their submodules are not looked into.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.random = _random_state()
        self.kept: list[tuple[Any, Any, str]] = []
        seen: set[int] = set()
        for module in modules:
            attributes = vars(module)
            self.kept.append((attributes, dict(attributes), type(module).__name__))
            for name, value in attributes.items():
                if name not in _STANDARD:
                    self._keep(value, f"{type(module).__name__}.{name}", seen, _DEPTH)

    def _keep(self, value: Any, name: str, seen: set[int], depth: int) -> None:
        if type(value) in _PLAIN or id(value) in seen or depth == 0:
            return
        seen.add(id(value))
        if isinstance(value, _CONTAINERS):
            self.kept.append((value, _copy(value), name))
            for item in _items(value):
                self._keep(item, name, seen, depth - 1)
        elif isinstance(value, tuple):
            for item in value:
                self._keep(item, name, seen, depth - 1)
        elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, _OPAQUE):
            self._keep(vars(value), name, seen, depth - 1)

    def restore(self) -> list[str]:
        """Put everything back; return what had been changed."""
        changed = []
        for value, former, name in self.kept:
            if not _same(value, former):
                changed.append(name)
                _refill(value, former)
        if _random_changed(self.random):
            changed.append("the state of a random number generator")
            _set_random(self.random)
        return list(dict.fromkeys(changed))


_STANDARD = frozenset(vars(nn.Module()))
_PLAIN = frozenset({int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
_OPAQUE = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, fx.Graph)


def _copy(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else list(value)


def _items(value: Any) -> Iterable[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value)


def _same(value: Any, former: Any) -> bool:
    if len(value) != len(former):
        return False
    if isinstance(value, dict):
        return value.keys() == former.keys() and all(map(operator.is_, value.values(), map(former.get, value)))
    if isinstance(value, set):
        return all(item in value for item in former)
    return all(one is other for one, other in zip(value, former, strict=True))


def _refill(value: Any, former: Any) -> None:
    value.clear()
    if isinstance(value, (list, collections.deque)):
        value.extend(former)
    else:
        value.update(former)


def _random_state() -> dict[str, Any]:
    numpy = sys.modules.get("numpy")
    return {
        "torch": torch.default_generator.get_state(),
        "python": random.getstate(),
        "numpy": numpy.random.get_state() if numpy is not None else None,
    }


def _random_changed(former: dict[str, Any]) -> bool:
    now = _random_state()
    if not torch.equal(now["torch"], former["torch"]) or now["python"] != former["python"]:
        return True
    one, other = now["numpy"], former["numpy"]
    return one is not None and other is not None and (one[2] != other[2] or bool((one[1] != other[1]).any()))


def _set_random(former: dict[str, Any]) -> None:
    torch.default_generator.set_state(former["torch"])
    random.setstate(former["python"])
    if former["numpy"] is not None:
        sys.modules["numpy"].random.set_state(former["numpy"])


def still_alive(values: list[weakref.ref[fx.Proxy]]) -> bool:
    """Say whether somebody holds on to a value that was recorded: a global list, a closure, a cache."""
    for generation in range(3):
        if all(value() is None for value in values):
            return False
        gc.collect(generation)
    return any(value() is not None for value in values)
