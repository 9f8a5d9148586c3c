"""Reading what commands work on."""

from __future__ import annotations

import contextlib
import glob
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rewriter.errors import Diagnostic, ModelFileError, RewriterError, SpecError

_MODEL_SUFFIXES = {".pt", ".pth", ".pt2", ".bin", ".safetensors"}


def refuse_directory(path: Path) -> None:
    """Refuse a directory as a model file, with the list of the model files in it.

    Raises:
        ModelFileError: it is a directory, and not that of a PEFT adapter.
    """
    if not os.path.isdir(path) or os.path.isfile(
        path / "adapter_config.json"
    ):  # `Path.is_dir` raises for a name that is too long.
        return
    found = [str(file) for file in sorted(path.iterdir()) if file.suffix in _MODEL_SUFFIXES]
    if not found:
        raise ModelFileError(f"{path} is a directory without a model file")
    if streamed(path, True):
        raise ModelFileError(
            f"{path} is a checkpoint: it has weights and no model. The commands inspect, diff, init, plan, explain, "
            "apply, bake and merge read it; for this one, name a file with a model"
        )
    names = ", ".join(found[:5]) + (", …" if len(found) > 5 else "")
    raise ModelFileError(f"{path} is a directory; name a model file in it: {names}")


def streamed(path: Path, files: bool) -> bool:
    """Whether a model is streamed: a folder of shards or an index always, a safetensors file if `files` says so."""
    if path.suffix == ".safetensors" and not os.path.isdir(path):
        return files
    from rewriter.serialization._adapter import is_adapter

    if is_adapter(path):  # `load_model` reads it
        return False
    names = (f"{glob.escape(str(path))}/{pattern}" for pattern in ("*.safetensors*", ".metadata"))
    return path.name.endswith(".safetensors.index.json") or any(map(glob.glob, names))


def no_inputs(option: str) -> RewriterError:
    """Return the error for an `option` that needs example inputs."""
    return RewriterError(f"{option} runs the model: give its inputs, such as --example float32[2,3]")


@contextlib.contextmanager
def working_folder_importable(wanted: bool) -> Iterator[None]:
    """Let imports find the modules of the working folder, after all others."""
    folder = os.getcwd()
    added = wanted and folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        yield
    finally:
        if added:
            sys.path.remove(folder)


def text_from_stdin() -> str:
    """Read a spec from stdin.

    Raises:
        SpecError: stdin cannot be read.
    """
    problem = ""
    try:
        if sys.stdin is not None:
            # `load_spec` reads a text with a line break as YAML, and any other text as a path.
            return sys.stdin.buffer.read().decode("utf-8") + "\n"
        problem = "it is closed"
    except (OSError, UnicodeDecodeError) as failed:
        problem = str(failed)
    raise SpecError([Diagnostic(f"the spec cannot be read from stdin: {problem}", file="<stdin>")])
