"""Embedding and EmbeddingBag."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.capture._leaves import Opened, Own, opens
from rewriter.serialization._functions import graph_function


@opens(nn.Embedding)
def embedding(module: nn.Embedding) -> Opened:
    settings = (
        module.padding_idx,
        module.max_norm,
        module.norm_type,
        module.scale_grad_by_freq,
        module.sparse,
    )
    return Opened(F.embedding, (Own("weight"), *settings))


@graph_function
def embedding_bag(
    input: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    weight: Tensor,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
    mode: str,
    sparse: bool,
    include_last_offset: bool,
    padding_idx: int | None,
) -> Tensor:
    """`torch.nn.EmbeddingBag`: input (B, N), or (N,) with offsets (B,)."""
    return F.embedding_bag(
        input,
        weight,
        offsets,
        max_norm,
        norm_type,
        scale_grad_by_freq,
        mode,
        sparse,
        per_sample_weights,
        include_last_offset,
        padding_idx,
    )


@opens(nn.EmbeddingBag)
def bag(module: nn.EmbeddingBag) -> Opened:
    settings = (
        module.max_norm,
        module.norm_type,
        module.scale_grad_by_freq,
        module.mode,
        module.sparse,
        module.include_last_offset,
        module.padding_idx,
    )
    return Opened(embedding_bag, (Own("weight"), *settings))
