"""Linear layers that a graph calls with one row of a tensor after the other: all rows at once.

An RNN that is unrolled over time multiplies each of its inputs by the same matrix. That is one product, with one
gradient, where a call for each row has as many of both, and adds the gradients up.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.compiler import is_compiling
from torch.nn import functional

from rewriter.io._functions import graph_function
from rewriter.runtime._hooks import has_hooks
from rewriter.runtime._places import META

_KINDS = frozenset({Tensor, nn.Parameter})


@graph_function
def linear_of_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, dim: int, first: int, count: int
) -> Sequence[Tensor]:
    """Return what `torch.nn.functional.linear` gives for each of `count` rows of a tensor.

    Arguments:
        x: of shape ``(..., in)``.
        weight: of shape ``(out, in)``.
        bias: of shape ``(out,)``.
        dim: along which the rows follow each other.
        first: the first one's index.
        count: how many.
    """
    if type(x) not in _KINDS or x.dim() < dim + 2 or x.size(dim) < first + count:  # or it is no tensor at all
        return [functional.linear(_row(x, dim, first + index), weight, bias) for index in range(count)]
    rows = x if x.size(dim) == count else x.narrow(dim, first, count)
    return functional.linear(rows, weight, bias).unbind(dim)


@graph_function
def module_of_rows(x: Tensor, module: nn.Module, dim: int, first: int, count: int) -> Sequence[Tensor]:
    """Return what a linear layer gives for each of `count` rows of a tensor.

    It is called for each of them where it has hooks by now, or another module is in its place.

    Arguments:
        x: of shape ``(..., in)``.
        module: the layer.
        dim: along which the rows follow each other.
        first: the first one's index.
        count: how many.
    """
    if type(module) is not nn.Linear or is_compiling() or "forward" in module.__dict__ or has_hooks(module):
        return [module(_row(x, dim, first + index)) for index in range(count)]
    return linear_of_rows(x, module.weight, module.bias, dim, first, count)


def _row(x: Any, dim: int, index: int) -> Any:
    return x[row_index(dim, index)]


def row_index(dim: int, index: int) -> Any:
    """Return what a model writes in brackets for one row."""
    return (*[slice(None)] * dim, index) if dim else index


ROW = "row"
"""Key of the entry that such a row has in our part of a node's metadata: where the model took it, and what it calls."""


def written_by_rows(graph: fx.Graph) -> bool:
    """Give every row a call of its own again, as the model has it; return whether there were others.

    Arguments:
        graph: changed in place.
    """
    calls = [node for node in graph.nodes if ROW in node.meta.get(META, {})]
    if not calls:
        return False
    by_name = {node.name: node for node in graph.nodes}
    # From behind, since a row may stand ahead of the next one.
    for node in sorted(calls, key=lambda node: node.meta[META][ROW]["rank"], reverse=True):
        place = node.meta[META].pop(ROW)
        if not node.meta[META]:
            del node.meta[META]
        joined: Any = node.args[0]
        row = by_name.get(place["name"])
        if row is None:
            x, dim, first = joined.args[0], joined.args[-3], joined.args[-2]
            with graph.inserting_before(by_name.get(place["before"], node)):
                row = graph.create_node(
                    "call_function", operator.getitem, (x, row_index(dim, first + node.args[1])), name=place["name"]
                )
            row.name = place["name"]
            if place["note"]:
                row.meta[META] = place["note"]
            by_name[row.name] = row
        if joined.target is module_of_rows:
            node.op, node.target, node.args = "call_module", str(joined.args[1].target), (row,)
        else:
            node.target, node.args = functional.linear, (row, *joined.args[1 : place["arguments"]])
        if not joined.users:
            module = joined.args[1]
            graph.erase_node(joined)
            if not module.users and module.op == "get_attr" and META in module.meta:
                graph.erase_node(module)
    return True
