"""Writing a model in one of the formats: checked, and whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rewriter._given import check_model
from rewriter.capture import Call, given_call
from rewriter.errors import CaptureError, ModelFileError, RewriterError
from rewriter.export._dynamic import checked_shapes
from rewriter.export._formats import FORMATS, Format, check_name, format_of
from rewriter.export._job import Job, job_for
from rewriter.export._provenance import provenance as provenance_of
from rewriter.export._verify import verify_file
from rewriter.export._writers import WRITERS, reason
from rewriter.serialization._atomic import written_atomically
from rewriter.serialization._save import refuse_distributed

_CAPTURED = ("pt2", "aoti", "onnx")


@dataclass(frozen=True)
class Exported:
    """What `export_model` did.

    Arguments:
        format: of the file.
        difference: the largest difference between the file's outputs and the model's, relative to the largest entry;
            ``None`` if they were not compared.
        unverified: the reason for that.
    """

    format: str
    difference: float | None
    unverified: str = ""

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.format}, not verified: {self.unverified}"
        return f"{self.format}, read back, largest difference {self.difference:.1e}"


def export_model(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    example_inputs: Tensor | Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    train: bool = False,
    verify: bool = True,
    provenance: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> Exported:
    """Write `model` to `path`: the whole file, or nothing.

    The model is written in eval mode, unless `train` is given or the format is ``module``. It does not change: what
    torch runs or traces is a copy.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(export_model(torch.nn.Linear(2, 3), f"{folder}/linear.ts"))
    ...     torch.jit.load(f"{folder}/linear.ts")(torch.ones(1, 2)).shape
    torchscript, not verified: there are no example inputs
    torch.Size([1, 3])

    Arguments:
        format: ``module`` (for `load_model`), ``torchscript``, ``pt2`` (an ExportedProgram), ``aoti`` (a compiled
            AOTInductor package), ``onnx``, ``safetensors`` (the weights alone), or ``hf`` (the folder of a transformers
            model). By default, the format that the suffix of `path` names.
        example_inputs: the arguments of the forward, or its only argument. ``pt2``, ``aoti`` and ``onnx`` need them.
            ``torchscript`` traces a model with them, with a warning, if torch.jit.script does not take it.
        example_kwargs: keyword arguments of the forward.
        dynamic_shapes: the sizes that vary, as torch.export takes them, or as text such as ``"batch=0,time=x.1"``.
        train: export the model in the modes that its modules are in.
        verify: read the file back in a new process, and compare its outputs on the example inputs, and at another size
            where one varies.
        provenance: for the file, from `provenance`; by default, that of `model`.
        metadata: further texts for the header of a ``safetensors`` file.
        force: overwrite what is there.

    Raises:
        CaptureError: the model cannot be brought into that format.
        NumericError: the file does not give the model's outputs.
        ModelFileError: `path` cannot be written, or its name is that of another format.
    """
    check_model(model, "export_model")
    format = format_of(model, path) if format is None else format
    if format not in WRITERS:
        raise ModelFileError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    if isinstance(model, nn.Module):
        refuse_distributed(model)
    if isinstance(model, ExportedProgram) and format == "module":
        raise CaptureError("an ExportedProgram is no module any more; write it with the format pt2")
    check_name(Path(path), format)
    if metadata and format != "safetensors":
        raise RewriterError(f"metadata is for the header of a safetensors file; {format} has none")
    call = _call(model, format, example_inputs, example_kwargs, dynamic_shapes)
    noted = json.dumps(dict(provenance_of(model) if provenance is None else provenance), sort_keys=True)
    whole = format not in ("module", "safetensors", "hf")
    with _replacing(path, format, force) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Once for each text: an LSTM alone gives a dozen.
        warnings.simplefilter("module", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        job = job_for(model, call, noted, Path(path), train=train, whole=whole)
        job.metadata = dict(metadata or {})
        try:
            _write(job, format, temporary)
            difference, why = verify_file(job, format, temporary) if verify else (None, "it was not asked for")
        except BaseException:
            for written in job.beside:
                written.unlink(missing_ok=True)
            raise
    if job.note:
        warnings.warn(f"{path}: {job.note}", stacklevel=2)
    return Exported(format, difference, why)


def _call(
    model: nn.Module | ExportedProgram, format: str, args: Any, kwargs: Mapping[str, Any] | None, shapes: Any
) -> Call | None:
    call = given_call(args, kwargs)
    if call is None:
        if shapes is not None or (format in _CAPTURED and isinstance(model, nn.Module)):
            raise CaptureError(f"the format {format} needs example inputs: example_inputs=(…,)")
        return None
    if shapes is None:
        return call
    if format not in _CAPTURED:
        raise RewriterError(f"dynamic shapes are for the formats {', '.join(_CAPTURED)}; {format} fixes no size")
    return Call(call.args, call.kwargs, checked_shapes(model, shapes, call))


def _write(job: Job, format: str, path: Path) -> None:
    try:
        with torch.random.fork_rng():
            WRITERS[format](job, path)
    except (ModelFileError, OSError):
        raise
    except Exception as problem:
        if isinstance(problem, RewriterError) and not job.computed:
            raise
        advice = f"; the model computes {job.computed}: bake first" if job.computed else ""
        raise CaptureError(
            f"the {type(job.model).__name__} cannot be written as {format}: {reason(problem)}{advice}"
        ) from problem


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str], format: str, force: bool) -> Iterator[Path]:
    """Give the body a temporary file, or for ``hf`` a folder, which replaces `path` at the end."""
    if format != "hf":
        with written_atomically(path, force=force) as temporary:
            yield temporary
        return
    target = Path(path)
    if target.exists() and not (force and (target / "config.json").is_file()):
        raise ModelFileError(f"{path} exists; --force (or force=True) replaces the folder of a transformers model")
    if not target.absolute().parent.is_dir():
        raise ModelFileError(f"{path} cannot be written: the folder {target.parent} does not exist")
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.partial-") as folder:
        made = Path(folder) / target.name
        made.mkdir()
        yield made
        if target.exists():
            target.replace(Path(folder) / "former")
        made.replace(target)
