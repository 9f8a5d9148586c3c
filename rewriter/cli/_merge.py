"""``reparam merge``: add the changes of PEFT adapters to a base checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli._app import command
from rewriter.cli._console import stderr
from rewriter.cli._options import Force, Output, StreamOptions
from rewriter.cli._outcome import Outcome
from rewriter.cli._streaming import written as writing
from rewriter.cli._text import counted


@command(
    "reparam merge BASE ADAPTER -o OUT",
    "reparam merge BASE one two -o OUT --weights 1.0,0.5",
)
def merge(
    base: Annotated[
        Path, typer.Argument(metavar="BASE", readable=False, help="A folder of shards, an index or a safetensors file.")
    ],
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER…", readable=False, help="Folders that PEFT wrote.")
    ],
    output: Output,
    stream: StreamOptions,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,…", help="A factor for each adapter. Default: 1.")
    ] = None,
    force: Force = False,
) -> Outcome:
    """Add the changes of LoRA, rsLoRA and DoRA adapters to BASE, one tensor in memory at a time."""
    from rewriter.streaming import merge_checkpoint

    with writing(output, stream, force) as how:
        done = merge_checkpoint(base, adapters, output, weights=_numbers(weights), **how)
    written = done.written
    count, shards = counted(len(done.names), "tensor"), counted(len(written.shards), "shard")
    stderr.print(f"wrote {output}: {count} merged, {shards}")
    document = {"merged": done.names, "output": str(output), "shards": written.shards, "kept": written.kept}
    return Outcome({**document, "bytes": written.nbytes})


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--weights takes numbers such as 1.0,0.5, not {text!r}") from None
