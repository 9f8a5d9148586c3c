"""Absorbing what other tools did to a model; each source of parametrized tensors has a file of its own."""

from __future__ import annotations

from rewriter.absorbing._low_rank_change import LowRankChange
from rewriter.absorbing._take_over import (
    absorbable,
    absorbed_sites,
    foreign_entries,
    holders_of,
    take_over,
    taken_over,
)

__all__ = [
    "LowRankChange",
    "absorbable",
    "absorbed_sites",
    "foreign_entries",
    "holders_of",
    "take_over",
    "taken_over",
]
