"""Shell completion: names of parametrizations, tensors and rules. A file is read without running its code."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rewriter.cli._inputs import streamed

if TYPE_CHECKING:
    from rewriter.planning import Entry


def catalog_names(incomplete: str) -> list[str]:
    """Return the parametrizations that start with `incomplete`."""
    from rewriter.parametrizations import _registry

    return [name for name in _registry.names() if name.startswith(incomplete)]


def tensor_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the tensors of MODEL that start with `incomplete`."""
    return [name for entry in _entries(ctx) for name in entry.names if name.startswith(incomplete)]


def parts_to_bake(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the rules and the computed tensors of MODEL that start with `incomplete`."""
    computed = [entry for entry in _entries(ctx) if entry.site is not None]
    rules = [entry.site.spec.rule for entry in computed if entry.site is not None]
    names = dict.fromkeys([*rules, *(name for entry in computed for name in entry.names)])
    return [name for name in names if name.startswith(incomplete)]


def _entries(ctx: typer.Context) -> list[Entry]:
    """List the tensors of the command's MODEL; none if it cannot be read, since completion has no place for errors."""
    from rewriter.cli._models import entries_of
    from rewriter.cli._options import ModelOptions
    from rewriter.cli._streaming import entries as entries_of_checkpoint
    from rewriter.serialization import load_model

    # While the value of an option is completed, what stands before it is not parsed.
    path = Path(ctx.params.get("model_file") or next((text for text in ctx.args if not text.startswith("-")), ""))
    with contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
        return entries_of_checkpoint(path, ModelOptions()) if streamed(path, True) else entries_of(load_model(path))
    return []
