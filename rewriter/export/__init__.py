"""Plain files of a model for other programs, each read back and compared with the model."""

from __future__ import annotations

from rewriter.export._adapter import save_adapter
from rewriter.export._contents import Stored, read_contents
from rewriter.export._examples import call_from_file, example_call, example_tensor
from rewriter.export._export import Exported, export_model
from rewriter.export._formats import FORMATS, Format, format_of, formats_called
from rewriter.export._provenance import provenance, read_provenance

__all__ = [
    "FORMATS",
    "Exported",
    "Format",
    "Stored",
    "call_from_file",
    "example_call",
    "example_tensor",
    "export_model",
    "format_of",
    "formats_called",
    "provenance",
    "read_contents",
    "read_provenance",
    "save_adapter",
]
