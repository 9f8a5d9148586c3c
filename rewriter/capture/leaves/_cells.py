"""RNNCell, GRUCell and LSTMCell: one time step, unbatched inputs and absent states included."""

from __future__ import annotations

import torch
from torch import _VF, Tensor, nn

from rewriter.capture._leaves import Opened, Own, opens
from rewriter.serialization._functions import graph_function


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


_TENSORS = (Own("weight_ih"), Own("weight_hh"), Own("bias_ih"), Own("bias_hh"))


@opens(nn.RNNCell)
def elman_step(module: nn.RNNCell) -> Opened:
    return Opened(rnn_tanh_cell if module.nonlinearity == "tanh" else rnn_relu_cell, _TENSORS)


@opens(nn.GRUCell)
def gru_step(module: nn.GRUCell) -> Opened:
    return Opened(gru_cell, _TENSORS)


@opens(nn.LSTMCell)
def lstm_step(module: nn.LSTMCell) -> Opened:
    return Opened(lstm_cell, _TENSORS)
