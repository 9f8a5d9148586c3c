"""Parametrizations by name: which class a step means, and whether its constructor takes the arguments."""

from __future__ import annotations

import contextlib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

from pydantic import ValidationError
from torch import nn

from rewriter.language._annotations import Annotation
from rewriter.language._chains import WrittenStep
from rewriter.language._grammar import describe
from rewriter.language._location import Key
from rewriter.language._problems import Problem
from rewriter.parametrizations import _registry

Factory = Callable[..., nn.Module]


@dataclass(frozen=True, slots=True)
class Resolved:
    """A step's class and the arguments as its constructor wants them."""

    factory: Factory
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Signature:
    parameters: dict[str, inspect.Parameter]
    annotations: dict[str, Annotation]
    open: bool


class Resolver:
    """Resolves the steps of one spec; looks at each parametrization once, however many steps name it.

    Arguments:
        modules: imported by the spec, by prefix.
        missing: prefixes whose import failed, which is reported already.
    """

    def __init__(self, modules: Mapping[str, ModuleType], missing: frozenset[str]) -> None:
        self._modules, self._missing = modules, missing
        self._found: dict[str, Factory | Problem] = {}
        self._signatures: dict[str, _Signature] = {}

    def resolve(self, step: WrittenStep) -> tuple[Resolved | None, list[Problem]]:
        """Return what `step` means, or every problem with its name and its arguments."""
        if step.name.partition(".")[0] in self._missing and "." in step.name:
            return None, []
        if step.name not in self._found:
            self._found[step.name] = self._find(step.name)
        factory = self._found[step.name]
        if isinstance(factory, Problem):
            path = (*step.path, step.name)
            return None, [Problem(path, factory.message, factory.hint, on_key=True)]
        if step.name not in self._signatures:
            self._signatures[step.name] = _read_signature(factory)
        arguments = dict(step.arguments)
        problems = list(_check(step, self._signatures[step.name], arguments))
        return Resolved(factory, arguments), problems

    def _find(self, name: str) -> Factory | Problem:
        try:
            factory = _registry.find(name, self._modules)
        except LookupError as unknown:
            message, _, near = str(unknown.args[0]).partition("; ")
            return Problem((), message, near)
        # A module of the user's may run code of its own to find an attribute.
        except Exception as failed:
            return Problem((), f"looking for {name!r} failed: {type(failed).__name__}: {failed}")
        wrong = self._unfit(name, factory)
        return Problem((), wrong) if wrong else factory

    def _unfit(self, name: str, factory: Factory) -> str:
        """Say why a name stands for no parametrization: only modules, and functions of the package named."""
        prefix, dot, _ = name.partition(".")
        if isinstance(factory, type):
            return "" if issubclass(factory, nn.Module) else f"{name!r} is a class, but no torch.nn.Module"
        home = self._modules[prefix].__name__ if prefix in self._modules else {"torch": "rewriter"}.get(prefix, prefix)
        if isinstance(factory, nn.Module):
            return f"{name!r} is an instance of {type(factory).__name__}; name the class, or a function that makes one"
        package = str(getattr(factory, "__module__", "")).partition(".")[0]
        if dot and package != home.partition(".")[0]:
            return f"{name!r} is no parametrization: it comes from {package or 'elsewhere'!r}, not from {home!r}"
        return ""


def _read_signature(factory: Factory) -> _Signature:
    try:
        parameters = _registry.arguments_of(factory)
    except (TypeError, ValueError):
        return _Signature({}, {}, open=True)
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    annotations = {name: Annotation(hint) for name, hint in _hints(factory, named).items()}
    return _Signature(named, annotations, is_open)


def _hints(factory: Factory, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Return the annotations that can be evaluated, each on its own."""
    constructor: Any = factory.__init__ if isinstance(factory, type) else factory  # type: ignore[misc]
    names = getattr(inspect.unwrap(constructor), "__globals__", {})
    hints: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.annotation is not parameter.empty:
            alone = SimpleNamespace(__annotations__={name: parameter.annotation})
            # What only type checkers import cannot be evaluated; then the constructor itself has to refuse.
            with contextlib.suppress(Exception):
                hints |= typing.get_type_hints(alone, names, include_extras=True)
    return hints


def _check(step: WrittenStep, signature: _Signature, arguments: dict[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with `arguments`, and replace each by what its annotation makes of it."""
    path: tuple[Key, ...] = (*step.path, step.name)
    known = list(signature.parameters)
    for name in list(arguments):
        if name not in signature.parameters and not signature.open:
            hint = f"it takes: {', '.join(known)}" if known else "it takes no arguments"
            message = f"{step.name!r} has no argument {name!r}"
            yield Problem((*path, name), message, hint, name, known, on_key=True)
        elif name in signature.annotations:
            annotation = signature.annotations[name]
            try:
                arguments[name] = annotation.read(arguments[name])
            except ValidationError as wrong:
                yield _misfit((*path, name), arguments[name], annotation, wrong)
    for name, parameter in signature.parameters.items():
        if parameter.default is parameter.empty and name not in arguments:
            yield Problem(path, f"{step.name!r} needs the argument {name!r}", on_key=True)


def _misfit(path: tuple[Key, ...], value: Any, annotation: Annotation, wrong: ValidationError) -> Problem:
    errors = wrong.errors(include_url=False)
    message = f"`{path[-1]}` must be {annotation}, found {describe(value)}"
    word = value if isinstance(value, str) else ""
    if len(errors) == 1:
        [error] = errors
        if error["type"] in _CONSTRAINTS:
            message = f"`{path[-1]}`: {error['msg'].lower()}, found {describe(error['input'])}"
        elif error["loc"] and error["type"] not in ("missing", "unexpected_positional_argument"):
            message = f"`{path[-1]}` must be {annotation}, found {describe(error['input'])} in it"
        path = (*path, *error["loc"])
    return Problem(path, message, "", word, annotation.choices)


_CONSTRAINTS = {
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "multiple_of",
    "value_error",
}
