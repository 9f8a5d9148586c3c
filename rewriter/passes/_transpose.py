"""transpose: a weight that many linear calls use is transposed once, ahead of them all; those of a batch, all at once.

`torch.nn.functional.linear` transposes its weight at each call, with a node of the autograd graph each time. Where the
product is only added to something, as in an RNN, the sum is left to the product.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import fx

from rewriter.passes._infra import META, Pass, PassError, Rewriting, evaluations_of, note
from rewriter.passes._pure import nothing_written_between
from rewriter.runtime._linear import factors_of, plus_product, product_plus, times_transposed

LEAST = 8
"""Fewer calls are not worth another node in the graph."""

TRANSPOSED = "transposed"
"""The keyword argument that makes a batch, or an evaluation that is part of one, give transposes."""

_WRITTEN = {times_transposed: F.linear, factors_of: F.linear, plus_product: operator.add, product_plus: operator.add}


def transpose_once(rewriting: Rewriting) -> bool:
    """Transpose the matrices that at least `LEAST` linear calls use, and batches that nothing but linear calls use."""
    changed = _transpose_batches(rewriting)
    for node, is_matrix in _evaluations(rewriting):
        calls = [user for user in node.users if _is_linear(user, node)]
        if not is_matrix or len(calls) < LEAST:
            continue
        with rewriting.graph.inserting_after(node):
            transposed = rewriting.graph.call_method("t", (node,))
        transposed.meta[META] = {"transposed": True}
        for call in calls:
            call.replace_input_with(node, transposed)
            _multiply_by_transpose(rewriting, call)
        changed = True
    return changed


def _transpose_batches(rewriting: Rewriting) -> bool:
    batches: dict[Any, list[tuple[fx.Node, bool]]] = {}
    for node, is_matrix in _evaluations(rewriting):
        if "batch" in node.kwargs:
            batches.setdefault(node.kwargs["batch"], []).append((node, is_matrix))
    changed = False
    for batch, members in batches.items():
        nodes = [node for node, is_matrix in members if is_matrix and node.users and _only_linear(node)]
        if TRANSPOSED in batch.kwargs or len(nodes) < len(members):
            continue
        for node in (batch, *nodes):
            node.kwargs = {**node.kwargs, TRANSPOSED: True}
        for call in [call for node in nodes for call in node.users]:
            _multiply_by_transpose(rewriting, call)
        changed = True
    return changed


def _evaluations(rewriting: Rewriting) -> Iterator[tuple[fx.Node, bool]]:
    """Return the nodes that evaluate a site, each with whether its value is one matrix."""
    for site, nodes in evaluations_of(rewriting).items():
        members = site.record.members
        for node in nodes:
            yield node, len(members) == 1 and len(members[0].shape) == 2


def _multiply_by_transpose(rewriting: Rewriting, call: fx.Node) -> None:
    call.target = times_transposed
    _leave_sum_to(rewriting, call)


def write_linear_calls(rewriting: Rewriting) -> bool:
    """Take every transpose out again."""
    changed = False
    for node in list(rewriting.graph.nodes):
        if not gives_transpose(node):
            continue
        changed = True
        for call in [user for user in node.users if user.op == "call_function"]:  # a batch is used by its members
            for user in call.users if call.target is factors_of else ():
                user.target = as_written(user.target)
            call.target = F.linear
        if is_transpose(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            rewriting.graph.erase_node(node)
        else:
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != TRANSPOSED}
    return changed


def as_written(target: Any) -> Any:
    """Return the function that a model calls where its graph, after this pass, calls `target`."""
    return _WRITTEN.get(target, target)


def is_transpose(node: fx.Node) -> bool:
    """Whether the node is a transpose that this pass made."""
    return bool(note(node).get("transposed"))


def gives_transpose(node: fx.Node) -> bool:
    """Whether the node's value is the transpose of a weight, or of several, and not the weight."""
    return is_transpose(node) or (node.op == "call_module" and TRANSPOSED in node.kwargs)


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


def _only_linear(node: fx.Node) -> bool:
    return all(_is_linear(user, node) for user in node.users)


def _leave_sum_to(rewriting: Rewriting, call: fx.Node) -> None:
    """Add in the same operation that multiplies, where the product is one summand of a sum and nothing else."""
    if len(call.users) != 1:
        return
    (following,) = call.users
    if following.op != "call_function" or following.target is not operator.add:
        return
    summands = [one for one in following.args if one is not call and isinstance(one, fx.Node)]
    # An opened layer without a bias has None for it, which the call that baking writes again does not have.
    bare = len(call.args) == 2 or ("opened" in note(call) and call.args[2:] == (None,))
    if bare and len(summands) == 1 and nothing_written_between(rewriting, call, following):
        call.args = call.args[:2]
        call.target = factors_of
        following.target = plus_product if following.args[1] is call else product_plus


def _only_linear_calls(rewriting: Rewriting) -> None:
    for node in rewriting.graph.nodes:
        member = "batch" in node.kwargs or is_transpose(node)  # the batch itself is used by its members
        calls = node.users if member and gives_transpose(node) else ()
        if not all(user.target in (times_transposed, factors_of) for user in calls):
            raise PassError(f"{node.name}, a transpose for linear calls, is used by another operation")
        sums = node.users if node.target is factors_of else ()
        if not all(user.target in (plus_product, product_plus) for user in sums):
            raise PassError(f"{node.name}, left to a sum to multiply, is used by another operation")


transpose_pass = Pass("transpose", transpose_once, ensures=_only_linear_calls)
