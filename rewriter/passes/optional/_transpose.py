"""transpose: a weight that many linear calls use is transposed once, ahead of them.

`torch.nn.functional.linear` transposes its weight at each call, with a node of the autograd graph each time. Where the
product is only added to something, as in an RNN, the sum is left to the product.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.compiler import is_compiling

from rewriter.passes._effects import nothing_written_between
from rewriter.passes._infra import Lowering, Pass, PassError, evaluations_of
from rewriter.serialization._functions import graph_function

LEAST = 8
"""Fewer calls are not worth another node in the graph."""


@graph_function
def times_transposed(x: Tensor, transposed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `torch.nn.functional.linear` does, by the same operations, of a weight that is transposed already.

    Arguments:
        x: of shape ``(..., in)``.
        transposed: of shape ``(in, out)``.
        bias: of shape ``(out,)``.
    """
    if x.dim() == 2:
        return torch.mm(x, transposed) if bias is None else torch.addmm(bias, x, transposed)
    return F.linear(x, transposed.t(), bias)


@graph_function
def factors_of(x: Tensor, transposed: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `times_transposed` would multiply, for the sum that uses the product and nothing else does."""
    return x, transposed


@graph_function
def plus_product(summand: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """Return a sum with a product, by one operation where the summand has the shape and the type of the product.

    Arguments:
        summand: whatever can be added to the product.
        factors: of shapes ``(..., in)`` and ``(in, out)``, the second a weight that is transposed already.
    """
    x, transposed = factors
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return summand + times_transposed(x, transposed)
    else:
        if _is_like_product(summand, x, transposed):
            return torch.addmm(summand, x, transposed)
        return summand + times_transposed(x, transposed)


@graph_function
def product_plus(factors: tuple[Tensor, Tensor], summand: Tensor) -> Tensor:
    """Return what `plus_product` does: the sum as the model wrote it."""
    return plus_product(summand, factors)


def _is_like_product(summand: Tensor, x: Tensor, transposed: Tensor) -> bool:
    """Whether the sum is neither broadcast nor of another type than the product; autocast would make it one."""
    if x.dim() != 2 or summand.dtype is not x.dtype or summand.shape != (x.shape[0], transposed.shape[1]):
        return False
    return not is_compiling() and not torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)


def transpose_once(lowering: Lowering) -> bool:
    """Transpose the matrices that at least `LEAST` linear calls use."""
    transposed = False
    for site, nodes in evaluations_of(lowering).items():
        members = site.spec.members
        for node in nodes if len(members) == 1 and len(members[0].shape) == 2 else ():
            calls = [user for user in node.users if _is_linear(user, node)]
            if len(calls) >= LEAST:
                _transpose(lowering, node, calls)
                transposed = True
    return transposed


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
