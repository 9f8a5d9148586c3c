"""Modules that FSDP shards: it puts their parameters in place at each forward, over every computed tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rewriter._given import fsdp_classes
from rewriter.planning._problems import Problems
from rewriter.planning._resolve import Claim


def refuse_sharded(model: nn.Module, claims: Sequence[Claim], problems: Problems) -> None:
    """Refuse claims on tensors of modules that are sharded already."""
    kinds = fsdp_classes()
    sharded = [path for path, module in model.named_modules() if isinstance(module, kinds)] if kinds else []
    inside = tuple(f"{path}." if path else "" for path in sharded)
    for claim in claims if inside else ():
        if any(name.startswith(inside) for entry in claim.entries for name in entry.names):
            problems.about(
                claim,
                "select",
                "sharded by FSDP, which puts the parameter itself in place at each forward",
                "rewrite the model first, then shard it",
            )
