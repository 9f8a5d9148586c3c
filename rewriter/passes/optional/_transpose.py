"""transpose: a weight that many linear calls use is transposed once, ahead of them.

`torch.nn.functional.linear` transposes its weight at each call, with a node of the autograd graph each time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.passes._infra import Lowering, Pass, evaluations_of, is_linear_by
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


def transpose_once(lowering: Lowering) -> bool:
    """Transpose the matrices that at least `LEAST` linear calls use."""
    transposed = False
    for site, nodes in evaluations_of(lowering).items():
        members = site.spec.members
        for node in nodes if len(members) == 1 and len(members[0].shape) == 2 else ():
            calls = [user for user in node.users if is_linear_by(user, node)]
            if len(calls) >= LEAST:
                with lowering.graph.inserting_after(node):
                    once = lowering.graph.call_method("t", (node,))
                for call in calls:
                    call.replace_input_with(node, once)
                    call.target = times_transposed
                transposed = True
    return transposed


transpose_pass = Pass("transpose", transpose_once)
