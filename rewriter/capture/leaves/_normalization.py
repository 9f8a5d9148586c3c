"""Normalizations; those with running statistics go on updating them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.capture._leaves import Opened, Own, opens
from rewriter.serialization._functions import graph_function


@opens(nn.LayerNorm)
def layer_norm(module: nn.LayerNorm) -> Opened:
    return Opened(F.layer_norm, (list(module.normalized_shape), Own("weight"), Own("bias"), module.eps))


@opens(nn.RMSNorm)
def rms_norm(module: nn.RMSNorm) -> Opened:
    return Opened(F.rms_norm, (list(module.normalized_shape), Own("weight"), module.eps))


@opens(nn.GroupNorm)
def group_norm(module: nn.GroupNorm) -> Opened:
    return Opened(F.group_norm, (module.num_groups, Own("weight"), Own("bias"), module.eps))


def counted_momentum(num_batches_tracked: Tensor | None, tracking: bool, momentum: float | None) -> float:
    """Count the batch, in place, while `tracking`; return its weight in the running statistics.

    That is `momentum`, or for None what makes them the average over all batches.
    """
    factor = 0.0 if momentum is None else momentum
    if tracking and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            factor = 1.0 / float(num_batches_tracked)
    return factor


@graph_function
def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    track_running_stats: bool,
    momentum: float | None,
    eps: float,
    dims: list[int],
) -> Tensor:
    """`torch.nn.BatchNorm1d`, ``2d`` or ``3d``: the numbers of dimensions that it accepts are in `dims`.

    In training the running statistics are updated in place; a `momentum` of None is the average over all batches.
    """
    if input.dim() not in dims:
        raise ValueError(f"expected {dims} dimensions of the input (got {input.dim()}D input)")
    factor = counted_momentum(num_batches_tracked, training and track_running_stats, momentum)
    used = not training or track_running_stats
    return F.batch_norm(
        input,
        running_mean if used else None,
        running_var if used else None,
        weight,
        bias,
        training or (running_mean is None and running_var is None),
        factor,
        eps,
    )


_BATCH_NORMS: dict[type[nn.Module], list[int]] = {nn.BatchNorm1d: [2, 3], nn.BatchNorm2d: [4], nn.BatchNorm3d: [5]}


@opens(*_BATCH_NORMS)
def batch_normalization(module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> Opened:
    tensors = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training")
    dims = next(found for kind, found in _BATCH_NORMS.items() if isinstance(module, kind))
    settings = (module.track_running_stats, module.momentum, module.eps, dims)
    return Opened(batch_norm, (*map(Own, tensors), *settings))


@graph_function
def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    track_running_stats: bool,
    momentum: float | None,
    eps: float,
    unbatched: int,
    features: int,
) -> Tensor:
    """`torch.nn.InstanceNorm1d`, ``2d`` or ``3d``: an input without batch has `unbatched` dimensions."""
    if input.dim() != unbatched and input.dim() != unbatched + 1:
        raise ValueError(f"expected {unbatched}D or {unbatched + 1}D input (got {input.dim()}D input)")
    found = input.size(input.dim() - unbatched)
    if found != features and weight is not None:
        raise ValueError(f"expected {features} channels (got {found})")
    batched = input if input.dim() > unbatched else input.unsqueeze(0)
    by_input = training or not track_running_stats
    factor = 0.0 if momentum is None else momentum
    normed = F.instance_norm(batched, running_mean, running_var, weight, bias, by_input, factor, eps)
    return normed if input.dim() > unbatched else normed.squeeze(0)


_INSTANCE_NORMS: dict[type[nn.Module], int] = {nn.InstanceNorm1d: 2, nn.InstanceNorm2d: 3, nn.InstanceNorm3d: 4}


@opens(*_INSTANCE_NORMS)
def instance_normalization(module: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d) -> Opened:
    tensors = ("weight", "bias", "running_mean", "running_var", "training")
    unbatched = next(found for kind, found in _INSTANCE_NORMS.items() if isinstance(module, kind))
    settings = (module.track_running_stats, module.momentum, module.eps, unbatched, module.num_features)
    return Opened(instance_norm, (*map(Own, tensors), *settings))
