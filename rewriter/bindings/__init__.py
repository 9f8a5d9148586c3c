"""Bindings: how the uses of computed tensors in a model ask for their values."""

from __future__ import annotations

from rewriter.bindings._graph_module import RewrittenModule
from rewriter.bindings._graph_owners import open_graph_owners
from rewriter.bindings._late_changes import refuse_replaced
from rewriter.bindings._owner import attach, detach, open_path, open_root, release

__all__ = [
    "RewrittenModule",
    "attach",
    "detach",
    "open_graph_owners",
    "open_path",
    "open_root",
    "refuse_replaced",
    "release",
]
