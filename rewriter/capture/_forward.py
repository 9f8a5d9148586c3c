"""What the code and the signature of a forward say before it is traced."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from rewriter.capture._leaves import has_own_forward
from rewriter.capture._reason import KEPT
from rewriter.errors import CaptureError
from rewriter.sites import plain_class

_EXHAUSTIVE = 3
_TESTED_FOR_NONE = re.compile(r"\b(\w+)\s+is\s+(?:not\s+)?None\b")
_QUESTIONS = {
    "type": "asks for a type",
    "hasattr": "asks hasattr()",
    "callable": "asks callable()",
    "is_grad_enabled": "asks for the grad mode",
    "is_inference_mode_enabled": "asks for the inference mode",
    "is_autocast_enabled": "asks for autocast",
    "get_autocast_dtype": "asks for the autocast dtype",
    "get_default_dtype": "asks for the default dtype",
    "manual_seed": "sets the seed",
    "set_rng_state": "sets the random state",
    "state_dict": "reads a state dict",
}
"""Names in the code of a forward whose answers tracing would write down as constants."""


def question(module: nn.Module) -> str:
    """Return what the module's forward asks that a graph cannot answer when it runs; empty if it asks nothing."""
    kind: Any = plain_class(module)
    function = _plain_function(vars(module)["forward"] if has_own_forward(module) else kind.forward)
    names = frozenset[str]() if function is None else _names_in(function, kind)
    if "training" in names and function is not None and re.search(r"\btraining\s+is\b", _source(function.__code__)):
        return "its forward compares self.training by `is`, and a graph reads it as an argument"
    return next(
        (f"its forward {what}, which a graph does not show" for name, what in _QUESTIONS.items() if name in names), ""
    )


def names_read(kind: Any) -> frozenset[str]:
    """Return the names in the code of a class's forward, and in the methods and functions that it reaches."""
    function = _plain_function(kind.forward)
    return frozenset() if function is None else _names_in(function, kind)


@functools.lru_cache(maxsize=1024)
def _names_in(forward: types.FunctionType, kind: type) -> frozenset[str]:
    """Return the names in the code of a forward, and in what it names of its classes and their packages."""
    packages = {owner.__module__.partition(".")[0] for owner in kind.__mro__} - {"torch", "builtins", "rewriter"}
    names: set[str] = set()
    seen: set[types.CodeType] = set()
    pending: list[Any] = [forward]
    while pending:
        function = _plain_function(pending.pop())
        if function is None or function.__code__ in seen:
            continue
        if str(function.__module__).partition(".")[0] not in packages:
            continue
        seen.add(function.__code__)
        found = set(_names_of(function.__code__))
        names |= found
        globals_ = [function.__globals__[name] for name in found if name in function.__globals__]
        pending += globals_
        for owner in (*kind.__mro__, *(one for one in globals_ if isinstance(one, (type, types.ModuleType)))):
            pending += [vars(owner)[name] for name in found if name in vars(owner)]
    return frozenset(names)


def _plain_function(value: Any) -> types.FunctionType | None:
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    value = inspect.unwrap(value) if callable(value) and not isinstance(value, type) else value
    return value if isinstance(value, types.FunctionType) else None


def _names_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)


def _is_torchs(module: str) -> bool:
    return module == "torch" or module.startswith("torch.")


@functools.lru_cache(maxsize=1024)
def _source(code: types.CodeType) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return ""


def tests_result() -> str:
    """Return the variable that takes a module's result in the forward now running, and that is tested for None."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and _is_torchs(str(frame.f_globals.get("__name__")).replace("rewriter.", "torch.")):
        frame = frame.f_back
    source = "" if frame is None else _source(frame.f_code)
    tested = sorted({*_TESTED_FOR_NONE.findall(source)})
    return next((name for name in tested if re.search(rf"(?m)^[^=\n#]*\b{name}\b[^=\n]*=\s*self\b", source)), "")


def check_root(root: nn.Module) -> None:
    """Refuse what torch.fx records without the code that surrounds the forward, or under other names.

    Raises:
        CaptureError: and why.
    """
    kind = plain_class(root)
    for name in ("graph", "code"):
        if name in root._modules or name in root._parameters or name in root._buffers:
            raise CaptureError(f"the model has a submodule or tensor called {name!r}, a name that graphs use")
    if has_own_forward(root):
        raise CaptureError(f"the forward of this {kind.__name__} was replaced on the object itself")
    if kind.__call__ is not nn.Module.__call__:
        raise CaptureError(f"{kind.__name__} has a __call__ of its own")
    kinds = {parameter.kind for parameter in inspect.signature(kind.forward).parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds and inspect.Parameter.KEYWORD_ONLY in kinds:
        raise CaptureError(f"{kind.__name__}.forward takes *args and keywords after them")
    if hasattr(kind.forward, "__wrapped__"):
        for name, one in (("**kwargs", inspect.Parameter.VAR_KEYWORD), ("keywords", inspect.Parameter.KEYWORD_ONLY)):
            if one in kinds:
                raise CaptureError(f"{KEPT}; {kind.__name__}.forward is wrapped by a decorator and takes {name}")


def check_call(module: nn.Module) -> None:
    """Refuse a call of a module whose class has a ``__call__`` of its own: it would run while tracing, and again."""
    for kind in type(module).__mro__:
        if kind is nn.Module:
            return
        if "__call__" in vars(kind) and not kind.__module__.startswith("torch.nn."):
            raise CaptureError(f"a {type(module).__name__} is called, which has a __call__ of its own")


def absences(root: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield which of the forward's arguments to leave out, of those that may be None.

    All choices of up to three arguments are made, and the most telling ones of more.
    """
    forward = plain_class(root).forward
    function = _plain_function(forward)
    tested = _TESTED_FOR_NONE.findall(_source(function.__code__)) if function is not None else ()
    names = [
        parameter.name
        for parameter in list(inspect.signature(forward).parameters.values())[1:]
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is None
        or parameter.name in tested
        or any(word in str(parameter.annotation) for word in ("None", "Optional"))
    ]
    if len(names) <= _EXHAUSTIVE:
        choices: Any = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(1, len(names) + 1))
    else:
        singles = [(name,) for name in names]
        choices = [*singles, *(tuple(n for n in names if n != name) for name in names), tuple(names)]
    for choice in choices:
        yield dict.fromkeys(choice)


def resolve_annotations(root: nn.Module, graph: fx.Graph) -> None:
    """Make annotations that are still text into types; TorchScript cannot read the text in generated code."""
    try:
        hints = typing.get_type_hints(plain_class(root).forward)
    except Exception:  # names that only a type checker imports: the input has no type then
        hints = {}
    for node in graph.nodes:
        if isinstance(node.type, str):
            node.type = hints.get(str(node.target) if node.op == "placeholder" else "return")


def outline(graph: fx.Graph, absent: dict[str, Any]) -> list[Any]:
    """Return what a graph does, with the absent arguments written as None; equal outlines do the same."""
    names: Any = {}
    lines: list[Any] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            name = str(node.target).lstrip("*")
            names[node] = _Name("None" if name in absent else f"input {name}")
        elif getattr(node.target, "__name__", "") != "_assert_is_none":
            names[node] = _Name(f"%{len(lines)}")
            arguments = fx.node.map_arg((node.args, dict(node.kwargs)), names.__getitem__)
            lines.append((node.op, node.target, repr(arguments)))
    return lines


class _Name:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text
