"""Reading a file back in a new process, and comparing its outputs with the model's."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rewriter._torch import pytree
from rewriter.capture import Call
from rewriter.capture._examples import _TOLERANCE
from rewriter.errors import NumericError
from rewriter.export import _read_back
from rewriter.export._dynamic import at_another_size
from rewriter.export._job import Job, copied_call, missing, outputs_of
from rewriter.export._read_back import plain


def verify_file(job: Job, format: str, path: Path) -> tuple[float | None, str]:
    """Return the largest difference between the file's outputs and the model's, or ``None`` and the reason.

    The difference is relative to the largest entry of the output.

    Raises:
        NumericError: it is above the tolerance of the outputs' dtype, or the file cannot be run.
    """
    if format == "safetensors":
        return _compare_weights(job, path), ""
    why = _why_not(job, format)
    if why:
        return None, why
    assert job.call is not None
    module = copy.deepcopy(job.model).eval() if isinstance(job.model, nn.Module) else job.module
    calls = [job.call]
    if format in ("pt2", "aoti", "onnx"):
        other = at_another_size(job.program, job.call)
        calls += [other] if other is not None else []
    wanted = [_tensors(outputs_of(module, call)) for call in calls]
    if any(_distance(one, two) for one, two in zip(wanted[0], _tensors(outputs_of(module, job.call, 1)), strict=True)):
        return None, "the model draws random numbers"
    found = _outputs_in_new_process(format, path, calls)
    return max(_largest(*both, job.name) for both in zip(found, wanted, strict=True)), ""


def _why_not(job: Job, format: str) -> str:
    if job.call is None:
        return "there are no example inputs"
    if job.train:
        return "it is exported in train mode"
    if format == "onnx" and missing("onnxruntime"):
        return "onnxruntime is not installed"
    if format == "onnx" and any(tensor.dtype == torch.bfloat16 for tensor in _tensors(copied_call(job.call))):
        return "onnxruntime takes no inputs in bfloat16 from Python"
    if format in ("module", "hf") and isinstance(job.model, nn.Module):
        for module in job.model.modules():
            home = type(module).__module__
            if home == "__main__" or (PathFinder.find_spec(home.partition(".")[0]) is None):
                return f"a new process cannot import {home}.{type(module).__name__}"
    return ""


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in pytree.tree_leaves(plain(outputs)) if isinstance(leaf, Tensor)]


def _outputs_in_new_process(format: str, path: Path, calls: Sequence[Call]) -> list[list[Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        given, outputs = os.path.join(folder, "calls.pt"), os.path.join(folder, "outputs.pt")
        torch.save([copied_call(call) for call in calls], given)
        # -P: the folder of the script is no place for imports.
        command = [sys.executable, "-P", _read_back.__file__, format, os.fspath(path), given, outputs]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode:
            lines = [line for line in ran.stderr.splitlines() if line.strip()]
            raise NumericError(
                f"{path.name}, written as {format}, cannot be read back: {(lines or ['no message'])[-1]}"
            )
        found: list[list[Tensor]] = torch.load(outputs, weights_only=True)
        return found


def _largest(found: list[Tensor], wanted: list[Tensor], name: str) -> float:
    if len(found) != len(wanted):
        raise NumericError(f"{name} gives {len(found)} outputs and the model {len(wanted)}; the file is not kept")
    largest = 0.0
    for one, other in zip(found, wanted, strict=True):
        difference = _distance(one, other)
        largest = max(largest, difference)
        if not difference <= _TOLERANCE.get(other.dtype, 0.0):
            raise NumericError(
                f"{name} is not the model: on the example inputs, or at another size, an output differs by "
                f"{difference:.1e} of its largest entry; the file is not kept"
            )
    return largest


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference relative to the largest entry of `other`; infinite for another form."""
    one, other = one.cpu(), other.cpu()
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    differ = ~torch.isclose(one, other, rtol=0, atol=0, equal_nan=True)
    if not differ.any():
        return 0.0
    if not (one.is_floating_point() or one.is_complex()):
        return float("inf")
    scale = other.abs()[other.isfinite()].double().max().item() if other.isfinite().any() else 0.0
    far = (one.to(torch.complex128) - other.to(torch.complex128)).abs()[differ].max().item()
    return far / (scale or 1.0) if far == far else float("inf")


def _compare_weights(job: Job, path: Path) -> float:
    from safetensors.torch import load_file

    model = job.model
    state = model.state_dict if isinstance(model, ExportedProgram) else model.state_dict()
    for name, tensor in load_file(path).items():
        if _distance(tensor, state[name]) != 0:
            raise NumericError(f"{name} in {job.name} is not the model's tensor; the file is not kept")
    return 0.0
