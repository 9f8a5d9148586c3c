"""Functions that torch.nn has only as modules: the forward with every tensor an argument.

Each does what the module of that name does, unbatched inputs and absent states included, and scripts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import _VF, Tensor

from rewriter.io._functions import graph_function


@graph_function
def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> Tensor:
    """One step of `torch.nn.RNNCell` with tanh: input (N, H_in) or (H_in), hx (N, H) or (H)."""
    batched = _check_cell_input(input, "RNNCell")
    x, h = _cell_state(input, hx, w_hh.size(1), batched)
    new = _VF.rnn_tanh_cell(x, h, w_ih, w_hh, b_ih, b_hh)
    return new if batched else new.squeeze(0)


@graph_function
def rnn_relu_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> Tensor:
    """One step of `torch.nn.RNNCell` with ReLU."""
    batched = _check_cell_input(input, "RNNCell")
    x, h = _cell_state(input, hx, w_hh.size(1), batched)
    new = _VF.rnn_relu_cell(x, h, w_ih, w_hh, b_ih, b_hh)
    return new if batched else new.squeeze(0)


@graph_function
def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> Tensor:
    """One step of `torch.nn.GRUCell`."""
    batched = _check_cell_input(input, "GRUCell")
    x, h = _cell_state(input, hx, w_hh.size(1), batched)
    new = _VF.gru_cell(x, h, w_ih, w_hh, b_ih, b_hh)
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
    batched = _check_cell_input(input, "LSTMCell")
    if hx is None:
        x, h = _cell_state(input, None, w_hh.size(1), batched)
        c = h
    else:
        x, h = _cell_state(input, hx[0], w_hh.size(1), batched)
        c = hx[1] if batched else hx[1].unsqueeze(0)
    new_h, new_c = _VF.lstm_cell(x, [h, c], w_ih, w_hh, b_ih, b_hh)
    if batched:
        return new_h, new_c
    return new_h.squeeze(0), new_c.squeeze(0)


def _check_cell_input(input: Tensor, kind: str) -> bool:
    if input.dim() != 1 and input.dim() != 2:
        raise ValueError(f"{kind}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    return input.dim() == 2


def _cell_state(input: Tensor, hx: Tensor | None, hidden: int, batched: bool) -> tuple[Tensor, Tensor]:
    x = input if batched else input.unsqueeze(0)
    if hx is None:
        return x, torch.zeros(x.size(0), hidden, dtype=x.dtype, device=x.device)
    return x, hx if batched else hx.unsqueeze(0)


@graph_function
def padded_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad: list[int],
    mode: str,
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`torch.nn.Conv1d` with a padding mode other than zeros; `pad` as `torch.nn.functional.pad` takes it."""
    return F.conv1d(F.pad(input, pad, mode=mode), weight, bias, stride, 0, dilation, groups)


@graph_function
def padded_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad: list[int],
    mode: str,
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`torch.nn.Conv2d` with a padding mode other than zeros."""
    return F.conv2d(F.pad(input, pad, mode=mode), weight, bias, stride, 0, dilation, groups)


@graph_function
def padded_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad: list[int],
    mode: str,
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`torch.nn.Conv3d` with a padding mode other than zeros."""
    return F.conv3d(F.pad(input, pad, mode=mode), weight, bias, stride, 0, dilation, groups)
