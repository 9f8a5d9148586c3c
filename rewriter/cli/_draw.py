"""``reparam draw``: the graph of a model as text, with each chain at its evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewriter.cli._app import command
from rewriter.cli._options import ModelFile, ModelOptions
from rewriter.cli._outcome import Outcome
from rewriter.errors import CaptureError

if TYPE_CHECKING:
    from torch import fx, nn
    from torch.export import ExportedProgram


@command("reparam draw rewritten.pt")
def draw(
    model_file: ModelFile,
    model_options: ModelOptions,
) -> Outcome:
    """Print the graph of MODEL, one line per operation."""
    from torch import nn

    from rewriter.passes import print_graph

    read = model_options.read(model_file)
    lines = print_graph(_graph_module(read)).splitlines() if isinstance(read, nn.Module) else _program_lines(read)
    return Outcome({"model": str(model_file), "graph": lines}, "\n".join(lines))


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

    if isinstance(model, fx.GraphModule):
        return model
    try:
        traced: fx.GraphModule = fx.symbolic_trace(model)
        return traced
    except Exception as problem:
        reason = str(problem).partition("\n")[0]
        raise CaptureError(f"torch.fx cannot trace the {type(model).__name__}: {reason}") from problem
