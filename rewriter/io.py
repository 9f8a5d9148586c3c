"""Model files: `load_model` reads one without running code of it, `save_model` writes the whole file or nothing."""

from __future__ import annotations

from rewriter.serialization import load_model, save_model

__all__ = ["load_model", "save_model"]
