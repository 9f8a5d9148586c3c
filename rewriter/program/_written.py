"""Tensors that a program writes to."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.export.graph_signature import ExportGraphSignature

from rewriter.planning._refusals import writer


def is_written(program: Any, name: str, node: fx.Node) -> bool:
    """Whether the program writes to a tensor, such as the statistics of a batch norm in train mode."""
    written = {spec.target for spec in signature_of(program).output_specs if spec.target is not None}
    return (
        name in written
        or writer(node) is not None
        or any(_trains(user, node) or _writes_inside(user, node) for user in node.users)
    )


def _trains(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` is a batch norm that writes its statistics, which its schema does not say."""
    schema = getattr(user.target, "_schema", None)
    arguments = {} if schema is None else dict(zip((a.name for a in schema.arguments), user.args, strict=False))
    trains = arguments.get("training") is True or arguments.get("use_input_stats") is True
    statistics = [arguments.get("running_mean"), arguments.get("running_var")] if trains else []
    return any(value is node for value in statistics)


def _writes_inside(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` runs a graph that writes to `node`, such as a region under torch.no_grad."""
    reads = [value for value in user.args if isinstance(value, fx.Node)]
    graphs = [read for read in reads if read.op == "get_attr"]
    inner = getattr(user.graph.owning_module, str(graphs[0].target), None) if graphs else None
    if not isinstance(inner, fx.GraphModule):
        return False
    operands = reads[reads.index(graphs[0]) + 1 :]
    taken = zip(inner.graph.find_nodes(op="placeholder"), operands, strict=False)
    return any(
        operand is node and (writer(own) is not None or any(_writes_inside(reader, own) for reader in own.users))
        for own, operand in taken
    )


def signature_of(program: Any) -> ExportGraphSignature:
    """Return the signature of an ExportedProgram, or of one that is being edited."""
    signature: ExportGraphSignature = getattr(program, "graph_signature", None) or program.signature
    return signature
