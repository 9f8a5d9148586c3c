"""What a forward changed while it was traced: attributes, containers, the state of random number generators."""

from __future__ import annotations

import collections
import operator
import random
import sys
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter._torch import without_modes

_CONTAINERS = (list, dict, set, collections.deque)
_DEPTH = 4
_STANDARD = frozenset(vars(nn.Module()))
_PLAIN = frozenset({int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
_OPAQUE = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, fx.Graph, fx.Proxy)


class Snapshot:
    """The Python state of modules before a forward is traced.

    Arguments:
        modules: the modules, without their submodules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        with without_modes():
            self.random = _random_state()
        self.former: list[tuple[Any, Any, str]] = []
        seen: set[int] = set()
        for module in modules:
            attributes = vars(module)
            self.former.append((attributes, dict(attributes), type(module).__name__))
            for name, value in attributes.items():
                if name not in _STANDARD:
                    self._add(value, f"{type(module).__name__}.{name}", seen, _DEPTH)

    def _add(self, value: Any, name: str, seen: set[int], depth: int) -> None:
        if type(value) in _PLAIN or id(value) in seen or depth == 0:
            return
        seen.add(id(value))
        if isinstance(value, _CONTAINERS):
            self.former.append((value, dict(value) if isinstance(value, dict) else list(value), name))
        if isinstance(value, (*_CONTAINERS, tuple)):
            for item in list(value.values() if isinstance(value, dict) else value):
                self._add(item, name, seen, depth - 1)
        elif not isinstance(value, _OPAQUE) and isinstance(getattr(value, "__dict__", None), dict):
            self._add(vars(value), name, seen, depth - 1)

    def restore(self) -> list[str]:
        """Put everything back; return what had been changed."""
        changed = []
        for value, former, name in self.former:
            if not _same(value, former):
                changed.append(name)
                _refill(value, former)
        with without_modes():
            if not _same_random(_random_state(), self.random):
                changed.append("the state of a random number generator")
                _set_random(self.random)
        return list(dict.fromkeys(changed))


def _same(value: Any, former: Any) -> bool:
    if len(value) != len(former):
        return False
    if isinstance(value, dict):
        return value.keys() == former.keys() and all(map(operator.is_, value.values(), map(former.get, value)))
    if isinstance(value, set):
        return all(item in value for item in former)
    return all(map(operator.is_, value, former))


def _refill(value: Any, former: Any) -> None:
    value.clear()
    if isinstance(value, (list, collections.deque)):
        value.extend(former)
    else:
        value.update(former)


def _random_state() -> tuple[Tensor, Any, Any]:
    numpy = sys.modules.get("numpy")
    numpys = None if numpy is None else numpy.random.get_state()
    return torch.default_generator.get_state(), random.getstate(), numpys


def _same_random(one: tuple[Tensor, Any, Any], other: tuple[Tensor, Any, Any]) -> bool:
    if not torch.equal(one[0], other[0]) or one[1] != other[1]:
        return False
    first, second = one[2], other[2]
    return first is None or second is None or (first[2] == second[2] and bool((first[1] == second[1]).all()))


def _set_random(former: tuple[Tensor, Any, Any]) -> None:
    torch.default_generator.set_state(former[0])
    random.setstate(former[1])
    if former[2] is not None:
        sys.modules["numpy"].random.set_state(former[2])
