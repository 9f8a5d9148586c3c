"""The Typer application; each command registers itself from its own file."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="reparam",
    help="A compiler for model weights: put parametrizations in from a spec, bake them out again.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
