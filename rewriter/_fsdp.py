"""Models of which a process has only a part: `fully_shard` keeps shards, accelerate's `cpu_offload` keeps nothing.

FSDP's classes and hooks leave a model that is baked, and its parameters stay shards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from rewriter._given import is_fsdp_hook, is_fully_sharded
from rewriter._torch import composable_keys
from rewriter._undo import undone
from rewriter.errors import PlanError
from rewriter.sites import Site

_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` sharded a module of the model."""
    return any(map(is_fully_sharded, model.modules()))


def reshard(model: nn.Module) -> None:
    """Put the shards in the places of whole parameters, of which FSDP frees the memory."""
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def leave_fsdp(model: nn.Module) -> None:
    """Take FSDP's classes, hooks and marks from the modules; the parameters stay shards, which are DTensors."""
    for module in model.modules():
        for mark in (*_MARKS, *composable_keys()):
            module.__dict__.pop(mark, None)
        for name, hooks in vars(module).items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                for key in [key for key, hook in hooks.items() if _is_fsdps(hook)]:
                    del hooks[key]
        if is_fully_sharded(module):
            module.__class__ = type(module).__bases__[1]


def _is_fsdps(hook: Any) -> bool:
    return is_fsdp_hook(getattr(hook, "hook", hook))  # a hook of state dicts is wrapped


@contextlib.contextmanager
def without_fsdp(model: nn.Module) -> Iterator[None]:
    """Let the model be without FSDP inside the context."""
    with undone(model):
        leave_fsdp(model)
        yield


def refuse_labels(labels: Sequence[tuple[Site, str]]) -> None:
    """Refuse to take single steps out of chains over shards.

    Raises:
        PlanError: names the sites.
    """
    if labels:
        names = ", ".join(site.spec.name for site, _ in labels)
        raise PlanError(f"{names}: a model that fully_shard sharded bakes whole sites, not single steps of a chain")


def refuse_offloaded(model: nn.Module) -> None:
    """Refuse a model whose parameters accelerate fetches for each forward: in between they have no values.

    Raises:
        PlanError: says how to get them back.
    """
    for path, module in model.named_modules():
        hook = module.__dict__.get("_hf_hook")
        if any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ()))):
            raise PlanError(
                f"accelerate has offloaded the tensors of {path or 'the model'}, which have no values now: call "
                "accelerate.hooks.remove_hook_from_submodules(model) before bake"
            )
