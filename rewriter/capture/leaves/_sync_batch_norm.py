"""SyncBatchNorm: statistics over all processes where there are several, and a batch norm otherwise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm

from rewriter.capture._leaves import Opened, Own, opens
from rewriter.capture.leaves._normalization import counted_momentum
from rewriter.serialization._functions import graph_function


@graph_function
def sync_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    process_group: Any,
    track_running_stats: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """`torch.nn.SyncBatchNorm`: input (N, C, *).

    In training the running statistics are updated in place; a `momentum` of None is the average over all batches. A
    `process_group` of None is the whole world. TorchScript takes this function as little as it takes the module.
    """
    if input.dim() < 2:
        raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
    if input.size(1) == 0:
        raise ValueError("SyncBatchNorm number of input channels should be non-zero")
    tracking = training and track_running_stats
    assert num_batches_tracked is not None or not tracking
    factor = counted_momentum(num_batches_tracked, tracking, momentum)
    by_batch = training or (running_mean is None and running_var is None)
    used = not training or track_running_stats
    mean, variance = (running_mean, running_var) if used else (None, None)
    distributed: Any = torch.distributed
    if training and distributed.is_available() and distributed.is_initialized():
        other = torch._C._get_privateuse1_backend_name()
        if input.device.type not in ("cuda", "hpu", "xpu", other):
            raise ValueError(f"SyncBatchNorm expected input tensor to be on GPU or XPU or {other}")
        group = process_group or distributed.group.WORLD
        processes = distributed.get_world_size(group)
        if processes > 1:
            synchronized: Any = SyncBatchNorm
            normed: Tensor = synchronized.apply(input, weight, bias, mean, variance, eps, factor, group, processes)
            return normed
    return F.batch_norm(input, mean, variance, weight, bias, by_batch, factor, eps)


_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training", "process_group")


@opens(nn.SyncBatchNorm)
def synchronized_batch_normalization(module: nn.SyncBatchNorm) -> Opened:
    return Opened(sync_batch_norm, (*map(Own, _TENSORS), module.track_running_stats, module.momentum, module.eps))
