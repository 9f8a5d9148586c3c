"""MultiheadAttention, its output projection included."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.capture._leaves import Opened, Own, opens
from rewriter.capture.leaves._masks import float_masks
from rewriter.serialization._functions import graph_function


@graph_function
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
    in_proj_weight: Tensor | None,
    q_proj_weight: Tensor | None,
    k_proj_weight: Tensor | None,
    v_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    training: bool,
    embed_dim: int,
    num_heads: int,
    add_zero_attn: bool,
    dropout: float,
    batch_first: bool,
) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.MultiheadAttention`, without its fused inference kernel: that one rounds differently.

    Nested tensors, which only the fused kernel takes, are refused as the module refuses them outside of it.
    """
    if query.is_nested or key.is_nested or value.is_nested:
        raise RuntimeError("an attention whose weights are computed takes no nested tensors; bake the model first")
    turned = batch_first and query.dim() == 3
    q, k, v = query, key, value
    if turned:
        # F.multi_head_attention_forward projects at once what is one and the same tensor.
        q = query.transpose(1, 0)
        k = q if key is query else key.transpose(1, 0)
        v = k if value is key else value.transpose(1, 0)
    # A float mask and a boolean one may come together; the module turns both into floats first.
    mask, padding = float_masks(attn_mask, key_padding_mask, q.dtype, "attn_mask", "key_padding_mask")
    output, weights = F.multi_head_attention_forward(
        q,
        k,
        v,
        embed_dim,
        num_heads,
        in_proj_weight,
        in_proj_bias,
        bias_k,
        bias_v,
        add_zero_attn,
        dropout,
        out_weight,
        out_bias,
        training=training,
        key_padding_mask=padding,
        need_weights=need_weights,
        attn_mask=mask,
        use_separate_proj_weight=in_proj_weight is None,
        q_proj_weight=q_proj_weight,
        k_proj_weight=k_proj_weight,
        v_proj_weight=v_proj_weight,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    return (output.transpose(1, 0) if turned else output), weights


_TENSORS = (
    "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v",
    "out_proj.weight", "out_proj.bias", "training",
)  # fmt: skip


@opens(nn.MultiheadAttention)
def attention(module: nn.MultiheadAttention) -> Opened:
    settings = (
        module.embed_dim,
        module.num_heads,
        module.add_zero_attn,
        module.dropout,
        module.batch_first,
    )
    return Opened(multi_head_attention, (*map(Own, _TENSORS), *settings))
