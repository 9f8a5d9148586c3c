"""The formats, and the names of their files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from torch import nn
from torch.export import ExportedProgram

from rewriter.errors import ModelFileError
from rewriter.parametrizations._registry import suggestion
from rewriter.serialization._save import check_suffix

Format = Literal["module", "torchscript", "pt2", "aoti", "onnx", "safetensors", "hf"]
FORMATS: tuple[str, ...] = get_args(Format)

_SUFFIXES: Mapping[Format, tuple[str, ...]] = {
    "module": (".pt", ".pth"),
    "torchscript": (".pt", ".pth", ".ts"),
    "pt2": (".pt2",),
    "aoti": (".pt2",),
    "onnx": (".onnx",),
    "safetensors": (".safetensors",),
}
"""The suffixes of each format; a folder (hf) has a name without one of them."""


def format_of(model: nn.Module | ExportedProgram, path: str | os.PathLike[str]) -> Format:
    """Return the format that the suffix of `path` names for `model`.

    >>> format_of(nn.Linear(2, 2), "model.onnx"), format_of(nn.Linear(2, 2), "model.pt")
    ('onnx', 'module')

    Raises:
        ModelFileError: no format has the suffix.
    """
    called = formats_called(path)
    if called and "module" not in called:
        return called[0]
    suffix, known = Path(path).suffix, sorted({suffix for named in _SUFFIXES.values() for suffix in named})
    if suffix and not called:
        raise ModelFileError(
            f"{path}: no format has the suffix {suffix}{suggestion(suffix, known) or '; they are ' + ', '.join(known)}"
        )
    if isinstance(model, nn.Module):
        return "module"
    check_suffix(model, path)
    return "pt2"


def formats_called(path: str | os.PathLike[str]) -> list[Format]:
    """Return the formats whose files have names like `path`.

    >>> formats_called("model.onnx"), formats_called("model.pt"), formats_called("model")
    (['onnx'], ['module', 'torchscript'], [])
    """
    suffix = Path(path).suffix.lower()
    return [format for format, suffixes in _SUFFIXES.items() if suffix in suffixes]


def check_name(path: Path, format: Format) -> None:
    """Refuse a name that says the file is of another format.

    Raises:
        ModelFileError: says which suffix the format has.
    """
    meant = formats_called(path)
    if meant and format not in meant:
        ends = f"ends in {' or '.join(_SUFFIXES[format])}" if format in _SUFFIXES else "is a folder"
        raise ModelFileError(f"{path} is called like the format {meant[0]}; a file of the format {format} {ends}")
    if format == "aoti" and not meant:  # torch refuses another name
        raise ModelFileError(f"{path}: the name of an AOTInductor package ends in .pt2")
