"""Parametrizations by name: the modules that a spec imports, which class a step means, and its arguments."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

from pydantic import ValidationError

from rewriter.language._annotations import Annotation
from rewriter.language._forms import is_module
from rewriter.language._problems import Problem, choices_of, describe, invalid

Factory = Callable[..., Any]
_CONSTRAINTS = "greater_than greater_than_equal less_than less_than_equal multiple_of value_error".split()


def _registry() -> Any:
    """Return the registry. It belongs to a later layer and imports torch, so it is imported by name, when needed."""
    return importlib.import_module("rewriter.parametrizations._registry")


class Resolver:
    """Resolves the steps of one spec; it looks at each parametrization once, however many steps name it.

    Arguments:
        modules: imported by the spec, by prefix.
        missing: prefixes whose import failed, which is reported already.
    """

    def __init__(self, modules: Mapping[str, ModuleType] | None = None, missing: frozenset[str] = frozenset()) -> None:
        self._modules, self._missing = modules or {}, missing
        self._found: dict[str, _Signature | Problem] = {}

    def resolve(self, name: str, arguments: Mapping[str, Any]) -> tuple[Factory | None, dict[str, Any]]:
        """Return what constructs a step, and the arguments as its constructor wants them.

        Raises:
            ValidationError: with every problem of the name and of the arguments.
        """
        fitting = dict(arguments)
        if "." in name and name.partition(".")[0] in self._missing:
            return None, fitting
        if name not in self._found:
            self._found[name] = self._find(name)
        found = self._found[name]
        problems = [found] if isinstance(found, Problem) else list(found.check(name, fitting))
        if problems or isinstance(found, Problem):
            raise invalid(problems)
        return found.factory, fitting

    def _find(self, name: str) -> _Signature | Problem:
        try:
            factory = _registry().find(name, self._modules)
            message, hint = self._unfit(name, factory), ""
        except LookupError as unknown:
            message, _, hint = str(unknown.args[0]).partition("; ")
            hint = self._under_another_name(name) or hint
        # Code of the user's module may run when an attribute is looked up.
        except Exception as failed:
            message, hint = f"the search for {name!r} failed: {type(failed).__name__}: {failed}", ""
        return Problem((name,), message, hint, on_key=True) if message else _signature(factory)

    def _under_another_name(self, name: str) -> str:
        """Return a hint for torch's own dotted names, such as ``torch.nn.utils.parametrizations.orthogonal``."""
        words = re.findall(r"[A-Z]?[a-z0-9]+", name.rpartition(".")[2]) if name.startswith("torch.") else []
        found = []
        for other in ("_".join(words).lower(), "torch." + "".join(word.capitalize() for word in words)):
            with contextlib.suppress(LookupError):
                _registry().find(other, self._modules)
                found.append(f"`{other}`")
        return f"did you mean {', or '.join(found)}?" if found else ""

    def _unfit(self, name: str, factory: Any) -> str:
        """Return why a name is no parametrization: only modules count, and functions of the package itself."""
        prefix, dot, _ = name.partition(".")
        if isinstance(factory, type):
            fits = issubclass(factory, sys.modules["torch"].nn.Module)
            return "" if fits else f"{name!r} is a class, but no torch.nn.Module"
        if is_module(factory):
            return f"{name!r} is an instance of {type(factory).__name__}; name the class, or a function that makes one"
        home = self._modules[prefix].__name__ if prefix in self._modules else {"torch": "rewriter"}.get(prefix, prefix)
        package = str(getattr(factory, "__module__", "")).partition(".")[0]
        if dot and package != home.partition(".")[0]:
            return f"{name!r} is no parametrization: it comes from {package or 'elsewhere'!r}, not from {home!r}"
        return ""


@dataclass(frozen=True, slots=True)
class _Signature:
    """What a spec may give to a constructor; `open` if it takes any keyword."""

    factory: Factory
    parameters: Mapping[str, inspect.Parameter]
    annotations: Mapping[str, Annotation]
    open: bool

    def check(self, step: str, arguments: dict[str, Any]) -> Iterator[Problem]:
        """Yield what is wrong with `arguments`, and replace each by what its annotation makes of it."""
        known = list(self.parameters)
        for name, value in list(arguments.items()):
            if name not in known and not self.open:
                hint = f"it takes: {', '.join(known)}" if known else "it takes no arguments"
                message = f"{step!r} has no argument {name!r}"
                yield Problem((step, name), message, hint, name, known, on_key=True)
            elif name in self.annotations:
                try:
                    arguments[name] = self.annotations[name].read(value)
                except ValidationError as wrong:
                    yield _misfit(step, name, value, self.annotations[name], wrong)
        for name, parameter in self.parameters.items():
            if parameter.default is parameter.empty and name not in arguments:
                yield Problem((step,), f"{step!r} needs the argument {name!r}", on_key=True)


@functools.lru_cache(maxsize=1024)
def _signature(factory: Factory) -> _Signature:
    try:
        parameters: dict[str, inspect.Parameter] = _registry().arguments_of(factory)
    except (TypeError, ValueError):
        return _Signature(factory, {}, {}, open=True)
    is_open = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {name: one for name, one in parameters.items() if one.kind in by_name}
    return _Signature(factory, parameters, dict(_annotations(factory, parameters)), is_open)


def _annotations(factory: Factory, parameters: Mapping[str, inspect.Parameter]) -> Iterator[tuple[str, Annotation]]:
    """Yield the annotations that can be checked, each on its own."""
    constructor: Any = factory.__init__ if isinstance(factory, type) else factory  # type: ignore[misc]
    # A class that generates its constructor has the annotations in the modules of its bases.
    bases = reversed(factory.__mro__) if isinstance(factory, type) else ()
    modules = [vars(sys.modules[base.__module__]) for base in bases if base.__module__ in sys.modules]
    names = dict(collections.ChainMap(getattr(inspect.unwrap(constructor), "__globals__", {}), *reversed(modules)))
    for name, parameter in parameters.items():
        if parameter.annotation is not parameter.empty:
            alone = SimpleNamespace(__annotations__={name: parameter.annotation})
            # What only type checkers import cannot be evaluated, and Pydantic does not take every annotation. Then
            # the constructor itself has to refuse.
            with contextlib.suppress(Exception):
                yield name, Annotation(typing.get_type_hints(alone, names, include_extras=True)[name])


def _misfit(step: str, name: str, value: Any, annotation: Annotation, wrong: ValidationError) -> Problem:
    [error, *others] = wrong.errors(include_url=False)
    message, inside = f"`{name}` must be {annotation}, found {describe(value)}", () if others else error["loc"]
    if not others and error["type"] in _CONSTRAINTS:
        wanted = error["msg"].replace("Input should be", "must be")
        message = f"`{name}` {wanted}, found {describe(error['input'])}"
    elif inside and error["type"] not in ("missing", "unexpected_positional_argument"):
        message = f"`{name}` must be {annotation}, found {describe(error['input'])} in it"
    choices = [choice for one in (error, *others) for choice in choices_of(one)]
    return Problem((step, name, *inside), message, "", value if isinstance(value, str) else "", choices)


def import_modules(data: Any, allowed: Collection[str] | None) -> tuple[dict[str, ModuleType], list[Problem]]:
    """Return the modules of ``imports:`` by prefix, and why others are missing.

    Arguments:
        data: the spec's plain values, which need not be correct.
        allowed: packages and modules whose code may run, with everything inside them; ``None`` for all.
    """
    imports = data.get("imports") if isinstance(data, dict) else None
    modules: dict[str, ModuleType] = {}
    problems: list[Problem] = []
    for prefix, name in imports.items() if isinstance(imports, dict) else ():
        path = ("imports", prefix)
        if prefix == "torch":
            problems.append(Problem(path, "the prefix 'torch' means torch", "choose another", on_key=True))
        elif isinstance(name, str) and all(part.isidentifier() for part in name.split(".")):
            try:
                modules[prefix] = _import(name, allowed)
            except _Refused as refused:
                problems.append(Problem(path, *refused.args))
    return modules, problems


class _Refused(Exception):
    """A module that is not imported: why, and what to do."""


def _import(name: str, allowed: Collection[str] | None) -> ModuleType:
    names = [allowed] if isinstance(allowed, str) else allowed
    if names is not None and not any(f"{name}.".startswith(f"{other}.") for other in names):
        hint = f"add --allow-import {name.partition('.')[0]}"
        raise _Refused(f"importing {name!r} runs its code, which was not allowed", hint)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name is not None and f"{name}.".startswith(f"{missing.name}."):
            hint = "install it, or put its folder on PYTHONPATH"
            raise _Refused(f"there is no module {missing.name!r}", hint) from missing
        raise _Refused(f"importing {name!r} failed: {missing}") from missing
    # Whatever the user's module does when it is imported, sys.exit() included, is a problem of this line.
    except (Exception, SystemExit) as wrong:
        raise _Refused(f"importing {name!r} failed: {type(wrong).__name__}: {wrong}") from wrong
