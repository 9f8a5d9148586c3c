"""Checkpoints larger than memory: planned from their headers, evaluated one site at a time, written shard by shard."""

from __future__ import annotations

from rewriter.streaming._checkpoint import Checkpoint, is_checkpoint, open_checkpoint
from rewriter.streaming._plan import CheckpointPlan, plan_checkpoint
from rewriter.streaming._verbs import apply_checkpoint, bake_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointPlan",
    "apply_checkpoint",
    "bake_checkpoint",
    "is_checkpoint",
    "open_checkpoint",
    "plan_checkpoint",
]
