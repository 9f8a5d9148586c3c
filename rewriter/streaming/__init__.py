"""Checkpoints larger than memory: planned from their headers, evaluated one site at a time, written shard by shard."""

from __future__ import annotations

from rewriter.streaming._checkpoint import Checkpoint, open_checkpoint
from rewriter.streaming._merge import merge_checkpoint
from rewriter.streaming._plan import CheckpointPlan, plan_checkpoint
from rewriter.streaming._verbs import Streamed, apply_checkpoint, bake_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointPlan",
    "Streamed",
    "apply_checkpoint",
    "bake_checkpoint",
    "merge_checkpoint",
    "open_checkpoint",
    "plan_checkpoint",
]
