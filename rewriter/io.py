"""Model files: `load_model` reads one without running code from it, `save_model` writes one whole or not at all."""

from __future__ import annotations

from rewriter.serialization import load_model, save_model

__all__ = ["load_model", "save_model"]
