"""Writing a file of each format."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from rewriter._torch import inductor, pytree
from rewriter.bindings._pretrained import is_pretrained
from rewriter.errors import CaptureError
from rewriter.export._job import Job, missing, outputs_of
from rewriter.export._provenance import KEY
from rewriter.serialization._safetensors import header_of
from rewriter.serialization._save import write_model

EXTERNAL_OVER = 1_500_000_000
"""Bytes of weights over which an ONNX file has them in a second file: protobuf ends at 2 GiB."""


def reason(problem: BaseException) -> str:
    """Return the first line of an error's message, with torch.export's suggestion for a size that varies."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    if not lines:
        return type(problem).__name__
    text = lines[0].partition(" For more information")[0]
    if "Suggested fixes:" not in lines:
        return text
    fixes = lines[lines.index("Suggested fixes:") + 1 :]
    found = [line for line in fixes if " = " in line]
    fixed = [line.partition(" = ")[0] for line in found if line.rpartition(" = ")[2].isdecimal()]
    advice = f"Leave {', '.join(fixed)} out of the sizes that vary" if fixed else "As text, limits are time=1:2..512"
    return f"{text} torch.export suggests {'; '.join(found)}. {advice}"


def _write_module(job: Job, path: Path) -> None:
    write_model(job.model, path)


def _write_torchscript(job: Job, path: Path) -> None:
    model = job.module

    def save(scripted: Any) -> None:
        with path.open("wb") as file:
            torch.jit.save(scripted, file, _extra_files={KEY: job.provenance})

    try:
        save(torch.jit.script(model))  # an argument that is None by default fails as late as here
    except Exception as problem:
        if job.call is None:
            raise CaptureError(
                f"torch.jit.script does not take the {type(model).__name__}: {reason(problem)}\n"
                "With example inputs it is traced: example_inputs=(…,), or --example float32[2,3]"
            ) from problem
        save(_traced(job, model))
        if not isinstance(job.model, ExportedProgram):  # a program has no branches any more
            job.note = (
                f"the {type(model).__name__} was traced, not scripted: its branches and loops are those of the "
                f"example inputs. torch.jit.script: {reason(problem)}"
            )


def _traced(job: Job, model: nn.Module) -> Any:
    assert job.call is not None
    args, kwargs = tuple(job.call.args), dict(job.call.kwargs)
    parameters = inspect.signature(model.forward).parameters
    by_keyword = [name for name in kwargs if parameters[name].kind is inspect.Parameter.KEYWORD_ONLY]
    if by_keyword:
        raise CaptureError(
            f"the forward has keyword-only arguments, which TorchScript does not have: {', '.join(by_keyword)}"
        )
    if kwargs and args:
        names = list(parameters)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    given: dict[str, Any] = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
    # A dict of outputs is one whose keys do not change from call to call.
    strict = not any(isinstance(value, Mapping) for value in _parts(outputs_of(model, job.call)))
    trace: Any = torch.jit.trace
    return trace(model, strict=strict, **given)


def _parts(value: Any) -> list[Any]:
    return pytree.tree_leaves(value, is_leaf=lambda one: isinstance(one, Mapping))


def _write_pt2(job: Job, path: Path) -> None:
    # A file and not its path: torch would write the temporary file's name into the archive.
    with path.open("wb") as file:
        torch.export.save(job.program, file, extra_files={KEY: job.provenance})


def _write_aoti(job: Job, path: Path) -> None:
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise CaptureError("an AOTInductor package is compiled: install a C++ compiler, such as g++, or set CXX")
    inductor().aoti_compile_and_package(
        job.program, package_path=os.fspath(path), inductor_configs={"aot_inductor.metadata": {KEY: job.provenance}}
    )


def _write_onnx(job: Job, path: Path) -> None:
    absent = missing("onnx", "onnxscript")
    if absent:
        raise CaptureError(f"the format onnx needs {' and '.join(absent)}: pip install 'reparam[onnx]'")
    program = job.program
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    shapes = job.call.dynamic_shapes if job.call is not None else None
    try:
        exported: Any = torch.onnx.export(program, dynamo=True, verbose=False, dynamic_shapes=shapes)
    except Exception as problem:
        operator = re.search(r"aten(?:\.|::)[\w.]+", f"{problem.__cause__ or ''} {problem}")
        if operator is None:
            raise
        raise CaptureError(f"ONNX has no operator for {operator[0]}") from problem
    exported.model.metadata_props[KEY] = job.provenance
    if _bytes_of(program) <= EXTERNAL_OVER:
        exported.save(os.fspath(path), external_data=False)
        return
    # The file has the name of the second one, with the weights.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{job.name}.partial-") as folder:
        exported.save(os.path.join(folder, job.name), external_data=True)
        for written in Path(folder).iterdir():
            if written.name == job.name:
                written.replace(path)
            else:
                job.beside.append(written.replace(path.with_name(written.name)))


def _bytes_of(program: ExportedProgram) -> int:
    tensors = [*program.state_dict.values(), *program.constants.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))


def _write_safetensors(job: Job, path: Path) -> None:
    safetensors: Any = importlib.import_module("safetensors.torch")
    if isinstance(job.model, nn.Module):
        # Tied tensors are stored once, with the other names in the metadata.
        noted = {**job.metadata, **header_of(job.model), KEY: job.provenance}
        safetensors.save_model(job.model, os.fspath(path), metadata=noted)
    else:
        from rewriter.program import tied

        once = {id(tensor): (name, tensor) for name, tensor in reversed(tied(job.model.state_dict).items())}
        tensors = {name: tensor.contiguous() for name, tensor in once.values()}
        safetensors.save_file(tensors, os.fspath(path), metadata={**job.metadata, "format": "pt", KEY: job.provenance})


def _write_hf(job: Job, path: Path) -> None:
    model: Any = job.model
    if not is_pretrained(type(model)):
        raise CaptureError(
            f"the {type(model).__name__} is no model of transformers with save_pretrained, which writes the folder"
        )
    if job.computed:
        raise CaptureError(f"from_pretrained cannot read a computed tensor ({job.computed}): bake first")
    model.save_pretrained(path)
    (path / "reparam.json").write_text(json.dumps(json.loads(job.provenance), indent=2) + "\n", encoding="utf-8")


WRITERS: dict[str, Callable[[Job, Path], None]] = {
    "module": _write_module,
    "torchscript": _write_torchscript,
    "pt2": _write_pt2,
    "aoti": _write_aoti,
    "onnx": _write_onnx,
    "safetensors": _write_safetensors,
    "hf": _write_hf,
}
