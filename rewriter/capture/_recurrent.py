"""RNN, GRU and LSTM over whole sequences, also unbatched and packed ones.

The graph recognizes a packed sequence by its type when it runs. TorchScript cannot test a type, so a scripted graph
takes tensors only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling, is_exporting
from torch.nn.utils.rnn import PackedSequence

from rewriter._torch import _VF
from rewriter.serialization._functions import graph_function


@graph_function
def recurrent(
    input: Tensor,
    hx: Tensor | None,
    weights: list[Tensor],
    mode: str,
    bias: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    input_size: int,
    hidden_size: int,
) -> tuple[Tensor, Tensor]:
    """`torch.nn.RNN` (`mode` ``"RNN_TANH"`` or ``"RNN_RELU"``) or `torch.nn.GRU` (``"GRU"``).

    Arguments:
        input: (L, N, H_in), (N, L, H_in) with `batch_first`, (L, H_in), or outside TorchScript a PackedSequence.
        hx: (D * layers, N, H) or (D * layers, H); None is zeros.
        weights: in the order of the module's own list.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        pass
    elif isinstance(input, PackedSequence):
        return _packed(input, hx, weights, mode, bias, layers, dropout, training, bidirectional)
    batched = _is_batched(input, mode)
    batch_dim = 0 if batch_first else 1
    x = input if batched else input.unsqueeze(batch_dim)
    _check_features(x, input_size)
    expected = [layers * (2 if bidirectional else 1), x.size(batch_dim), hidden_size]
    h = _state(hx, x, expected, batched)
    if mode == "GRU":
        found = _VF.gru(x, h, weights, bias, layers, dropout, training, bidirectional, batch_first)
    elif mode == "RNN_TANH":
        found = _VF.rnn_tanh(x, h, weights, bias, layers, dropout, training, bidirectional, batch_first)
    else:
        found = _VF.rnn_relu(x, h, weights, bias, layers, dropout, training, bidirectional, batch_first)
    output, last = found[0], found[1]
    return (output, last) if batched else (output.squeeze(batch_dim), last.squeeze(1))


@graph_function
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: list[Tensor],
    bias: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    input_size: int,
    hidden_size: int,
    proj_size: int,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`torch.nn.LSTM`; arguments as of `recurrent`, hidden states of size `proj_size` where that is not 0."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        pass
    elif isinstance(input, PackedSequence):
        return _packed(input, hx, weights, "LSTM", bias, layers, dropout, training, bidirectional)
    batched = _is_batched(input, "LSTM")
    batch_dim = 0 if batch_first else 1
    x = input if batched else input.unsqueeze(batch_dim)
    _check_features(x, input_size)
    rows = layers * (2 if bidirectional else 1)
    visible = proj_size if proj_size > 0 else hidden_size
    h0 = _state(None if hx is None else hx[0], x, [rows, x.size(batch_dim), visible], batched)
    if hx is None and visible == hidden_size:
        c0 = h0  # zeros as well, and nothing writes to them
    else:
        c0 = _state(None if hx is None else hx[1], x, [rows, x.size(batch_dim), hidden_size], batched)
    found = _lstm(x, [h0, c0], weights, bias, layers, dropout, training, bidirectional, batch_first)
    output, h, c = found[0], found[1], found[2]
    if batched:
        return output, (h, c)
    return output.squeeze(batch_dim), (h.squeeze(1), c.squeeze(1))


def _lstm(
    x: Tensor,
    hx: list[Tensor],
    weights: list[Tensor],
    bias: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        pass
    elif is_dynamo_compiling() and not is_exporting() and torch.is_grad_enabled():
        settings = (bias, layers, dropout, training, bidirectional, batch_first)
        uncompiled: tuple[Tensor, Tensor, Tensor] = _uncompiled_lstm(x, hx, weights, settings)
        return uncompiled
    found = _VF.lstm(x, hx, weights, bias, layers, dropout, training, bidirectional, batch_first)
    return found[0], found[1], found[2]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled_lstm(x: Tensor, hx: list[Tensor], weights: list[Tensor], settings: tuple[Any, ...]) -> Any:
    """Call the LSTM outside the compiled graph: AOTAutograd fails on its derivative on a CPU (torch 2.13)."""
    return _VF.lstm(x, hx, weights, *settings)


def _is_batched(input: Tensor, kind: str) -> bool:
    if input.dim() != 2 and input.dim() != 3:
        raise ValueError(f"{kind}: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
    return input.dim() == 3


def _check_features(input: Tensor, expected: int) -> None:
    if input.size(-1) != expected:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {expected}, got {input.size(-1)}")


def _state(hx: Tensor | None, input: Tensor, expected: list[int], batched: bool) -> Tensor:
    if hx is None:
        return torch.zeros(expected, dtype=input.dtype, device=input.device)
    if hx.dim() != (3 if batched else 2):
        raise RuntimeError(f"the hidden state has {hx.dim()} dimensions; the input wants {3 if batched else 2}")
    h = hx if batched else hx.unsqueeze(1)
    if list(h.size()) != expected:
        raise RuntimeError(f"Expected hidden size {expected}, got {list(h.size())}")
    return h


@torch.jit.unused
def _packed(
    packed: Any,
    hx: Any,
    weights: Any,
    mode: str,
    bias: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> Any:
    data, sizes, order, back = packed
    run: Any = {"LSTM": _VF.lstm, "GRU": _VF.gru, "RNN_TANH": _VF.rnn_tanh, "RNN_RELU": _VF.rnn_relu}[mode]
    single = mode != "LSTM"
    if hx is not None:
        states = [_rows(h, order) for h in ([hx] if single else hx)]
        for h in states:
            if h.size(1) != int(sizes[0]):
                raise RuntimeError(f"Expected a hidden state for {int(sizes[0])} sequences, got {h.size(1)}")
    else:
        rows = layers * (2 if bidirectional else 1)
        # A projected LSTM has a cell state that is wider than its hidden state.
        gates = {"LSTM": 4, "GRU": 3}.get(mode, 1)
        widths = [weights[1].size(1)] if single else [weights[1].size(1), weights[1].size(0) // gates]
        states = [torch.zeros(rows, int(sizes[0]), width, dtype=data.dtype, device=data.device) for width in widths]
    start = states[0] if single else states
    output, *last = run(data, sizes, start, weights, bias, layers, dropout, training, bidirectional)
    hidden = [_rows(h, back) for h in last]
    return PackedSequence(output, sizes, order, back), hidden[0] if single else tuple(hidden)


def _rows(hidden: Any, order: Any) -> Any:
    return hidden if order is None else hidden.index_select(1, order)
