"""Noticing edits of a lowered graph."""

from __future__ import annotations

import operator

from torch import fx


class Marks:
    """The nodes of a graph as they are: torch.fx replaces the arguments of a node whole, so identity shows an edit."""

    def __init__(self, graph: fx.Graph) -> None:
        self.objects = [part for node in graph.nodes for part in (node, node.op, node.target, node.args, node.kwargs)]

    def same(self, other: Marks) -> bool:
        """Say whether both graphs are one, without an edit between."""
        return len(self.objects) == len(other.objects) and all(map(operator.is_, self.objects, other.objects))
