"""Openers for the modules whose forward is one function of torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from rewriter.capture import _functions as functions
from rewriter.capture._leaves import Opened, Own, opens


@opens(nn.Linear)
def linear(module: nn.Linear) -> Opened:
    return Opened(F.linear, (Own("weight"), Own("bias")))


@opens(nn.Bilinear)
def bilinear(module: nn.Bilinear) -> Opened:
    return Opened(F.bilinear, (Own("weight"), Own("bias")))


_CONVOLUTIONS = {
    nn.Conv1d: (F.conv1d, functions.padded_conv1d),
    nn.Conv2d: (F.conv2d, functions.padded_conv2d),
    nn.Conv3d: (F.conv3d, functions.padded_conv3d),
}


@opens(*_CONVOLUTIONS)
def convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Opened:
    plain, padded = _CONVOLUTIONS[next(kind for kind in _CONVOLUTIONS if isinstance(module, kind))]
    tensors = (Own("weight"), Own("bias"))
    if module.padding_mode == "zeros":
        return Opened(plain, (*tensors, module.stride, module.padding, module.dilation, module.groups))
    pad = list(module._reversed_padding_repeated_twice)
    return Opened(padded, (*tensors, pad, module.padding_mode, module.stride, module.dilation, module.groups))


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


@opens(nn.LayerNorm)
def layer_norm(module: nn.LayerNorm) -> Opened:
    return Opened(F.layer_norm, (list(module.normalized_shape), Own("weight"), Own("bias"), module.eps))


@opens(nn.RMSNorm)
def rms_norm(module: nn.RMSNorm) -> Opened:
    return Opened(F.rms_norm, (list(module.normalized_shape), Own("weight"), module.eps))


@opens(nn.GroupNorm)
def group_norm(module: nn.GroupNorm) -> Opened:
    return Opened(F.group_norm, (module.num_groups, Own("weight"), Own("bias"), module.eps))


_CELL_TENSORS = (Own("weight_ih"), Own("weight_hh"), Own("bias_ih"), Own("bias_hh"))


@opens(nn.RNNCell)
def rnn_cell(module: nn.RNNCell) -> Opened:
    function = functions.rnn_tanh_cell if module.nonlinearity == "tanh" else functions.rnn_relu_cell
    return Opened(function, _CELL_TENSORS)


@opens(nn.GRUCell)
def gru_cell(module: nn.GRUCell) -> Opened:
    return Opened(functions.gru_cell, _CELL_TENSORS)


@opens(nn.LSTMCell)
def lstm_cell(module: nn.LSTMCell) -> Opened:
    return Opened(functions.lstm_cell, _CELL_TENSORS)
