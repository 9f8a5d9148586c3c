"""Model files: `load_model` reads one without running code of it, `save_model` writes the whole file or nothing.

`read_adapter` reads an adapter that PEFT saved; `save_adapter` writes LoRA chains as one.
"""

from __future__ import annotations

# Files name these two here: torch.load shows the name when it refuses the file.
from rewriter.bindings._graph_module import only_load_model_reads_this_graph as only_load_model_reads_this_graph
from rewriter.bindings._owner_class import only_load_model_reads_this_module as only_load_model_reads_this_module
from rewriter.export import save_adapter
from rewriter.serialization import load_model, read_adapter, save_model

__all__ = ["load_model", "read_adapter", "save_adapter", "save_model"]
