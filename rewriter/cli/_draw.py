"""``reparam draw``: the graph of a model as text or SVG, with each chain at its evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from rewriter.cli._app import command
from rewriter.cli._console import stderr, step
from rewriter.cli._models import entries_of
from rewriter.cli._options import Force, ModelFile, ModelOptions, OptionalOutput
from rewriter.cli._outcome import Outcome
from rewriter.cli._text import counted
from rewriter.errors import CaptureError, RewriterError, printable

if TYPE_CHECKING:
    from pathlib import Path

    from torch import fx, nn
    from torch.export import ExportedProgram

    from rewriter.planning import Entry
    from rewriter.sites import Site


@command("reparam draw rewritten.pt", "reparam draw rewritten.pt --full", "reparam draw rewritten.pt -o graph.svg")
def draw(
    model_file: ModelFile,
    model_options: ModelOptions,
    output: OptionalOutput = None,
    full: Annotated[bool, typer.Option("--full", help="Show repeated blocks each time. Default: once.")] = False,
    force: Force = False,
) -> Outcome:
    """Print the graph of MODEL, one line per operation, or draw it into an SVG file.

    For a model with module capture: each chain, and the modules that read its value.
    """
    from rewriter.cli._fold import folded
    from rewriter.cli._svg import svg_of
    from rewriter.serialization import check_writable, written_atomically

    if output is None:
        lines = _lines(model_file, model_options)
        return Outcome({"model": str(model_file), "graph": lines}, "\n".join(lines if full else folded(lines)))
    if output.suffix != ".svg":
        raise RewriterError(f"{output}: a graph is drawn as SVG; name the file .svg")
    check_writable(output, force)
    lines = _lines(model_file, model_options)
    with written_atomically(output, force=force) as temporary:
        temporary.write_text(svg_of([printable(line) for line in (lines if full else folded(lines))]), encoding="utf-8")
    stderr.print(f"wrote {output}: {counted(len(lines), 'line')}")
    return Outcome({"model": str(model_file), "graph": lines, "output": str(output)})


def _lines(path: Path, options: ModelOptions) -> list[str]:
    model = options.read(path)
    with step("tracing"):
        return graph_lines(model)


def graph_lines(model: nn.Module | ExportedProgram) -> list[str]:
    """Return the graph of a model, one line for each operation.

    Raises:
        CaptureError: torch.fx cannot trace the model, and no tensor of it is computed.
    """
    from torch import fx, nn

    from rewriter.passes import print_graph

    if not isinstance(model, nn.Module):
        return _program_lines(model)
    if not isinstance(model, fx.GraphModule):
        entries = [entry for entry in entries_of(model) if entry.site is not None]
        if entries:
            return _module_lines(model, entries)
    return print_graph(_graph_module(model)).splitlines()


def _module_lines(model: nn.Module, entries: Sequence[Entry]) -> list[str]:
    """Return the chains of a model with module capture, and the modules that read their values."""
    from rewriter.sites import plain_class

    numbers: dict[Site, str] = {}
    lines: list[str] = []
    readers: dict[str, list[str]] = {}
    for entry in entries:
        site = entry.site
        assert site is not None
        if site not in numbers:
            numbers[site] = f"%{len(numbers) + 1}"
            names = " & ".join(" = ".join(member.names) for member in site.spec.members)
            start = ", ".join([*site.original_names, *site.spec.reads])
            lines.append(f"{numbers[site]} = evaluate {names}: {start} >> {' >> '.join(site.spec.chain)}")
        for name in entry.names:
            path, _, tensor = name.rpartition(".")
            readers.setdefault(path, []).append(f"{tensor}={numbers[site]}")
    for path, module in model.named_modules(remove_duplicate=False):
        if path in readers:
            lines.append(f"{path or 'the model'}: {plain_class(module).__name__}({', '.join(readers[path])})")
    return lines


def _program_lines(program: ExportedProgram) -> list[str]:
    """Print the graph of a program, with the names of its tensors and the chain of each value."""
    from rewriter.passes import print_graph
    from rewriter.program import sites_of_program

    names = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    computed = {
        member.value: f"{' = '.join(slot.target for slot in member.slots)}: {' >> '.join(site.chain)}"
        for site in sites_of_program(program)
        for member in site.members
    }
    lines = []
    for node, line in zip(program.graph.nodes, print_graph(program.graph_module).splitlines(), strict=True):
        if node.op == "placeholder" and node.name in names:
            line = f"{line.partition(' = ')[0]} = {names[node.name]}"
        lines.append(f"{line}   # {computed[node.name]}" if node.name in computed else line)
    return lines


def _graph_module(model: nn.Module) -> fx.GraphModule:
    from torch import fx

    from rewriter.capture._reason import reason

    if isinstance(model, fx.GraphModule):
        return model
    try:
        traced: fx.GraphModule = fx.symbolic_trace(model)
        return traced
    except Exception as problem:
        why = reason(problem) or "its forward depends on data"
        raise CaptureError(
            f"torch.fx cannot trace the {type(model).__name__}: {why}. reparam inspect lists its tensors; "
            "after apply, draw shows its chains"
        ) from problem
