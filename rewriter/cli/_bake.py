"""``reparam bake``: evaluate the parametrizations of a model and write it plain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rewriter.cli._app import app
from rewriter.cli._inputs import no_inputs, read_examples, read_model, stderr, step
from rewriter.cli._models import entries_of
from rewriter.cli._options import Allow, Debug, Example, Factory, Force, Json, ModelPath, Output, Trust
from rewriter.cli._outcome import Outcome
from rewriter.errors import RewriterError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

Format = Literal["module", "torchscript", "pt2", "onnx", "safetensors"]


@app.command()
def bake(
    model_file: ModelPath,
    output: Output,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", metavar="PATTERN", help="A rule, a glob of tensor names, or the label of a step; repeatable."
        ),
    ] = None,
    format: Annotated[
        Format | None, typer.Option("--format", help="What to write; if not given, what OUT is called.")
    ] = None,
    keep: Annotated[
        Literal["value", "original"], typer.Option("--keep", help="The values, or the stored tensors.")
    ] = "value",
    example: Example = None,
    model: Factory = None,
    allow: Allow = None,
    trust: Trust = False,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> Outcome:
    """Turn the parametrized tensors of MODEL into plain ones and write OUT."""
    from torch import nn

    import rewriter
    from rewriter.export import export_model
    from rewriter.serialization import check_writable

    if str(output) == "-":
        raise RewriterError("a model is written to a file, not to stdout: -o OUT")
    check_writable(output, force)
    examples = read_examples(example)
    loaded = read_model(model_file, model, allow, trust)
    written = format or _format_of(loaded, output)
    if written in ("pt2", "onnx") and examples is None and isinstance(loaded, nn.Module):
        raise no_inputs(f"--format {written}")
    before = [entry.name for entry in entries_of(loaded) if entry.site is not None]
    with step("baking"):
        baked = rewriter.bake(loaded, only=only or None, keep=keep, inplace=True)
    left = {entry.name for entry in entries_of(baked) if entry.site is not None}
    names = [name for name in before if name not in left]
    with step(f"writing {output}"):
        export_model(baked, output, format=written, example_inputs=examples, force=force)
    if not before:
        stderr.print(f"{model_file} has no parametrized tensor: it is written as it is")
    tensors = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    stderr.print(f"wrote {output}: {tensors} baked, {len(left)} left parametrized, as {written}")
    return Outcome({"baked": names, "left": sorted(left), "format": written, "output": str(output)})


def _format_of(model: nn.Module | ExportedProgram, output: Path) -> Format:
    from torch import nn

    from rewriter.export import formats_called
    from rewriter.serialization import check_suffix

    called: list[Format] = formats_called(output)
    if called and "module" not in called:
        return called[0]
    if isinstance(model, nn.Module):
        return "module"
    check_suffix(model, output)
    return "pt2"
