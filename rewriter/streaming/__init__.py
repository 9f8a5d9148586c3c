"""Checkpoints larger than memory: planned from their headers, evaluated one site at a time, written shard by shard."""

from __future__ import annotations

from rewriter.streaming._checkpoint import Checkpoint, open_checkpoint
from rewriter.streaming._merge import merge_checkpoint
from rewriter.streaming._plan import CheckpointPlan, plain_entries, plan_checkpoint
from rewriter.streaming._ranks import Ranks, ranks_of_torchrun
from rewriter.streaming._recorded import contents_of, described_tensors
from rewriter.streaming._verbs import Streamed, apply_checkpoint, bake_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointPlan",
    "Ranks",
    "Streamed",
    "apply_checkpoint",
    "bake_checkpoint",
    "contents_of",
    "described_tensors",
    "merge_checkpoint",
    "open_checkpoint",
    "plain_entries",
    "plan_checkpoint",
    "ranks_of_torchrun",
]
