"""Model files: `load_model` reads one without running code of it, `save_model` writes the whole file or nothing.

`save_adapter` writes LoRA chains as an adapter of PEFT.
"""

from __future__ import annotations

from rewriter.export import save_adapter
from rewriter.serialization import load_model, save_model

__all__ = ["load_model", "save_adapter", "save_model"]
