"""``reparam draw``: a model's graph as text, chains written out where they are evaluated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewriter.cli._app import app
from rewriter.cli._inputs import read_model
from rewriter.cli._options import Allow, Debug, Factory, Json, ModelPath, Trust
from rewriter.cli._outcome import Outcome
from rewriter.errors import CaptureError

if TYPE_CHECKING:
    from torch import fx, nn
    from torch.export import ExportedProgram


@app.command()
def draw(
    model_file: ModelPath,
    model: Factory = None,
    allow: Allow = None,
    trust: Trust = False,
    json: Json = False,
    debug: Debug = False,
) -> Outcome:
    """Print the graph of MODEL, one line for each operation."""
    from torch import nn

    from rewriter.passes import print_graph

    read = read_model(model_file, model, allow, trust)
    lines = print_graph(_graph_module(read)).splitlines() if isinstance(read, nn.Module) else _program_lines(read)
    return Outcome({"model": str(model_file), "graph": lines}, "\n".join(lines))


def _program_lines(program: ExportedProgram) -> list[str]:
    """Print a program's graph, its tensors under their names and each chain with what it computes."""
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
