"""Writing a model in one of the formats, each by its own small writer."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rewriter._given import check_model
from rewriter.errors import CaptureError, ModelFileError, RewriterError
from rewriter.serialization._atomic import written_atomically
from rewriter.serialization._safetensors import header_of
from rewriter.serialization._save import check_suffix, refuse_distributed, write_model

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
"""The suffixes of each format."""


def export_model(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    example_inputs: Tensor | Sequence[Any] | None = None,
    train: bool = False,
    force: bool = False,
) -> None:
    """Write `model` to `path`: the whole file, or nothing.

    The model is written in eval mode, unless `train` is given or the format is ``module``. It does not change: what
    torch runs or traces is a copy.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_model(torch.nn.Linear(2, 3), f"{folder}/linear.ts")
    ...     torch.jit.load(f"{folder}/linear.ts")(torch.ones(1, 2)).shape
    torch.Size([1, 3])

    Arguments:
        format: ``module`` (for `load_model`), ``torchscript``, ``pt2`` (an ExportedProgram), ``onnx``, or
            ``safetensors`` (the weights alone). By default, the format that the suffix of `path` names.
        example_inputs: the arguments of the forward, or its only argument. ``pt2`` and ``onnx`` need them.
            ``torchscript`` traces a model with them, with a warning, if torch.jit.script does not take it.
        train: export the model in the modes that its modules are in.
        force: overwrite what is there.

    Raises:
        CaptureError: the model cannot be brought into that format.
        ModelFileError: `path` cannot be written, or its name is that of another format.
    """
    check_model(model, "export_model")
    format = format_of(model, path) if format is None else format
    if format not in _WRITERS:
        raise ModelFileError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    if isinstance(model, nn.Module):
        refuse_distributed(model)
    if isinstance(model, ExportedProgram) and format == "module":
        raise CaptureError("an ExportedProgram is no module any more; write it with the format pt2")
    _check_suffix(Path(path), format)
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    inputs = None if inputs is None else tuple(inputs)
    with written_atomically(path, force=force) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        try:
            note = _write(model, temporary, format, inputs, train)
        except (RewriterError, OSError):
            raise
        except Exception as problem:
            raise CaptureError(
                f"the {type(model).__name__} cannot be written as {format}: {_reason(problem)}"
            ) from problem
    if note:
        warnings.warn(f"{path}: {note}", stacklevel=2)


def format_of(model: nn.Module | ExportedProgram, path: str | os.PathLike[str]) -> Format:
    """Return the format that the suffix of `path` names for `model`.

    >>> format_of(nn.Linear(2, 2), "model.onnx"), format_of(nn.Linear(2, 2), "model.pt")
    ('onnx', 'module')
    """
    called = formats_called(path)
    if called and "module" not in called:
        return called[0]
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


def _check_suffix(path: Path, format: Format) -> None:
    """Refuse a name that says the file is of another format."""
    meant = formats_called(path)
    if meant and format not in meant:
        raise ModelFileError(
            f"{path} is called like the format {meant[0]}; a file of the format {format} ends in "
            f"{' or '.join(_SUFFIXES[format])}"
        )


def _write(
    model: nn.Module | ExportedProgram, path: Path, format: Format, inputs: Inputs | None, train: bool
) -> str | None:
    """Write the file and return a warning, or ``None``."""
    if isinstance(model, nn.Module) and format not in ("module", "safetensors"):
        model = copy.deepcopy(model)
        if not train:
            model.eval()
    with torch.random.fork_rng():
        return _WRITERS[format](model, path, inputs)


def _write_module(model: nn.Module | ExportedProgram, path: Path, inputs: Inputs | None) -> None:
    write_model(model, path)


def _write_torchscript(model: nn.Module | ExportedProgram, path: Path, inputs: Inputs | None) -> str | None:
    is_program = isinstance(model, ExportedProgram)
    if isinstance(model, ExportedProgram):
        inputs = model.example_inputs[0] if inputs is None else inputs
        model = copy.deepcopy(model.module())
    note = None
    try:
        scripted: Any = torch.jit.script(model)
    except Exception as problem:
        if inputs is None:
            raise CaptureError(
                f"torch.jit.script does not take the {type(model).__name__}: {_reason(problem)}\n"
                "With example inputs it is traced: example_inputs=(…,), or --example float32[2,3]"
            ) from problem
        trace: Any = torch.jit.trace
        scripted = trace(model, inputs)
        if not is_program:  # a program has no branches any more
            note = (
                f"the {type(model).__name__} was traced, not scripted: its branches and loops are those of the "
                f"example inputs. torch.jit.script: {_reason(problem)}"
            )
    with path.open("wb") as file:
        torch.jit.save(scripted, file)
    return note


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
    # One file: a second file with weights would have the name of the temporary file.
    importlib.import_module("onnx").save(exported.model_proto, os.fspath(path))


def _write_safetensors(model: nn.Module | ExportedProgram, path: Path, inputs: Inputs | None) -> None:
    safetensors: Any = importlib.import_module("safetensors.torch")
    if isinstance(model, nn.Module):
        # Tied tensors are stored once, with the other names in the metadata.
        safetensors.save_model(model, os.fspath(path), metadata=header_of(model))
    else:
        from rewriter.program import tied

        once = {id(tensor): (name, tensor) for name, tensor in reversed(tied(model.state_dict).items())}
        safetensors.save_file({name: tensor.contiguous() for name, tensor in once.values()}, os.fspath(path))


def _as_program(model: nn.Module | ExportedProgram, inputs: Inputs | None, format: str) -> ExportedProgram:
    if isinstance(model, ExportedProgram):
        return model
    if inputs is None:
        raise CaptureError(f"the format {format} needs example inputs: example_inputs=(…,)")
    return torch.export.export(model, inputs)


def _reason(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0] if lines else type(problem).__name__


_WRITERS: dict[str, Callable[[nn.Module | ExportedProgram, Path, Inputs | None], str | None]] = {
    "module": _write_module,
    "torchscript": _write_torchscript,
    "pt2": _write_pt2,
    "onnx": _write_onnx,
    "safetensors": _write_safetensors,
}
