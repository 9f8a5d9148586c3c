"""AdaptiveLogSoftmaxWithLoss, its head and its clusters included."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.adaptive import _ASMoutput

from rewriter.capture._leaves import Opened, Own, opens
from rewriter.serialization._functions import graph_function
from rewriter.sites import plain_class
from rewriter.sites._hooks import has_hooks


@graph_function
def adaptive_log_softmax(
    input_: Tensor,
    target_: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    tail: list[Tensor],
    cutoffs: list[int],
) -> _ASMoutput:
    """`torch.nn.AdaptiveLogSoftmaxWithLoss`: the log probabilities of the targets, and their mean with a minus.

    Arguments:
        input_: (N, in_features) or (in_features).
        target_: (N) or ().
        tail: two matrices for each cluster, in the order in which they are applied.
        cutoffs: where the clusters start, and the number of classes.
    """
    batched = target_.dim() == 1
    if target_.dim() > 1:
        raise RuntimeError("0D or 1D target tensor expected, multi-target not supported")
    if input_.dim() != target_.dim() + 1:
        raise RuntimeError(
            f"{target_.dim()}D target tensor expects {target_.dim() + 1}D input tensors, "
            f"but found inputs with size {input_.size()}"
        )
    if batched and input_.size(0) != target_.size(0):
        raise RuntimeError("Input and target should have the same size in the batch dimension.")
    input = input_ if batched else input_.unsqueeze(0)
    target = target_ if batched else target_.unsqueeze(0)
    known = (target >= 0) & (target < cutoffs[-1])
    if not bool(known.all()):
        raise RuntimeError(
            f"Target values should be in [0, {cutoffs[-1] - 1}], "
            f"but values in range [{target.min().item()}, {target.max().item()}] were found. "
        )
    output = input.new_zeros(target.size(0))
    # Which column of the head tells of a target: its own, or its cluster's.
    columns = target.clone()
    for cluster in range(len(cutoffs) - 1):
        inside = (target >= cutoffs[cluster]) & (target < cutoffs[cluster + 1])
        rows = inside.nonzero().squeeze(1)
        if rows.numel() > 0:
            found = F.linear(F.linear(input.index_select(0, rows), tail[2 * cluster]), tail[2 * cluster + 1])
            relative = (target[inside] - cutoffs[cluster]).unsqueeze(1)
            output.index_copy_(0, rows, F.log_softmax(found, dim=1).gather(1, relative).squeeze(1))
            columns.index_fill_(0, rows, cutoffs[0] + cluster)
    head = F.log_softmax(F.linear(input, head_weight, head_bias), dim=1)
    output += head.gather(1, columns.unsqueeze(1)).squeeze(1)
    loss = (-output).mean()
    return _ASMoutput(output if batched else output.squeeze(0), loss)


@opens(nn.AdaptiveLogSoftmaxWithLoss)
def adaptive_softmax(module: nn.AdaptiveLogSoftmaxWithLoss) -> Opened | None:
    clusters = list(module.tail)
    pairs = [list(cluster.children()) for cluster in clusters]
    parts = [module.head, *(part for pair in pairs for part in pair)]
    if any(plain_class(part) is not nn.Linear for part in parts) or any(map(has_hooks, (*clusters, *parts))):
        return None
    if any(plain_class(cluster) is not nn.Sequential for cluster in clusters) or {len(pair) for pair in pairs} != {2}:
        return None
    if any(part._parameters["bias"] is not None for part in parts[1:]):
        return None
    tail = [Own(f"tail.{cluster}.{part}.weight") for cluster in range(len(clusters)) for part in range(2)]
    return Opened(adaptive_log_softmax, (Own("head.weight"), Own("head.bias"), tail, list(module.cutoffs)))
