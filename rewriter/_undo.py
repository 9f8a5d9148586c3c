"""Putting a model back as it was when an in-place change fails."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_CONTAINERS: tuple[Any, ...] = (dict, OrderedDict, list, set)


@contextlib.contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Restore the classes, attributes, children, tensors and hooks of all modules if the body raises.

    The values of the tensors are not covered.
    """
    before = _snapshots(model)
    try:
        yield
    except BaseException:
        _restore(before)
        raise


@contextlib.contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Restore what `undone_on_failure` does, however the body ends."""
    before = _snapshots(model)
    try:
        yield
    finally:
        _restore(before)


_Snapshot = tuple[nn.Module, type, dict[str, Any], list[tuple[Any, Any]]]


def _snapshots(model: nn.Module) -> list[_Snapshot]:
    return [_snapshot(module) for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]


def _restore(before: list[_Snapshot]) -> None:
    for module, kind, state, contents in before:
        if type(module) is not kind:
            object.__setattr__(module, "__class__", kind)
        module.__dict__.clear()
        module.__dict__.update(state)
        for container, content in contents:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


def _snapshot(module: nn.Module) -> _Snapshot:
    state = dict(module.__dict__)
    contents = [(value, value.copy()) for value in state.values() if type(value) in _CONTAINERS]
    return module, type(module), state, contents
