"""One function that writes a model in any of the formats, each by a small writer of its own."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.export import ExportedProgram

from rewriter._given import check_model
from rewriter.errors import CaptureError, ModelFileError, RewriterError
from rewriter.serialization._atomic import written_atomically
from rewriter.serialization._save import write_model

Format = Literal["module", "torchscript", "pt2", "onnx", "safetensors"]
FORMATS: tuple[str, ...] = get_args(Format)

Inputs = tuple[Any, ...]

_SUFFIXES: Mapping[Format, tuple[str, ...]] = {
    "module": (".pt", ".pth"),
    "torchscript": (".pt", ".pth", ".ts"),
    "pt2": (".pt2",),
    "onnx": (".onnx",),
    "safetensors": (".safetensors",),
}
"""What the files of each format are called."""


def export_model(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    *,
    format: Format = "module",
    example_inputs: Sequence[Any] | None = None,
    force: bool = False,
) -> None:
    """Write `model` to `path`: all of the file, or nothing.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_model(torch.nn.Linear(2, 3), f"{folder}/linear.pt", format="torchscript")
    ...     torch.jit.load(f"{folder}/linear.pt")(torch.ones(1, 2)).shape
    torch.Size([1, 3])

    Arguments:
        format: ``module`` (what `load_model` reads), ``torchscript``, ``pt2`` (an ExportedProgram), ``onnx``,
            or ``safetensors`` (the weights alone).
        example_inputs: the forward's arguments; ``pt2`` and ``onnx`` need them, ``torchscript`` traces with
            them a model that it cannot script.
        force: overwrite what is there.

    Raises:
        CaptureError: the model cannot be brought into that format.
        ModelFileError: `path` cannot be written, or its name is that of another format.
    """
    check_model(model, "export_model")
    if format not in _WRITERS:
        raise ModelFileError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    if isinstance(model, ExportedProgram) and format == "module":
        raise CaptureError("an ExportedProgram is no module any more; write it with the format pt2")
    _check_suffix(Path(path), format)
    inputs = None if example_inputs is None else tuple(example_inputs)
    with written_atomically(path, force=force) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _WRITERS[format](model, temporary, inputs)
        except (RewriterError, OSError):
            raise
        except Exception as problem:
            raise CaptureError(
                f"the {type(model).__name__} cannot be written as {format}: {_reason(problem)}"
            ) from problem


def formats_called(path: str | os.PathLike[str]) -> list[Format]:
    """Return the formats whose files have names like `path`.

    >>> formats_called("model.onnx"), formats_called("model.pt"), formats_called("model")
    (['onnx'], ['module', 'torchscript'], [])
    """
    suffix = Path(path).suffix.lower()
    return [format for format, suffixes in _SUFFIXES.items() if suffix in suffixes]


def _check_suffix(path: Path, format: Format) -> None:
    """Refuse a name that says the file is of another format."""
    meant = formats_called(path)
    if meant and format not in meant:
        raise ModelFileError(
            f"{path} is called like the format {meant[0]}; a file of the format {format} ends in "
            f"{' or '.join(_SUFFIXES[format])}"
        )


def _write_module(model: nn.Module | ExportedProgram, path: Path, inputs: Inputs | None) -> None:
    write_model(model, path)


def _write_torchscript(model: nn.Module | ExportedProgram, path: Path, inputs: Inputs | None) -> None:
    if isinstance(model, ExportedProgram) and inputs is None:
        inputs = model.example_inputs[0]
    module = _as_module(model)
    try:
        scripted: Any = torch.jit.script(module)
    except Exception as problem:
        if inputs is None:
            raise CaptureError(
                f"torch.jit.script does not take the {type(module).__name__}: {_reason(problem)}\n"
                "With example inputs (--example float32[2,3]) it is traced instead."
            ) from problem
        trace: Any = torch.jit.trace
        scripted = trace(module, inputs)
    torch.jit.save(scripted, os.fspath(path))


def _write_pt2(model: nn.Module | ExportedProgram, path: Path, inputs: Inputs | None) -> None:
    write_model(_as_program(model, inputs, "pt2"), path)


def _write_onnx(model: nn.Module | ExportedProgram, path: Path, inputs: Inputs | None) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise CaptureError(f"the format onnx needs {' and '.join(missing)}: pip install 'reparam[onnx]'")
    program = _as_program(model, inputs, "onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    # One file: weights beside it would be named after the temporary file.
    importlib.import_module("onnx").save(exported.model_proto, os.fspath(path))


def _write_safetensors(model: nn.Module | ExportedProgram, path: Path, inputs: Inputs | None) -> None:
    safetensors: Any = importlib.import_module("safetensors.torch")
    if isinstance(model, nn.Module):
        # Tied tensors are stored once, with a note of the other names.
        safetensors.save_model(model, os.fspath(path))
    else:
        from rewriter.program import tied

        once = {id(tensor): (name, tensor) for name, tensor in reversed(tied(model.state_dict).items())}
        safetensors.save_file({name: tensor.contiguous() for name, tensor in once.values()}, os.fspath(path))


def _as_module(model: nn.Module | ExportedProgram) -> nn.Module:
    return model.module() if isinstance(model, ExportedProgram) else model


def _as_program(model: nn.Module | ExportedProgram, inputs: Inputs | None, format: str) -> ExportedProgram:
    if isinstance(model, ExportedProgram):
        return model
    if inputs is None:
        raise CaptureError(f"the format {format} needs example inputs, such as --example float32[2,3]")
    return torch.export.export(model, inputs)


def _reason(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0] if lines else type(problem).__name__


_WRITERS: dict[str, Callable[[nn.Module | ExportedProgram, Path, Inputs | None], None]] = {
    "module": _write_module,
    "torchscript": _write_torchscript,
    "pt2": _write_pt2,
    "onnx": _write_onnx,
    "safetensors": _write_safetensors,
}
