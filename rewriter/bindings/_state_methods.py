"""What the class of a model does to its state dict: the graph that it was rewritten to does the same."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from rewriter._torch import WrappedHook
from rewriter.sites._loading import converting_owner

_METHODS = ("get_extra_state", "set_extra_state", "_load_from_state_dict", "_save_to_state_dict")
_HOOKS = ("_load_state_dict_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")


def take_state_methods(kind: Any, origin: Any) -> None:
    """Give the class of a graph the methods with which `origin` differs from nn.Module."""
    for name in _METHODS:
        if getattr(origin, name) is not getattr(nn.Module, name):
            method = _called_on(origin, name)
            setattr(kind, name, converting_owner(method) if name == "_load_from_state_dict" else method)


def _called_on(origin: Any, name: str) -> Any:
    """Return a method of a class for a model that is no instance of it: `super()` works in it."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        view = origin.__new__(origin)
        object.__setattr__(view, "__dict__", self.__dict__)
        return getattr(view, name)(*args, **kwargs)

    return functools.wraps(getattr(origin, name))(call)


def bind_state_hooks(model: nn.Module, root: nn.Module) -> None:
    """Bind the hooks on the state dict to `model` instead of `root`, which they refer to weakly."""
    for name in _HOOKS:
        hooks: dict[int, Any] = model.__dict__.get(name) or {}
        for key, hook in hooks.items():
            if isinstance(hook, WrappedHook) and hook.with_module and hook.module() is root:
                hooks[key] = WrappedHook(hook.hook, model)
