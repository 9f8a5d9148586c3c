"""Reading what commands work on."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter.cli._console import step
from rewriter.errors import Diagnostic, ModelFileError, RewriterError, SpecError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from rewriter.cli._options import ModelOptions
    from rewriter.language import Spec

_MODEL_SUFFIXES = {".pt", ".pth", ".pt2", ".bin", ".safetensors"}


def read_spec(path: Path, allow_import: Sequence[str] | None) -> Spec:
    """Read the spec file of a command line, ``-`` for stdin.

    Raises:
        SpecError: also if the file cannot be read.
    """
    from rewriter.language import load_spec

    source = _from_stdin() if str(path) == "-" else path
    with step(f"reading {path}"), working_folder_importable(bool(allow_import)):
        return load_spec(source, allow_imports=tuple(allow_import or ()))


def read_model(path: Path, options: ModelOptions) -> nn.Module | ExportedProgram:
    """Read the model file of a command line."""
    if os.path.isdir(path):  # `Path.is_dir` raises for a name that is too long.
        raise ModelFileError(_files_in(path))
    importable = bool(options.model or options.allow or options.trust)
    with step(f"reading {path}"), working_folder_importable(importable):
        from rewriter.cli._script import script_of
        from rewriter.serialization import load_model

        allow = tuple(options.allow or ())
        with script_of(path, options.model, options.allow) as (factory, classes):
            return load_model(path, model=factory, key=options.key, allow=(*allow, *classes), trust=options.trust)


def _files_in(folder: Path) -> str:
    found = sorted(path for path in folder.iterdir() if path.suffix in _MODEL_SUFFIXES)
    if not found:
        return f"{folder} is a directory without a model file"
    names = ", ".join(map(str, found[:5])) + (", …" if len(found) > 5 else "")
    return f"{folder} is a directory; name a model file in it: {names}"


def no_inputs(option: str) -> RewriterError:
    """Return the error for an `option` that needs example inputs."""
    return RewriterError(f"{option} runs the model: give its inputs, such as --example float32[2,3]")


def read_examples(texts: Sequence[str] | None) -> tuple[Any, ...] | None:
    """Make the example inputs of ``--example``."""
    if not texts:
        return None
    from rewriter.export import example_tensor

    return tuple(example_tensor(text) for text in texts)


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


def _from_stdin() -> str:
    problem = ""
    try:
        if sys.stdin is not None:
            # `load_spec` reads a text with a line break as YAML, and any other text as a path.
            return sys.stdin.buffer.read().decode("utf-8") + "\n"
        problem = "it is closed"
    except (OSError, UnicodeDecodeError) as failed:
        problem = str(failed)
    raise SpecError([Diagnostic(f"the spec cannot be read from stdin: {problem}", file="<stdin>")])
