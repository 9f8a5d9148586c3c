"""Model files: reading one runs no code of it, writing one leaves the whole file or nothing."""

from __future__ import annotations

from rewriter.serialization._atomic import check_writable, written_atomically
from rewriter.serialization._functions import graph_function
from rewriter.serialization._graph_data import graph_from_data, graph_to_data
from rewriter.serialization._graph_signature import structure_from_text
from rewriter.serialization._load import load_model, read_adapter
from rewriter.serialization._names import import_object, loadable
from rewriter.serialization._save import check_suffix, restore_graph_module, save_model
from rewriter.serialization._vet import when_vetted

__all__ = [
    "check_suffix",
    "check_writable",
    "graph_from_data",
    "graph_function",
    "graph_to_data",
    "import_object",
    "load_model",
    "loadable",
    "read_adapter",
    "restore_graph_module",
    "save_model",
    "structure_from_text",
    "when_vetted",
    "written_atomically",
]
