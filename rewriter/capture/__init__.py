"""How a model's uses of its tensors are found."""

from __future__ import annotations

from rewriter.capture._capture import Capture, capture, is_torch_leaf
from rewriter.capture._examples import Call, call_for, difference
from rewriter.capture._expansions import Expanded, Parts, expansion_of, part_with
from rewriter.capture._export import export_capture
from rewriter.capture._leaves import Opened, Own, bind_call, opener_of, opens, opens_up, reads_every_site
from rewriter.sites._hooks import has_hooks

__all__ = [
    "Call",
    "Capture",
    "Expanded",
    "Opened",
    "Own",
    "Parts",
    "bind_call",
    "call_for",
    "capture",
    "difference",
    "expansion_of",
    "export_capture",
    "has_hooks",
    "is_torch_leaf",
    "opener_of",
    "opens",
    "opens_up",
    "part_with",
    "reads_every_site",
]
