"""torch.nn.utils.prune: a mask in a buffer and a hook that multiplies with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils import prune

from rewriter.absorbing._old_hooks import take_off
from rewriter.absorbing._source import Holder
from rewriter.parametrizations._mask import Mask


def holders(module: nn.Module) -> Iterator[Holder]:
    """Find the tensors of `module` that are pruned; pruning one several times has left one mask."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, prune.BasePruningMethod):
            yield _pruned(module, key, hook)


def _pruned(module: nn.Module, key: int, hook: Any) -> Holder:
    name: str = hook._tensor_name
    original, mask = f"{name}_orig", f"{name}_mask"

    def release() -> None:
        take_off(module, key, name, [original, mask])

    def steps() -> list[nn.Module]:
        return [Mask(getattr(module, mask))]

    return Holder("torch.prune", module, name, ((module, original),), steps, release)
