"""``reparam bake``: evaluate the chains of a model and write a plain model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rewriter.cli._app import command
from rewriter.cli._complete import parts_to_bake
from rewriter.cli._console import stderr, step
from rewriter.cli._inputs import no_inputs
from rewriter.cli._models import entries_of
from rewriter.cli._options import ExampleOptions, Force, ModelFile, ModelOptions, Output
from rewriter.cli._outcome import Outcome
from rewriter.cli._text import counted
from rewriter.errors import RewriterError

if TYPE_CHECKING:
    pass

Format = Literal["module", "torchscript", "pt2", "onnx", "safetensors"]


@command(
    "reparam bake rewritten.pt -o plain.pt",
    "reparam bake rewritten.pt -o part.pt --only 0.weight",
    "reparam bake rewritten.pt -o scripted.ts",
    "reparam bake rewritten.pt -o plain.pt2 --example float32[2,4]",
)
def bake(
    model_file: ModelFile,
    output: Output,
    model_options: ModelOptions,
    example: ExampleOptions,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="PATTERN",
            help="A rule, a glob of tensor names, or the label of a step; repeatable.",
            autocompletion=parts_to_bake,
        ),
    ] = None,
    format: Annotated[
        Format | None, typer.Option("--format", help="What to write. Default: by the suffix of OUT.")
    ] = None,
    keep: Annotated[
        Literal["value", "original"], typer.Option("--keep", help="The values, or the originals.")
    ] = "value",
    force: Force = False,
) -> Outcome:
    """Replace each computed tensor of MODEL by its value and write OUT."""
    from torch import nn

    import rewriter
    from rewriter.export import export_model, format_of
    from rewriter.serialization import check_writable

    if str(output) == "-":
        raise RewriterError("a model is written to a file, not to stdout: -o OUT")
    check_writable(output, force)
    examples = example.read()
    loaded = model_options.read(model_file)
    written = format or format_of(loaded, output)
    if written in ("pt2", "onnx") and examples is None and isinstance(loaded, nn.Module):
        raise no_inputs(f"--format {written}")
    before = [entry.name for entry in entries_of(loaded) if entry.site is not None]
    with step("baking"):
        baked = rewriter.bake(loaded, only=only or None, keep=keep, inplace=True)
    left = {entry.name for entry in entries_of(baked) if entry.site is not None}
    names = [name for name in before if name not in left]
    with step(f"writing {output}"):
        export_model(baked, output, format=written, example_inputs=examples, force=force)
    stderr.print(f"wrote {output}: {counted(len(names), 'tensor')} baked, {len(left)} still computed, as {written}")
    return Outcome({"baked": names, "left": sorted(left), "format": written, "output": str(output)})
