"""Model files: reading them without running what is in them, writing them without leaving half of one."""

from __future__ import annotations

from rewriter.io._functions import graph_function
from rewriter.io._graph_data import graph_from_data, graph_to_data

__all__ = ["graph_from_data", "graph_function", "graph_to_data"]
