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
    from rewriter.passes import print_graph

    text = print_graph(_graph_module(read_model(model_file, model, allow, trust)))
    return Outcome({"model": str(model_file), "graph": text.splitlines()}, text)


def _graph_module(model: nn.Module | ExportedProgram) -> fx.GraphModule:
    from torch import fx, nn

    if not isinstance(model, nn.Module):
        program: fx.GraphModule = model.graph_module
        return program
    if isinstance(model, fx.GraphModule):
        return model
    try:
        traced: fx.GraphModule = fx.symbolic_trace(model)
        return traced
    except Exception as problem:
        reason = str(problem).partition("\n")[0]
        raise CaptureError(f"torch.fx cannot trace the {type(model).__name__}: {reason}") from problem
