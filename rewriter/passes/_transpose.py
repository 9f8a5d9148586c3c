"""transpose: a weight that many linear calls use is transposed once, ahead of them.

`torch.nn.functional.linear` transposes its weight at each call, with a node of the autograd graph each time. Where the
product is only added to something, as in an RNN, the sum is left to the product.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch.nn.functional as F
from torch import fx

from rewriter.passes._effects import nothing_written_between
from rewriter.passes._infra import Lowering, Pass, PassError, evaluations_of
from rewriter.runtime._linear import factors_of, plus_product, product_plus, times_transposed

LEAST = 8
"""Fewer calls are not worth another node in the graph."""


def transpose_once(lowering: Lowering) -> None:
    """Transpose the matrices that at least `LEAST` linear calls use."""
    for site, nodes in evaluations_of(lowering).items():
        members = site.record.members
        for node in nodes if len(members) == 1 and len(members[0].shape) == 2 else ():
            calls = [user for user in node.users if _is_linear(user, node)]
            if len(calls) >= LEAST:
                _transpose(lowering, node, calls)


def _transpose(lowering: Lowering, node: fx.Node, calls: Sequence[fx.Node]) -> None:
    with lowering.graph.inserting_after(node):
        transposed = lowering.graph.call_method("t", (node,))
    for call in calls:
        call.replace_input_with(node, transposed)
        call.target = times_transposed
        _leave_sum_to(lowering, call)


def _is_linear(node: fx.Node, weight: fx.Node) -> bool:
    if node.op != "call_function" or node.target is not F.linear or node.kwargs or len(node.args) < 2:
        return False
    return node.args[1] is weight and weight not in (node.args[0], *node.args[2:])


def _leave_sum_to(lowering: Lowering, call: fx.Node) -> None:
    """Add in the same operation that multiplies, where the product is one summand of a sum and nothing else."""
    if len(call.users) != 1:
        return
    (following,) = call.users
    if following.op != "call_function" or following.target is not operator.add:
        return
    summands = [one for one in following.args if one is not call and isinstance(one, fx.Node)]
    if call.args[2:] in ((), (None,)) and len(summands) == 1 and nothing_written_between(lowering, call, following):
        call.args = call.args[:2]
        call.target = factors_of
        following.target = plus_product if following.args[1] is call else product_plus


def _sums_multiply(lowering: Lowering) -> None:
    for node in lowering.graph.nodes:
        sums = node.users if node.target is factors_of else ()
        if not all(user.target in (plus_product, product_plus) for user in sums):
            raise PassError(f"{node.name}, two factors for a sum, is used by another operation")


transpose_pass = Pass("transpose", transpose_once, ensures=_sums_multiply)
