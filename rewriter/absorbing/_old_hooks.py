"""torch.nn.utils.weight_norm and spectral_norm as hooks: what was there before parametrizations."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.absorbing._source import Holder
from rewriter.context._random import nothing_drawn
from rewriter.parametrizations._spectral_norm import SpectralNorm
from rewriter.parametrizations._weight_norm import WeightNorm

# torch.nn.utils has functions of the names of these modules.
_weight_norm: Any = importlib.import_module("torch.nn.utils.weight_norm")
_spectral_norm: Any = importlib.import_module("torch.nn.utils.spectral_norm")


class HookedSpectralNorm(SpectralNorm):
    """Spectral normalization as the hook does it: the right vector advances first, the left one after it."""

    def _in_one_node(self, X: Tensor) -> None:
        return None  # that node advances the left vector first

    def _advance(self, M: Tensor, steps: int) -> None:
        with torch.no_grad():
            for _ in range(steps):
                self._turn(self._v, torch.mv(M.mH, self._u))
                self._turn(self._u, torch.mv(M, self._v))


def holders(module: nn.Module) -> Iterator[Holder]:
    """Find the tensors of `module` that a normalizing hook computes before each forward."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, _weight_norm.WeightNorm):
            yield _normed(module, key, hook)
        elif isinstance(hook, _spectral_norm.SpectralNorm):
            yield _spectral(module, key, hook)


def _normed(module: nn.Module, key: int, hook: Any) -> Holder:
    names = [f"{hook.name}_g", f"{hook.name}_v"]

    def release() -> None:
        take_off(module, key, hook.name, names)

    # The hook writes "one norm for the whole tensor" as -1.
    dim = None if hook.dim == -1 else hook.dim
    stored = tuple((module, name) for name in names)
    return Holder("torch.weight_norm", module, hook.name, stored, lambda: [WeightNorm(dim)], release)


def _spectral(module: nn.Module, key: int, hook: Any) -> Holder:
    names = [f"{hook.name}_{part}" for part in ("orig", "u", "v")]

    def steps() -> list[nn.Module]:
        weight = getattr(module, names[0])
        with nothing_drawn([weight]):
            step = HookedSpectralNorm(hook.n_power_iterations, hook.dim, hook.eps, weight=weight)
        if weight.ndim > 1:
            step._u.copy_(getattr(module, names[1]))
            step._v.copy_(getattr(module, names[2]))
        return [step]

    def release() -> None:
        take_off(module, key, hook.name, names)
        hooks: list[tuple[Any, Any]] = [
            (module._state_dict_hooks, _spectral_norm.SpectralNormStateDictHook),
            (module._load_state_dict_pre_hooks, _spectral_norm.SpectralNormLoadStateDictPreHook),
        ]
        for registered, kind in hooks:
            for number, other in list(registered.items()):
                # Load hooks are wrapped; the wrapper has the hook.
                inner = getattr(other, "hook", other)
                if isinstance(inner, kind) and getattr(inner, "fn", None) is hook:
                    del registered[number]

    return Holder("torch.spectral_norm", module, hook.name, ((module, names[0]),), steps, release)


def take_off(module: nn.Module, key: int, name: str, stored: list[str]) -> None:
    """Remove a hook, the tensors that it stored in `module` and the value that it left there."""
    del module._forward_pre_hooks[key]
    module._forward_pre_hooks_with_kwargs.pop(key, None)
    module.__dict__.pop(name, None)
    for tensor in stored:
        module._parameters.pop(tensor, None)
        module._buffers.pop(tensor, None)
        module._non_persistent_buffers_set.discard(tensor)
