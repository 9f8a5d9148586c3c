"""``reparam apply`` and ``reparam plan``: put a spec into a model, or say what that would do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewriter.cli._app import app
from rewriter.cli._inputs import no_inputs, read_examples, read_model, read_spec, stderr, step
from rewriter.cli._options import (
    Allow,
    AllowImport,
    Capture,
    Debug,
    Example,
    Factory,
    Force,
    Json,
    ModelPath,
    OptionalOutput,
    SpecFile,
    Trust,
    Way,
)
from rewriter.cli._outcome import Outcome
from rewriter.errors import RewriterError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


@app.command()
def apply(
    spec: SpecFile,
    model_file: ModelPath,
    output: OptionalOutput = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    capture: Capture = "auto",
    example: Example = None,
    model: Factory = None,
    allow: Allow = None,
    trust: Trust = False,
    allow_import: AllowImport = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> Outcome:
    """Put the parametrizations of SPEC into MODEL, check the values, and write OUT."""
    if dry_run:
        return _plan(spec, model_file, capture, example, model, allow, trust, allow_import)
    if output is None:
        raise typer.BadParameter("say where to write the model: -o OUT (or --dry-run)")
    import rewriter
    from rewriter.cli._verify import verify_rewritten
    from rewriter.serialization import check_suffix, check_writable, save_model

    if str(output) == "-":
        raise RewriterError("a model is written to a file, not to stdout: -o OUT")
    check_writable(output, force)
    if output.exists() and spec.exists() and output.samefile(spec):
        raise RewriterError(f"{output} is the spec itself; choose another name for the model")
    examples = read_examples(example)
    read = read_spec(spec, allow_import)
    loaded = read_model(model_file, model, allow, trust)
    check_suffix(loaded, output)
    call = _inputs_for_capture(loaded, capture, examples)
    with step("planning"):
        planned = rewriter.plan(loaded, read, capture=capture, example_inputs=call)
    stderr.print(str(planned))
    with step("rewriting"):
        rewritten: Any = rewriter.rewrite(loaded, planned)
    with step("checking"):
        checks = verify_rewritten(loaded, rewritten, planned, examples)
    with step(f"writing {output}"):
        save_model(rewritten, output, force=force)
    stderr.print(f"wrote {output}: {checks}")
    return Outcome({**planned.to_dict(), "output": str(output), "checks": checks.to_dict()})


@app.command()
def plan(
    spec: SpecFile,
    model_file: ModelPath,
    capture: Capture = "auto",
    example: Example = None,
    model: Factory = None,
    allow: Allow = None,
    trust: Trust = False,
    allow_import: AllowImport = None,
    json: Json = False,
    debug: Debug = False,
) -> Outcome:
    """Say which rule of SPEC owns which tensors of MODEL, and how far each would move."""
    return _plan(spec, model_file, capture, example, model, allow, trust, allow_import)


def _plan(
    spec: Path,
    model_file: Path,
    capture: Way,
    example: Sequence[str] | None,
    factory: str | None,
    allow: Sequence[str] | None,
    trust: bool,
    allow_import: Sequence[str] | None,
) -> Outcome:
    import rewriter

    examples = read_examples(example)
    read = read_spec(spec, allow_import)
    loaded = read_model(model_file, factory, allow, trust)
    call = _inputs_for_capture(loaded, capture, examples)
    with step("planning"):
        planned = rewriter.plan(loaded, read, capture=capture, example_inputs=call)
    return Outcome(planned.to_dict(), str(planned))


def _inputs_for_capture(
    model: nn.Module | ExportedProgram, capture: Way, examples: tuple[Any, ...] | None
) -> tuple[Any, ...] | None:
    """Return the example inputs, where they are for capturing the model: a program is captured already."""
    from torch import nn

    if not isinstance(model, nn.Module):
        return None
    if capture == "export" and examples is None:
        raise no_inputs("--capture export")
    return examples
