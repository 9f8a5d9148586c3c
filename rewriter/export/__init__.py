"""Plain files of a model for other programs: TorchScript, ExportedProgram, ONNX, safetensors."""

from __future__ import annotations

from rewriter.export._adapter import save_adapter
from rewriter.export._examples import example_tensor
from rewriter.export._export import FORMATS, Format, export_model, format_of, formats_called

__all__ = ["FORMATS", "Format", "example_tensor", "export_model", "format_of", "formats_called", "save_adapter"]
