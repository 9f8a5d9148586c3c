"""``reparam apply`` and ``reparam plan``: put a spec into a model, or show what that would do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewriter.cli._app import command
from rewriter.cli._console import stderr, step
from rewriter.cli._inputs import no_inputs, streamed
from rewriter.cli._options import (
    OUTPUT,
    Capture,
    ExampleOptions,
    Force,
    ModelFile,
    ModelOptions,
    SpecFile,
    SpecOptions,
    StreamOptions,
    Way,
)
from rewriter.cli._outcome import Outcome
from rewriter.cli._streaming import plan as plan_stream
from rewriter.cli._streaming import refuse_options, run
from rewriter.errors import RewriterError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from rewriter.capture import Call


@command(
    "reparam apply spec.yaml model.pt -o rewritten.pt",
    "reparam apply spec.yaml model.pt -o rewritten.pt --example float32[2,4]",
)
def apply(
    spec: SpecFile,
    model_file: ModelFile,
    spec_options: SpecOptions,
    model_options: ModelOptions,
    example: ExampleOptions,
    stream: StreamOptions,
    output: Annotated[Path | None, OUTPUT] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    capture: Capture = "auto",
    force: Force = False,
) -> Outcome:
    """Put the parametrizations of SPEC into MODEL, check the values, and write OUT.

    A checkpoint is streamed, and its values are not checked: a folder of shards, an index, or a safetensors file
    with an OUT that ends in .safetensors.
    """
    if dry_run:
        return plan(spec, model_file, spec_options, model_options, example, capture)
    if output is None:
        raise typer.BadParameter("say where to write the model: -o OUT (or --dry-run)")
    if streamed(model_file, output.suffix == ".safetensors"):
        from rewriter.streaming import apply_checkpoint

        refuse_options({"--example": example.example, "--capture": capture != "auto"})
        return run(apply_checkpoint, model_file, output, spec, spec_options, model_options, stream, force)
    stream.refuse()
    import rewriter
    from rewriter.cli._verify import verify_rewritten
    from rewriter.export import format_of
    from rewriter.serialization import check_suffix, check_writable, save_model

    if str(output) == "-":
        raise RewriterError("a model is written to a file, not to stdout: -o OUT")
    examples = example.read()
    read = spec_options.read(spec)
    if os.path.exists(output) and spec.exists() and output.samefile(spec):
        raise RewriterError(f"{output} is the spec itself; choose another name for the model")
    check_writable(output, force)
    loaded = model_options.read_for(read, model_file, capture)
    check_suffix(loaded, output)
    format_of(loaded, output)  # refuses a suffix that no format has
    call = _inputs_for_capture(loaded, capture, examples)
    with step("planning"):
        planned = rewriter.plan(loaded, read, capture=capture, **call)
    stderr.print(str(planned))
    with step("rewriting"):
        rewritten: Any = rewriter.rewrite(loaded, planned)
    with step("checking"):
        checks = verify_rewritten(loaded, rewritten, planned, examples)
    with step(f"writing {output}"):
        save_model(rewritten, output, force=force)
    stderr.print(f"wrote {output}: {checks}")
    return Outcome({**planned.to_dict(), "output": str(output), "checks": checks.to_dict()})


@command("reparam plan spec.yaml model.pt", "reparam plan spec.yaml model.pt --json")
def plan(
    spec: SpecFile,
    model_file: ModelFile,
    spec_options: SpecOptions,
    model_options: ModelOptions,
    example: ExampleOptions,
    capture: Capture = "auto",
) -> Outcome:
    """Show which rule of SPEC owns which tensors of MODEL, and how far each would move."""
    if streamed(model_file, model_options.model is None):
        refuse_options({"--example": example.example, "--capture": capture != "auto"})
        return plan_stream(model_file, spec, spec_options, model_options)
    import rewriter

    examples = example.read()
    read = spec_options.read(spec)
    loaded = model_options.read_for(read, model_file, capture)
    call = _inputs_for_capture(loaded, capture, examples)
    with step("planning"):
        planned = rewriter.plan(loaded, read, capture=capture, **call)
    return Outcome(planned.to_dict(), str(planned))


def _inputs_for_capture(model: nn.Module | ExportedProgram, capture: Way, examples: Call | None) -> dict[str, Any]:
    """Return the example inputs for capturing the model, as arguments; a program is captured already."""
    from torch import nn

    if not isinstance(model, nn.Module):
        return {}
    if capture == "export" and examples is None:
        raise no_inputs("--capture export")
    return {} if examples is None else {"example_inputs": examples.args, "example_kwargs": dict(examples.kwargs)}
