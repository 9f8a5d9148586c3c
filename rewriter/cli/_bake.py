"""``reparam bake``: evaluate the chains of a model and write a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rewriter.cli._app import command
from rewriter.cli._complete import parts_to_bake
from rewriter.cli._console import stderr, step
from rewriter.cli._inputs import no_inputs, refuse_directory, streamed
from rewriter.cli._models import entries_of
from rewriter.cli._options import ExampleOptions, Force, ModelFile, ModelOptions, Output, SpecOptions, StreamOptions
from rewriter.cli._outcome import Outcome
from rewriter.cli._streaming import refuse_options, run
from rewriter.cli._text import counted
from rewriter.errors import ModelFileError, RewriterError

Format = Literal["module", "torchscript", "pt2", "aoti", "onnx", "safetensors", "hf"]


@command(
    "reparam bake rewritten.pt -o plain.pt",
    "reparam bake rewritten.pt -o part.pt --only 0.weight",
    "reparam bake rewritten.pt -o scripted.ts",
    "reparam bake rewritten.pt -o plain.pt2 --example float32[2,4] --dynamic batch=0",
    "reparam bake FOLDER --spec spec.yaml -o OUT",
)
def bake(
    model_file: ModelFile,
    output: Output,
    model_options: ModelOptions,
    example: ExampleOptions,
    spec_options: SpecOptions,
    stream: StreamOptions,
    spec: Annotated[
        Path | None,
        typer.Option("--spec", metavar="SPEC", readable=False, help="The spec, for a checkpoint: it has no chains."),
    ] = None,
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
    dynamic: Annotated[
        str | None,
        typer.Option(
            "--dynamic",
            metavar="NAME=[INPUT.]DIM[:LOW..HIGH],…",
            help="Sizes that vary (pt2, aoti, onnx): batch=0 for all inputs, time=tokens.1:2..512 for one, limited.",
        ),
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="Keep train mode. Default: export in eval mode.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run OUT in a new process and compare it with the model.")
    ] = True,
    force: Force = False,
) -> Outcome:
    """Replace each computed tensor of MODEL by its value and write OUT.

    With --spec, MODEL is a checkpoint: weights for the model that --model makes, or a folder of shards, an index or a
    safetensors file, which is streamed.
    """
    if streamed(model_file, spec is not None):
        from rewriter.streaming import bake_checkpoint

        if spec is None:
            raise RewriterError(f"{model_file} is a checkpoint, and its chains are in a spec: --spec SPEC")
        other = format not in (None, "safetensors")
        refuse_options({"--example": example.example, "--only": only, "--keep": keep != "value", "--format": other})
        return run(bake_checkpoint, model_file, output, spec, spec_options, model_options, stream, force)
    stream.refuse()
    from torch import nn

    import rewriter
    from rewriter.export import export_model, format_of, provenance
    from rewriter.serialization import check_writable

    if str(output) == "-":
        raise RewriterError("a model is written to a file, not to stdout: -o OUT")
    examples = example.read()
    if format != "hf":
        check_writable(output, force)
    loaded = model_options.read(model_file) if spec is None else _by_spec(model_file, model_options, spec, spec_options)
    written = format or format_of(loaded, output)
    if written in ("pt2", "aoti", "onnx") and examples is None and isinstance(loaded, nn.Module):
        raise no_inputs(f"--format {written}")
    origin = provenance(loaded)
    before = [entry.name for entry in entries_of(loaded) if entry.site is not None]
    with step("baking"):
        baked = rewriter.bake(loaded, only=only or None, keep=keep, inplace=True)
    left = {entry.name for entry in entries_of(baked) if entry.site is not None}
    names = [name for name in before if name not in left]
    call: dict[str, Any] = {}
    if examples is not None:
        call = {"example_inputs": examples.args, "example_kwargs": examples.kwargs}
    with step(f"writing {output}"):
        exported = export_model(
            baked,
            output,
            format=written,
            **call,
            dynamic_shapes=dynamic,
            train=train,
            verify=verify,
            provenance=origin,
            force=force,
        )
    stderr.print(f"wrote {output}: {counted(len(names), 'tensor')} baked, {len(left)} still computed, as {exported}")
    document = {"baked": names, "left": sorted(left), "format": written, "output": str(output)}
    return Outcome({**document, "difference": exported.difference, "unverified": exported.unverified})


def _by_spec(path: Path, model_options: ModelOptions, spec: Path, spec_options: SpecOptions) -> Any:
    """Read weights into the model that a spec makes."""
    import rewriter

    if model_options.model is None:
        refuse_directory(path)
        if not path.exists():
            raise ModelFileError(f"{path} does not exist")
        raise RewriterError(
            f"--spec is for checkpoints: say whose weights {path} holds (--model package.module:factory). A saved "
            "model has its chains with it, and `reparam apply SPEC` writes one"
        )
    read = spec_options.read(spec)
    return rewriter.rewrite(model_options.read_for(read, path), read, inplace=True)
