"""Hooks that a user registered at a module, or for all modules."""

from __future__ import annotations

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def has_hooks(module: nn.Module) -> bool:
    """Whether a user's hooks run when the module is called, so that the call has to stay one."""
    own, for_all = module.__dict__, vars(nn.modules.module)
    return any(map(own.get, _HOOKS)) or any(map(for_all.get, _GLOBAL_HOOKS))
