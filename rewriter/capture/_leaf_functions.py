"""The functions that modules of `torch.nn` become, where torch has none that takes the same arguments.

Each takes the arguments of the module's forward first, in that order. TorchScript compiles them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter._torch import _VF
from rewriter.serialization._functions import graph_function


@graph_function
def padded_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad: list[int],
    mode: str,
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`torch.nn.Conv1d`, ``2d`` or ``3d`` with a padding mode other than zeros; `pad` as `F.pad` takes it."""
    padded = F.pad(input, pad, mode=mode)
    if weight.dim() == 3:
        return F.conv1d(padded, weight, bias, stride, 0, dilation, groups)
    if weight.dim() == 4:
        return F.conv2d(padded, weight, bias, stride, 0, dilation, groups)
    return F.conv3d(padded, weight, bias, stride, 0, dilation, groups)


@graph_function
def conv_transpose(
    input: Tensor,
    output_size: list[int] | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    groups: int,
    dilation: list[int],
) -> Tensor:
    """`torch.nn.ConvTranspose1d`, ``2d`` or ``3d``; the weight has shape (C_in, C_out / groups, *kernel).

    `output_size` is the spatial sizes wanted, or the whole shape; it decides `output_padding`.
    """
    dims = weight.dim() - 2
    extra = output_padding
    if output_size is not None:
        skipped = 2 if input.dim() == dims + 2 else 1
        wanted = output_size[skipped:] if len(output_size) == skipped + dims else output_size
        if len(wanted) != dims:
            raise ValueError(
                f"ConvTranspose{dims}D: for {input.dim()}D input, output_size must have {dims} or {skipped + dims} "
                f"elements (got {len(output_size)})"
            )
        extra = []
        for d in range(dims):
            reach = dilation[d] * (weight.size(d + 2) - 1) + 1
            smallest = (input.size(d + skipped) - 1) * stride[d] - 2 * padding[d] + reach
            if wanted[d] < smallest or wanted[d] > smallest + stride[d] - 1:
                raise ValueError(
                    f"requested an output size of {output_size}, but dimension {d} can be {smallest} to "
                    f"{smallest + stride[d] - 1}"
                )
            extra.append(wanted[d] - smallest)
    if dims == 1:
        return F.conv_transpose1d(input, weight, bias, stride, padding, extra, groups, dilation)
    if dims == 2:
        return F.conv_transpose2d(input, weight, bias, stride, padding, extra, groups, dilation)
    return F.conv_transpose3d(input, weight, bias, stride, padding, extra, groups, dilation)


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
    settings = (max_norm, norm_type, scale_grad_by_freq, mode, sparse)
    return F.embedding_bag(input, weight, offsets, *settings, per_sample_weights, include_last_offset, padding_idx)


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
    """`torch.nn.BatchNorm1d`, ``2d`` or ``3d``; `dims` are the numbers of dimensions that it accepts.

    In training the running statistics are updated in place; a `momentum` of None is the average over all batches.
    """
    if input.dim() not in dims:
        raise ValueError(f"expected {dims} dimensions of the input (got {input.dim()}D input)")
    factor = 0.0 if momentum is None else momentum
    if training and track_running_stats and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            factor = 1.0 / float(num_batches_tracked)
    used = not training or track_running_stats
    by_batch = training or (running_mean is None and running_var is None)
    mean, variance = running_mean if used else None, running_var if used else None
    return F.batch_norm(input, mean, variance, weight, bias, by_batch, factor, eps)


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
    features: int,
    unbatched: int,
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


@graph_function
def cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    mode: str,
) -> Tensor:
    """One step of `torch.nn.RNNCell` (`mode` ``"tanh"``, ``"relu"``) or `torch.nn.GRUCell` (``"gru"``).

    Arguments:
        input: (N, H_in) or (H_in).
        hx: (N, H) or (H).
    """
    batched = _check_cell_input(input)
    x, h = _cell_state(input, hx, w_hh.size(1), batched)
    if mode == "gru":
        new = _VF.gru_cell(x, h, w_ih, w_hh, b_ih, b_hh)
    elif mode == "tanh":
        new = _VF.rnn_tanh_cell(x, h, w_ih, w_hh, b_ih, b_hh)
    else:
        new = _VF.rnn_relu_cell(x, h, w_ih, w_hh, b_ih, b_hh)
    return new if batched else new.squeeze(0)


@graph_function
def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One step of `torch.nn.LSTMCell`; returns the new hidden and cell states."""
    batched = _check_cell_input(input)
    x, h = _cell_state(input, None if hx is None else hx[0], w_hh.size(1), batched)
    c = h if hx is None else _cell_state(input, hx[1], w_hh.size(1), batched)[1]
    new_h, new_c = _VF.lstm_cell(x, [h, c], w_ih, w_hh, b_ih, b_hh)
    if batched:
        return new_h, new_c
    return new_h.squeeze(0), new_c.squeeze(0)


def _check_cell_input(input: Tensor) -> bool:
    if input.dim() != 1 and input.dim() != 2:
        raise ValueError(f"Expected input to be 1D or 2D, got {input.dim()}D instead")
    return input.dim() == 2


def _cell_state(input: Tensor, hx: Tensor | None, hidden: int, batched: bool) -> tuple[Tensor, Tensor]:
    x = input if batched else input.unsqueeze(0)
    if hx is None:
        return x, torch.zeros(x.size(0), hidden, dtype=x.dtype, device=x.device)
    return x, hx if batched else hx.unsqueeze(0)


@graph_function
def attention(
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
    """`torch.nn.MultiheadAttention`, without its fused inference kernel: that one rounds differently."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise RuntimeError("an attention whose weights are computed takes no nested tensors; bake the model first")
    turned = batch_first and query.dim() == 3
    q, k, v = query, key, value
    if turned:
        # F.multi_head_attention_forward projects one tensor once, and compares its arguments by identity.
        q = query.transpose(1, 0)
        k = q if key is query else key.transpose(1, 0)
        v = k if value is key else value.transpose(1, 0)
    output, weights = F.multi_head_attention_forward(
        q, k, v, embed_dim, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn, dropout,
        out_weight, out_bias, training=training, key_padding_mask=key_padding_mask, need_weights=need_weights,
        attn_mask=attn_mask, use_separate_proj_weight=in_proj_weight is None, q_proj_weight=q_proj_weight,
        k_proj_weight=k_proj_weight, v_proj_weight=v_proj_weight, average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )  # fmt: skip
    return (output.transpose(1, 0) if turned else output), weights
