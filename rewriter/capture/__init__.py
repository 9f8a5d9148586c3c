"""How a model's uses of its tensors are found."""

from __future__ import annotations

from rewriter.capture._capture import Capture, capture, is_torch_leaf
from rewriter.capture._examples import Call, call_for, difference, given_call
from rewriter.capture._export import export_capture
from rewriter.capture._forward import names_read
from rewriter.capture._leaves import LeafCall, Own, bind_call, has_hooks, leaf_call, opens_up, reads_every_site

__all__ = [
    "Call",
    "Capture",
    "LeafCall",
    "Own",
    "bind_call",
    "call_for",
    "capture",
    "difference",
    "export_capture",
    "given_call",
    "has_hooks",
    "is_torch_leaf",
    "leaf_call",
    "names_read",
    "opens_up",
    "reads_every_site",
]
