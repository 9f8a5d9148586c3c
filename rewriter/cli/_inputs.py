"""Reading what commands work on, with progress on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rewriter.errors import Diagnostic, SpecError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from rewriter.spec import Spec

stderr = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Show `text` on stderr while the body runs, if anyone watches."""
    with stderr.status(text):
        yield


def read_spec(path: Path, allow_import: Sequence[str] | None) -> Spec:
    """Read the spec file of a command line; its imports run only where they are allowed.

    Raises:
        SpecError: also where the file cannot be read.
    """
    from rewriter.spec import load_spec

    _check_spec_file(path)
    with step(f"reading {path}"), working_folder_importable(bool(allow_import)):
        return load_spec(path, allow_imports=tuple(allow_import or ()))


def read_model(
    path: Path, factory: str | None, allow: Sequence[str] | None, trust: bool
) -> nn.Module | ExportedProgram:
    """Read the model file of a command line."""
    with step(f"reading {path}"), working_folder_importable(bool(factory or allow or trust)):
        from rewriter.io import load_model

        return load_model(path, model=factory, allow=tuple(allow or ()), trust=trust)


def read_examples(texts: Sequence[str] | None) -> tuple[Any, ...] | None:
    """Make the example inputs of ``--example``."""
    if not texts:
        return None
    from rewriter.export import example_tensor

    return tuple(example_tensor(text) for text in texts)


@contextlib.contextmanager
def working_folder_importable(wanted: bool) -> Iterator[None]:
    """Let imports find what lies in the working folder, last: only for names that the user gave."""
    folder = os.getcwd()
    added = wanted and folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        yield
    finally:
        if added:
            sys.path.remove(folder)


def _check_spec_file(path: Path) -> None:
    problem = ""
    if not path.exists():
        problem = "this file does not exist"
    elif path.is_dir():
        problem = "this is a directory, not a spec"
    if problem:
        raise SpecError([Diagnostic(problem, file=str(path))])
