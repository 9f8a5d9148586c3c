"""Hooks that a user registered at a module, or for all modules."""

from __future__ import annotations

from typing import Any

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def has_hooks(module: nn.Module) -> bool:
    """Whether a user's hooks run when the module is called, so that the call has to stay one."""
    return any(hooks_of(module)) or any(hooks_for_all())


def hooks_of(module: nn.Module) -> list[dict[Any, Any]]:
    """Return where a module has its hooks."""
    own = module.__dict__
    return [own[name] for name in _HOOKS if name in own]


def hooks_for_all() -> list[dict[Any, Any]]:
    """Return where the hooks are that run for all modules."""
    for_all = vars(nn.modules.module)
    return [for_all[name] for name in _GLOBAL_HOOKS]
