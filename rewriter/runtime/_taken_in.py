"""Modules whose forward is part of a graph: what is done to them afterwards and has no effect there is told.

The graph calls the functions that a module would have called, with the settings it had, and not the module. A hook that
is registered later would never run, and nobody would know.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from rewriter.errors import RewriterError
from rewriter.runtime._places import CONTAINER, SESSION
from rewriter.runtime._signature import same_setting

_REGISTER = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
    "register_backward_hook",
)
_BOOKKEEPING = frozenset(nn.Module().__dict__)
_WAY_OUT = "before the model is rewritten, or rewrite it with capture='module'"

_Paths = weakref.WeakKeyDictionary[nn.Module, str]
_known: weakref.WeakKeyDictionary[fx.GraphModule, tuple[weakref.ref[fx.Graph], _Paths]] = weakref.WeakKeyDictionary()


def hook_methods(plain: Any) -> dict[str, Any]:
    """Return the methods of a class that register hooks, with a warning where a hook would never run."""
    return {name: _telling(getattr(plain, name)) for name in _REGISTER if hasattr(plain, name)}


def _telling(register: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(register)
    def registering(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = _taken_in_as(self)
        if path is not None:
            warnings.warn(
                f"this hook of module {path} will not run: its forward is part of the graph that the model was "
                f"rewritten to, which does not call the module. Register hooks {_WAY_OUT}",
                stacklevel=2,
            )
        return register(self, *args, **kwargs)

    return registering


def tell_of_setting(module: nn.Module, name: str, value: Any) -> None:
    """Warn if an attribute is about to be changed that a graph has taken the former value of."""
    state = module.__dict__
    if name == "forward":
        if name not in state and value == getattr(module, name):
            return
    elif name not in state or name.startswith("_") or name in _BOOKKEEPING or same_setting(state[name], value):
        return
    elif not (type(module).__module__ or "").startswith("torch.nn."):
        return  # a graph takes in all the settings of torch's modules, and of others nobody knows which
    path = _taken_in_as(module)
    if path is not None:
        warnings.warn(
            f"setting {path}.{name} has no effect on the model: its forward is part of the graph that the model was "
            f"rewritten to, as it was then. Set it {_WAY_OUT}",
            stacklevel=3,
        )


def refuse_replaced(model: fx.GraphModule, graph: fx.Graph | None = None) -> None:
    """Say which module was replaced, if one is that a graph needs: what evaluates one of its tensors is gone with it.

    Arguments:
        model: where the modules are.
        graph: the model's own, where it is not given.

    Raises:
        RewriterError: one was.
    """
    for node in (graph or model.graph).nodes:
        owner, found, tensor = str(node.target).partition(f".{CONTAINER}.")
        if node.op != "call_module" or not found:
            continue
        try:
            model.get_submodule(str(node.target))
        except AttributeError:
            raise RewriterError(
                f"{owner} was replaced or removed after the model was rewritten, and the graph still computes the "
                f"{tensor} of the module that was there: bake() the model, which takes in what is there now, and "
                "rewrite the result"
            ) from None


def _taken_in_as(module: nn.Module) -> str | None:
    """Return the path of a module in a model whose graph does in its place what it would do; None if there is none."""
    session = module.__dict__.get(SESSION)
    for model in session.graphs if session is not None else ():
        path = _paths(model).get(module)
        if path is not None:
            return path
    return None


def _paths(model: Any) -> _Paths:
    graph: fx.Graph = model.__dict__["_graph"]
    known = _known.get(model)
    if known is None or known[0]() is not graph:
        known = _known[model] = weakref.ref(graph), _find(model, graph)
    return known[1]


def _find(model: nn.Module, graph: fx.Graph) -> _Paths:
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    found: _Paths = weakref.WeakKeyDictionary()
    run: list[nn.Module] = []
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        if path in called:
            run += module.modules()
            continue
        if path:
            found.setdefault(module, path)
        for name, child in module._modules.items():
            if child is not None and name != CONTAINER:
                pending.append((f"{path}.{name}" if path else name, child))
    for module in run:  # under another name
        found.pop(module, None)
    return found
