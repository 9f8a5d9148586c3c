"""apart: a linear layer applies a LoRA step to its input, and the weight with the change in it is not made.

``linear(x, W + s B A, b)`` becomes ``linear(x, W, b) + s (x Aᵀ) Bᵀ``, as PEFT computes it. Backward then has no
gradient of the whole weight to make. The site decides at each forward: without gradients, the value serves.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from rewriter.passes._infra import Lowering, Pass, PassError, evaluations_of, is_linear_by
from rewriter.serialization._functions import graph_function
from rewriter.sites._apart import may_be_apart


@graph_function
def linear_apart(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """Return what `torch.nn.functional.linear` does.

    Arguments:
        x: of shape ``(..., in)``.
        weight: of shape ``(out, in)``, or a base and the step that changes it.
        bias: of shape ``(out,)``.
    """
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    base, step = weight
    return step.linear(x, base, bias)  # type: ignore[no-any-return]


def set_apart(lowering: Lowering) -> bool:
    """Give the base and the step to the one linear call that uses a value, if nothing else does."""
    found = False
    for site, nodes in evaluations_of(lowering).items():
        for node in nodes if may_be_apart(site) else ():
            if len(node.users) == 1 and is_linear_by(next(iter(node.users)), node):
                node.kwargs = {**node.kwargs, "apart": True}
                next(iter(node.users)).target = linear_apart
                found = True
    return found


def _used_by_linear_alone(lowering: Lowering) -> None:
    for nodes in evaluations_of(lowering).values():
        for node in nodes:
            if node.kwargs.get("apart") and [user.target for user in node.users] != [linear_apart]:
                raise PassError(f"{node.name}, a base and a step for a linear call, is used by another operation")


linear_apart.casts_under_autocast = True  # type: ignore[attr-defined]
apart_pass = Pass("apart", set_apart, ensures=_used_by_linear_alone)
