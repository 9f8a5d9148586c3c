"""transpose: a weight that many linear calls use is transposed once, ahead of them all.

`torch.nn.functional.linear` transposes its weight at each call, with a node of the autograd graph each time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import fx

from rewriter.passes._infra import META, Pass, PassError, Rewriting, evaluations_of, note
from rewriter.runtime._linear import times_transposed

LEAST = 8
"""Fewer calls are not worth another node in the graph."""


def transpose_once(rewriting: Rewriting) -> bool:
    """Transpose the matrices that at least `LEAST` linear calls use."""
    changed = False
    for site, nodes in evaluations_of(rewriting).items():
        for node in nodes if len(site.record.members[0].shape) == 2 else ():
            calls = [user for user in node.users if _is_linear(user, node)]
            if len(site.record.members) > 1 or len(calls) < LEAST:
                continue
            with rewriting.graph.inserting_after(node):
                transposed = rewriting.graph.call_method("t", (node,))
            transposed.meta[META] = {"transposed": True}
            for call in calls:
                call.target = times_transposed
                call.replace_input_with(node, transposed)
            changed = True
    return changed


def write_linear_calls(rewriting: Rewriting) -> bool:
    """Take every transpose out again."""
    found = [node for node in rewriting.graph.nodes if is_transpose(node)]
    for transposed in found:
        (value,) = transposed.all_input_nodes
        for call in list(transposed.users):
            call.target = F.linear
            call.replace_input_with(transposed, value)
        rewriting.graph.erase_node(transposed)
    return bool(found)


def is_transpose(node: fx.Node) -> bool:
    """Whether the node is a transpose that this pass made."""
    return bool(note(node).get("transposed"))


def uses_of(value: fx.Node) -> Iterator[fx.Node]:
    """Return the nodes that use a value, through a transpose that this pass made if need be."""
    for user in value.users:
        if is_transpose(user):
            yield from user.users
        else:
            yield user


def _is_linear(node: fx.Node, weight: fx.Node) -> bool:
    if node.op != "call_function" or node.target is not F.linear or node.kwargs or len(node.args) < 2:
        return False
    return node.args[1] is weight and weight not in (node.args[0], *node.args[2:])


def _only_linear_calls(rewriting: Rewriting) -> None:
    for node in rewriting.graph.nodes:
        if is_transpose(node) and not all(user.target is times_transposed for user in node.users):
            raise PassError(f"{node.name}, a transpose for linear calls, is used by another operation")


transpose_pass = Pass("transpose", transpose_once, ensures=_only_linear_calls)
