"""rows: linear calls with one row of a tensor after the other become one call with all of them.

The inputs of an RNN that is unrolled over time are there from the start, and one matrix multiplies them all.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.compiler import is_compiling

from rewriter.capture import has_hooks, is_torch_leaf
from rewriter.context._fingerprint import PLAIN
from rewriter.passes._effects import is_read_only, may_write
from rewriter.passes._infra import Lowering, Pass, PassError
from rewriter.serialization._functions import graph_function
from rewriter.sites import plain_class

LEAST = 8
"""Fewer rows are not worth holding the results of all of them at one time."""


@graph_function
def linear_of_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: int, after: int, first: int, count: int
) -> Sequence[Tensor]:
    """Return what `torch.nn.functional.linear` gives for each of `count` rows of a tensor, which follow each other.

    Arguments:
        x: of shape ``(..., in)``.
        weight: of shape ``(out, in)``.
        bias: of shape ``(out,)``.
        before: how many dimensions come before the one along which the rows follow each other.
        after: how many the model names that come after it.
        first: the first row's index.
        count: how many rows.
    """
    known = type(x) in PLAIN and type(weight) in PLAIN  # a list of tensors is none, and others have their own rules
    if not known or x.dim() < before + max(after + 1, 2) or x.size(before) < first + count:
        indices = range(first, first + count)
        return [F.linear(x[row_index(before, after, index)], weight, bias) for index in indices]
    rows = x if x.size(before) == count else x.narrow(before, first, count)
    # Each result lies in one piece, as that of a call for one row does.
    return F.linear(rows.movedim(before, 0) if before else rows, weight, bias).contiguous().unbind()


@graph_function
def module_of_rows(x: Tensor, module: nn.Module, before: int, after: int, first: int, count: int) -> Sequence[Tensor]:
    """Return what a linear layer gives for each of `count` rows of a tensor, which follow each other.

    It is called for each of them where it has hooks by now, or another module is in its place.

    Arguments:
        x: of shape ``(..., in)``.
        module: the layer.
        before: how many dimensions come before the one along which the rows follow each other.
        after: how many the model names that come after it.
        first: the first row's index.
        count: how many rows.
    """
    if type(module) is not nn.Linear or is_compiling() or "forward" in module.__dict__ or has_hooks(module):
        return [module(x[row_index(before, after, index)]) for index in range(first, first + count)]
    return linear_of_rows(x, module.weight, module.bias, before, after, first, count)


def row_index(before: int, after: int, index: int) -> Any:
    """Return what a model writes in brackets for one row."""
    whole = slice(None)
    return (*[whole] * before, index, *[whole] * after) if before + after else index


Calls = dict[fx.Node, int]
"""Calls in the graph's order, each with the index of its row."""


def join_rows(lowering: Lowering) -> bool:
    """Join the calls of at least `LEAST` rows that follow each other in one tensor."""
    groups = _groups(lowering)
    if not groups:
        return False
    ranks, written = _writes(lowering)
    for (x, before, after, *_), calls in groups.items():
        first, *_, last = calls
        nothing_written = written[ranks[first]] == written[ranks[last]]
        if nothing_written and all(is_read_only(lowering, call) for call in calls):
            _join(lowering.graph, (x, before, after), calls)
    return True


def _groups(lowering: Lowering) -> dict[Any, Calls]:
    """Return the calls of one layer with rows of one tensor that follow each other: by tensor, layer and the rest."""
    groups: dict[Any, Calls] = {}
    for node in lowering.graph.nodes:
        found = _row_of(node.args[0]) if node.args and _is_linear(lowering, node) else None
        if found is not None:
            *where, index = found
            groups.setdefault((*where, node.target, node.args[1:]), {})[node] = index
    return {key: calls for key, calls in groups.items() if _follow(set(calls.values()))}


def _follow(indices: set[int]) -> bool:
    return len(indices) >= LEAST and max(indices) - min(indices) + 1 == len(indices)


def _writes(lowering: Lowering) -> tuple[dict[fx.Node, int], list[int]]:
    """Return the place of each node, and how many of the nodes up to there may write to a tensor."""
    ranks = {node: rank for rank, node in enumerate(lowering.graph.nodes)}
    return ranks, [*accumulate(may_write(lowering, node) for node in ranks)]


def _is_linear(lowering: Lowering, node: fx.Node) -> bool:
    if node.kwargs:
        return False
    if node.op == "call_function":
        return node.target is F.linear and len(node.args) > 1 and node.args[0] not in node.args[1:]
    if node.op != "call_module" or node.target in lowering.owners or len(node.args) != 1:
        return False
    module = lowering.module(node.target)
    return plain_class(module) is nn.Linear and is_torch_leaf(module) and not has_hooks(module)


def _row_of(value: Any) -> tuple[fx.Node, int, int, int] | None:
    """Return the tensor that a row is taken from, how many dimensions are named before and after its own, its index."""
    if not isinstance(value, fx.Node) or value.op != "call_function" or value.target is not operator.getitem:
        return None
    x, index = value.args
    named = index if isinstance(index, tuple) else (index,)
    chosen = [place for place, one in enumerate(named) if isinstance(one, fx.Node) or one != slice(None)]
    if not isinstance(x, fx.Node) or len(chosen) != 1:
        return None
    (place,) = chosen
    one = named[place]
    return (x, place, len(named) - place - 1, one) if type(one) is int and one >= 0 else None


def _join(graph: fx.Graph, where: tuple[Any, ...], calls: Calls) -> None:
    first, (x, *dimensions), start = next(iter(calls)), where, min(calls.values())
    span = (*dimensions, start, max(calls.values()) - start + 1)
    with graph.inserting_before(first):
        if first.op == "call_module":
            module = graph.create_node("get_attr", str(first.target))
            joined = graph.call_function(module_of_rows, (x, module, *span))
        else:
            weight, bias = (*first.args[1:], None)[:2]
            joined = graph.call_function(linear_of_rows, (x, weight, bias, *span))
    for node, index in calls.items():
        (row, *_) = node.all_input_nodes
        node.op, node.target, node.args = "call_function", operator.getitem, (joined, index - start)
        if not row.users:
            graph.erase_node(row)


def _each_has_its_row(lowering: Lowering) -> None:
    for node in lowering.graph.nodes:
        if node.target in (linear_of_rows, module_of_rows):
            rows = range(node.args[-1])
            if not all(user.target is operator.getitem and user.args[1] in rows for user in node.users):
                raise PassError(f"{node.name}, the results of {len(rows)} rows, is used as something else")


linear_of_rows.casts_under_autocast = True  # type: ignore[attr-defined]
rows_pass = Pass("rows", join_rows, ensures=_each_has_its_row)
