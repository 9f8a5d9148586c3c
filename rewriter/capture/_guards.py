"""What a forward may reach past torch.fx, and what happens instead while it is recorded.

Each guard is a context: it puts something in the way for the time of one trace and takes it out again.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import rnn, stateless

from rewriter.errors import CaptureError
from rewriter.sites import plain_class

_FACTORIES = (
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint",
    "randn", "randperm", "scalar_tensor", "tensor", "zeros",
)  # fmt: skip
_PACKING = ("pack_padded_sequence", "pack_sequence", "pad_packed_sequence", "pad_sequence")
_MODES = {
    "is_grad_enabled": "asks for or changes the grad mode",
    "set_grad_enabled": "changes the grad mode",
    "is_inference_mode_enabled": "asks for the inference mode",
    "is_autocast_enabled": "asks for or changes autocast",
    "get_autocast_dtype": "asks for autocast",
    "set_autocast_enabled": "changes autocast",
    "manual_seed": "sets the seed",
    "seed": "sets the seed",
    "set_rng_state": "sets the random state",
    "set_default_dtype": "sets the default dtype",
    "set_default_device": "sets the default device",
}
_CONTEXTS: tuple[tuple[Any, str, str], ...] = (
    (torch.inference_mode, "__enter__", "enters inference mode"),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__", "hooks saved tensors"),
    (torch.autograd.Function, "apply", "calls an autograd.Function, whose backward a graph would lose"),
    (stateless, "_functional_call", "calls functional_call"),
)


class Flag:
    """Stands for ``module.training``."""

    def __init__(self, target: str) -> None:
        self.target = target


Patch = tuple[Any, str, Any]


@contextlib.contextmanager
def patched(patches: list[Patch]) -> Iterator[None]:
    """Set attributes (owner, name, value), and put back what was there."""
    former = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name, _ in patches]
    try:
        for owner, name, value in patches:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(former):
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


_ABSENT = object()


@contextlib.contextmanager
def guarded(tracer: Any, root: nn.Module) -> Iterator[None]:
    """Keep every guard up while `root` is traced; other threads do not meet them."""
    functions = {**_recorders(tracer), **_mode_guards(tracer), **_look_guards(tracer)}
    functions = {
        function: replacement if isinstance(replacement, _TypeOf) else _in_this_thread(function, replacement)
        for function, replacement in functions.items()
    }
    attributes: list[Patch] = [(torch, name, functions[getattr(torch, name)]) for name in (*_FACTORIES, *_MODES)]
    attributes += [(rnn, name, functions[getattr(rnn, name)]) for name in _PACKING]
    attributes += [(torch, "is_tensor", functions[torch.is_tensor])]
    refusals = [(owner, name, _refusing(tracer, what)) for owner, name, what in _CONTEXTS]
    for owner, name, replacement in (*refusals, *_module_guards(tracer)):
        former = vars(owner)[name]
        if isinstance(former, classmethod):
            attributes.append((owner, name, classmethod(_in_this_thread(former.__func__, replacement))))
        else:
            attributes.append((owner, name, _in_this_thread(former, replacement)))
    with _names_replaced(root, functions), _training_visible(root), patched(attributes):
        yield


def _in_this_thread(function: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    thread = threading.get_ident()

    def choose(*args: Any, **kwargs: Any) -> Any:
        chosen = replacement if threading.get_ident() == thread else function
        return chosen(*args, **kwargs)

    return choose


def _recorders(tracer: Any) -> dict[Any, Callable[..., Any]]:
    """Make ``torch.zeros(...)`` and its like nodes of the graph: sizes may be values, and random ones stay random."""

    def recorder(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: tracer.create_proxy("call_function", function, args, kwargs)

    factories = [getattr(torch, name) for name in _FACTORIES]
    return {function: recorder(function) for function in (*factories, *(getattr(rnn, name) for name in _PACKING))}


def _refusing(tracer: Any, what: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> None:
        tracer.refuse(f"its forward {what}, which a graph does not show")

    return refuse


def _mode_guards(tracer: Any) -> dict[Any, Callable[..., Any]]:
    return {getattr(torch, name): _refusing(tracer, what) for name, what in _MODES.items()}


def _look_guards(tracer: Any) -> dict[Any, Any]:
    """Refuse questions about a value's Python type: the answer would be that of the stand-in."""

    def guard(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], fx.Proxy):
                tracer.refuse(f"its forward asks {name}() about a value that is not known yet")
            return function(*args, **kwargs)

        return ask

    def attribute(*args: Any) -> Any:
        if len(args) == 3 and isinstance(args[0], fx.Proxy):
            tracer.refuse("its forward asks getattr() for what a value may not have")
        return getattr(*args)

    found: dict[Any, Any] = {
        function: guard(function, function.__name__) for function in (isinstance, hasattr, callable)
    }
    found[torch.is_tensor] = guard(torch.is_tensor, "is_tensor")
    found[getattr] = attribute
    found[type] = _TypeOf(tracer)
    return found


class _TypeOf:
    """``type`` with a question about a value refused; still usable as the second argument of ``isinstance``."""

    def __init__(self, tracer: Any) -> None:
        self.tracer = tracer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], fx.Proxy):
            self.tracer.refuse("its forward asks type() about a value that is not known yet")
        return type(*args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, type)

    def __getattr__(self, name: str) -> Any:
        return getattr(type, name)


_QUESTIONS = ("isinstance", "hasattr", "callable", "getattr", "type")


@contextlib.contextmanager
def _names_replaced(root: nn.Module, functions: dict[Any, Any]) -> Iterator[None]:
    """Put the replacements where the user's modules have the functions under names of their own."""
    undo: list[tuple[dict[str, Any], str, Any]] = []
    by_id = {id(function): replacement for function, replacement in functions.items()}
    try:
        for space in _namespaces(root):
            for name, value in list(space.items()):
                if id(value) in by_id:
                    undo.append((space, name, value))
                    space[name] = by_id[id(value)]
            for name in _QUESTIONS:
                if name not in space:
                    undo.append((space, name, _ABSENT))
                    space[name] = functions[getattr(builtins, name)]
        yield
    finally:
        for space, name, value in reversed(undo):
            if value is _ABSENT:
                del space[name]
            else:
                space[name] = value


def _namespaces(root: nn.Module) -> list[dict[str, Any]]:
    """The global names of the code that the model's classes are written in, and of its neighbours in their packages."""
    written = {plain_class(module) for module in root.modules()}
    kinds = {kind for one in written for kind in one.__mro__}
    spaces: dict[int, dict[str, Any]] = {}
    packages = set()
    for kind in kinds:
        if kind.__module__.partition(".")[0] in ("torch", "builtins", "rewriter"):
            continue
        packages.add(kind.__module__.partition(".")[0])
        for function in vars(kind).values():
            space = getattr(getattr(function, "__func__", function), "__globals__", None)
            if isinstance(space, dict) and str(space.get("__name__", "")).partition(".")[0] != "torch":
                spaces[id(space)] = space
    for name, module in list(sys.modules.items()):
        if module is not None and name.partition(".")[0] in packages and isinstance(vars(module), dict):
            spaces[id(vars(module))] = vars(module)
    return list(spaces.values())


def _listed(tracer: Any, names_and_tensors: Callable[..., Any]) -> Callable[..., Any]:
    def listed(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        for path, tensor in names_and_tensors(module, *args, **kwargs):
            known = isinstance(tensor, Tensor) and tensor in tracer.tensors
            yield path, tracer.read(tracer.tensors[tensor]) if known else tensor

    return listed


def _module_guards(tracer: Any) -> list[Patch]:
    """Refuse a forward that sets attributes, and make the lists of a module's tensors lists of values."""

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        what = f"sets self.{name}" if module in tracer.paths else f"makes a {type(module).__name__} as it runs"
        tracer.refuse(f"its forward {what}")

    patches: list[Patch] = [(nn.Module, "__setattr__", set_attribute)]
    for name in ("named_parameters", "named_buffers"):
        patches.append((nn.Module, name, _listed(tracer, getattr(nn.Module, name))))
    patches.append((nn.Module, "state_dict", _refusing(tracer, "reads its state dict")))
    return patches


@contextlib.contextmanager
def _training_visible(root: nn.Module) -> Iterator[None]:
    """Make ``self.training`` a node, so that ``train()`` and ``eval()`` still decide after capture.

    A forward that branches on it is refused by torch.fx: a value has no truth value while it is recorded.
    """
    flags: list[tuple[nn.Module, bool]] = []
    seen: set[int] = set()
    try:
        for path, module in root.named_modules():
            if id(module) not in seen and "training" in module.__dict__:
                seen.add(id(module))
                flags.append((module, module.__dict__.pop("training")))
                # torch.fx asks its own copy of Module.__getattr__, which finds buffers: the flag stands in as one.
                module._buffers["training"] = Flag(f"{path}.training" if path else "training")
        yield
    finally:
        for module, flag in flags:
            module._buffers.pop("training", None)
            module.__dict__["training"] = flag


def refuse_unknown_call(module: nn.Module) -> None:
    """Refuse a call of a module whose class has a ``__call__`` of its own: it would run twice, once while recording."""
    for kind in type(module).__mro__:
        if kind is nn.Module:
            return
        if "__call__" in vars(kind) and not kind.__module__.startswith("torch.nn."):
            raise CaptureError(f"a {type(module).__name__} is called, which has a __call__ of its own")
