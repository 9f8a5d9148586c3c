"""The Typer application; each command registers itself from its own file."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

app = typer.Typer(
    name="reparam",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        print("reparam", metadata.version("reparam"))
    except metadata.PackageNotFoundError:
        print("reparam, from a checkout that is not installed")
    raise typer.Exit


@app.callback()
def reparam(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """A compiler for model weights: put parametrizations in from a spec, bake them out again."""
