"""Model files: reading them without running what is in them, writing them without leaving half of one."""

from __future__ import annotations

from rewriter.serialization._atomic import check_writable, written_atomically
from rewriter.serialization._functions import graph_function
from rewriter.serialization._graph_data import graph_from_data, graph_to_data
from rewriter.serialization._load import load_model
from rewriter.serialization._names import import_object, loadable
from rewriter.serialization._save import check_suffix, save_model

__all__ = [
    "check_suffix",
    "check_writable",
    "graph_from_data",
    "graph_function",
    "graph_to_data",
    "import_object",
    "load_model",
    "loadable",
    "save_model",
    "written_atomically",
]
