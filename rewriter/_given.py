"""What the public verbs are given where they want a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn
from torch.export import ExportedProgram

from rewriter.errors import RewriterError

Model = TypeVar("Model", nn.Module, ExportedProgram, nn.Module | ExportedProgram)
"""What a verb takes, and gives back of the same kind."""
_FSDP = "torch.distributed.fsdp"


def check_model(model: Any, verb: str, *, programs: bool = True, wrapped: bool = False) -> None:
    """Refuse what is no model, and models inside a wrapper.

    Arguments:
        verb: what the caller is called.
        programs: whether an ExportedProgram will do.
        wrapped: whether a model inside DistributedDataParallel and its like will do.

    Raises:
        RewriterError: says what to give instead.
    """
    if not wrapped and isinstance(model, fsdp_classes()[1:]):
        raise RewriterError(
            f"{verb} takes no {type(model).__name__}, whose shards are parts of flat tensors: shard with fully_shard "
            "instead, or take its full state dict and give it to rewriter.state.convert_state_dict"
        )
    if not wrapped and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise RewriterError(
            f"{verb} takes the model itself, not {type(model).__name__} around it: use its attribute .module, and wrap "
            "the result again"
        )
    if isinstance(model, nn.Module) or (programs and isinstance(model, ExportedProgram)):
        return
    found, hint = kind_of(model), ""
    if isinstance(model, type):
        found = f"the class {model.__name__}"
        hint = f"; make one: {model.__name__}(…)"
    elif isinstance(model, (str, os.PathLike)):
        hint = "; rewriter.io.load_model reads one from a file"
    elif isinstance(model, Mapping):
        hint = "; load the weights into their model first"
    wanted = "a torch.nn.Module or an ExportedProgram" if programs else "a torch.nn.Module"
    raise RewriterError(f"{verb} takes {wanted}, not {found}{hint}")


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; their module is imported by the code that makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def fsdp_classes() -> tuple[type[Any], ...]:
    """Return FSDP's classes, if it is imported: the code that shards a model imports it."""
    fsdp: Any = sys.modules.get(_FSDP)
    return () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)


def is_fully_sharded(module: object) -> bool:
    """Whether `fully_shard` sharded a module."""
    return isinstance(module, fsdp_classes()[:1])


def is_managed(module: nn.Module) -> bool:
    """Whether `fully_shard` puts the tensors of a module in place at each forward."""
    return "_is_fsdp_managed_module" in module.__dict__


def is_fsdp_hook(hook: object) -> bool:
    """Whether FSDP registered a hook."""
    return str(getattr(hook, "__module__", "")).startswith(_FSDP)


def kind_of(value: object) -> str:
    """Return the name of a value's class, with its article.

    >>> kind_of(""), kind_of(1)
    ('a str', 'an int')
    """
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
