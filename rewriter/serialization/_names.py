"""Which classes and functions a model file may name: torch's, this package's, and what the user allows."""

from __future__ import annotations

import dataclasses
import enum
import importlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import fx

from rewriter.errors import ModelFileError
from rewriter.serialization._functions import function_named, is_own_module

F = TypeVar("F", bound=Callable[..., Any])

_builds: dict[str, tuple[type, ...]] = {}

_CONTAINERS = "bool bytes dict float frozenset int list range slice str tuple".split()
_TORCH_HOMES = ("torch.nn.modules", "torch.nn.utils.parametrizations")
_TORCH_CLASSES = frozenset(
    {
        "torch.fx.graph_module.GraphModule",
        "torch.nn.parameter.Buffer",
        "torch.nn.parameter.UninitializedParameter",
        "torch.nn.parameter.UninitializedBuffer",
        "torch.nn.utils.parametrizations._OrthMaps",
    }
)


def loadable(*, builds: Iterable[type] = (), home: str = "") -> Callable[[F], F]:
    """Let model files call a function or class of this package: the first item that a ``__reduce__`` returns.

    The file chooses the arguments: the function must treat them as untrusted data. A function that makes a graph
    from data gives `when_vetted` the step that makes it.

    Arguments:
        builds: classes of the result, if pickle sets a state on the result afterwards.
        home: the module that files name, if it is another one. `torch.load` shows this name in its refusal.
    """

    def mark(function: F) -> F:
        function.__module__ = home or function.__module__
        _builds[f"{function.__module__}.{function.__qualname__}"] = tuple(builds)
        return function

    return mark


def known_object(name: str) -> list[tuple[Any, str]] | None:
    """Return the object that every model file may use by the dotted `name`, and the classes that it builds."""
    module, _, attribute = name.rpartition(".")
    if module == "builtins" and attribute in _CONTAINERS:
        return [(getattr(importlib.import_module("builtins"), attribute), name)]
    if name in _TORCH_CLASSES or _is_within(module, _TORCH_HOMES):
        found = _attribute(module, attribute)
        if name in _TORCH_CLASSES or _is_module_class(found, module):
            return None if found is None else [(found, name)]
    if module in ("torch", "torch.nn.functional", "torch._C._nn"):
        try:
            return [(function_named(name), name)]
        except ModelFileError:
            return None
    if is_own_module(module):
        found = _attribute(module, attribute)
        if name in _builds:
            builds = [(cls, f"{cls.__module__}.{cls.__qualname__}") for cls in _builds[name]]
            return [(found, name), *builds]
        # A graph module is made from data alone, by a function that is marked `loadable`.
        is_graph = isinstance(found, type) and issubclass(found, fx.GraphModule)
        if not is_graph and (_is_module_class(found, module) or _is_record(found, module)):
            return [(found, name)]
    return None


def is_listed(name: str, allow: Iterable[str]) -> bool:
    """Return whether the user allows `name`: by itself, or as part of a package given as ``package.*``.

    >>> is_listed("my.nets.Net", ["my.*"]), is_listed("mine.Net", ["my.*"])
    (True, False)
    """
    return any(name == entry or (entry.endswith(".*") and name.startswith(entry[:-1])) for entry in allow)


def import_object(name: str) -> Any:
    """Return the object with the dotted `name`, importing the longest part of it that is a module.

    Raises:
        ModelFileError: no such module or attribute; the message says how far it got.
    """
    parts = name.replace(":", ".").split(".")
    if not all(part.isidentifier() for part in parts):
        raise ModelFileError(f"{name!r} is no name of the form package.module:name")
    module, problem = None, None
    rest = parts
    for length in range(len(parts), 0, -1):
        try:
            module, rest = importlib.import_module(".".join(parts[:length])), parts[length:]
            break
        except ModuleNotFoundError as missing:
            if missing.name is None or not ".".join(parts).startswith(missing.name):
                raise ModelFileError(f"importing {name!r} failed: {missing}") from missing
            problem = missing
    if module is None:
        raise ModelFileError(f"{name!r} cannot be imported ({problem}); is its package installed or on PYTHONPATH?")
    found: Any = module
    for part in rest:
        if not hasattr(found, part):
            raise ModelFileError(f"{name!r} cannot be found: {module.__name__} has no {'.'.join(rest)!r}")
        found = getattr(found, part)
    return found


def _is_within(module: str, homes: Iterable[str]) -> bool:
    return any(module == home or module.startswith(f"{home}.") for home in homes)


def _attribute(module: str, attribute: str) -> Any:
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None


def _is_module_class(found: Any, module: str) -> bool:
    return isinstance(found, type) and issubclass(found, torch.nn.Module) and found.__module__ == module


def _is_record(found: Any, module: str) -> bool:
    if not isinstance(found, type) or found.__module__ != module:
        return False
    return dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)
