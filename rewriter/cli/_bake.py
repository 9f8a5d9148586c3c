"""``reparam bake``: evaluate the parametrizations of a model and write it plain."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from rewriter.cli._app import app
from rewriter.cli._inputs import read_examples, read_module, stderr, step
from rewriter.cli._options import Allow, Debug, Example, Factory, Force, Json, ModelPath, Output, Trust
from rewriter.cli._outcome import Outcome

Format = Literal["module", "torchscript", "pt2", "onnx", "safetensors"]


@app.command()
def bake(
    model_file: ModelPath,
    output: Output,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="PATTERN", help="A rule's name or a glob of tensor names; repeatable."),
    ] = None,
    format: Annotated[Format, typer.Option("--format", help="What to write.")] = "module",
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
    import rewriter
    from rewriter.export import export_model
    from rewriter.io import check_writable
    from rewriter.planning import survey

    check_writable(output, force)
    examples = read_examples(example)
    module = read_module(model_file, model, allow, trust)
    before = [entry.name for entry in survey(module) if entry.site is not None]
    with step("baking"):
        baked = rewriter.bake(module, only=only or None, keep=keep, inplace=True)
    left = {entry.name for entry in survey(baked) if entry.site is not None}
    names = [name for name in before if name not in left]
    with step(f"writing {output}"):
        export_model(baked, output, format=format, example_inputs=examples, force=force)
    if not before:
        stderr.print(f"{model_file} has no parametrized tensor: it is written as it is")
    tensors = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    stderr.print(f"wrote {output}: {tensors} baked, {len(left)} left parametrized, as {format}")
    return Outcome({"baked": names, "left": sorted(left), "format": format, "output": str(output)})
