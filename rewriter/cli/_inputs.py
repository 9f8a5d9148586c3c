"""Reading what commands work on, with progress on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rewriter.errors import Diagnostic, RewriterError, SpecError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from rewriter.language import Spec

stderr = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Show `text` on stderr while the body runs, if anyone watches."""
    with stderr.status(text):
        yield


def read_spec(path: Path, allow_import: Sequence[str] | None) -> Spec:
    """Read the spec file of a command line, ``-`` for stdin; its imports run only where they are allowed.

    Raises:
        SpecError: also where the file cannot be read.
    """
    from rewriter.language import load_spec

    source = _from_stdin() if str(path) == "-" else path
    with step(f"reading {path}"), working_folder_importable(bool(allow_import)):
        return load_spec(source, allow_imports=tuple(allow_import or ()))


def read_model(
    path: Path, factory: str | None, allow: Sequence[str] | None, trust: bool
) -> nn.Module | ExportedProgram:
    """Read the model file of a command line."""
    with step(f"reading {path}"), working_folder_importable(bool(factory or allow or trust)):
        from rewriter.serialization import load_model

        return load_model(path, model=factory, allow=tuple(allow or ()), trust=trust)


def no_inputs(option: str) -> RewriterError:
    """Return what to raise where `option` needs example inputs and there are none."""
    return RewriterError(f"{option} runs the model: give its inputs, such as --example float32[2,3]")


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


def _from_stdin() -> str:
    problem = ""
    try:
        if sys.stdin is not None:
            # The line break makes it text whatever it says, and not the name of a file.
            return sys.stdin.buffer.read().decode("utf-8") + "\n"
        problem = "it is closed"
    except (OSError, UnicodeDecodeError) as failed:
        problem = str(failed)
    raise SpecError([Diagnostic(f"the spec cannot be read from stdin: {problem}", file="<stdin>")])
