"""Model files: `load_model` reads one without running code of it, `save_model` writes the whole file or nothing.

`read_adapter` reads an adapter that PEFT saved; `save_adapter` writes LoRA chains as one.
"""

from __future__ import annotations

from rewriter.export import save_adapter
from rewriter.serialization import load_model, read_adapter, save_model

__all__ = ["load_model", "read_adapter", "save_adapter", "save_model"]
