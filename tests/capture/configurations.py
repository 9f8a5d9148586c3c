"""Configurations of torch.nn's modules: how each is made and called, and which of its tensors are computed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence


class One(nn.Module):
    """A model that calls one module; `kwargs` are the call's."""

    def __init__(self, layer: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.layer = layer
        self.kwargs = kwargs

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, **self.kwargs)


class Two(One):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.layer(x, y, **self.kwargs)


class Three(One):
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:
        return self.layer(x, y, z, **self.kwargs)


class WithState(One):
    """An LSTM or LSTMCell that is given its state."""

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.layer(x, (h, c))


class Packed(One):
    def forward(self, x: Tensor) -> Any:
        packed, state = self.layer(pack_padded_sequence(x, [4, 2, 1]))
        return packed.data, state


class PackedUnsorted(One):
    def forward(self, x: Tensor, h: Tensor) -> Any:
        packed, state = self.layer(pack_padded_sequence(x, torch.tensor([2, 4, 1]), enforce_sorted=False), h)
        return packed.data, state


class Masked(One):
    """Attention under a causal mask, with a padding mask that is an input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.register_buffer("mask", torch.ones(3, 3).triu(1).bool(), persistent=False)

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        return self.layer(x, x, x, padding, False, attn_mask=self.mask)


class MaskedLayers(One):
    """A transformer's encoder under a causal mask that is a buffer, with a padding mask that is an input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(3), persistent=False)

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        return self.layer(x, self.mask.to(x.dtype), padding)


PASSED = (
    nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.TransformerDecoderLayer, nn.TransformerDecoder,
    nn.Transformer, nn.AdaptiveLogSoftmaxWithLoss, nn.SyncBatchNorm,
)  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """One row of the matrix."""

    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    names: tuple[str, ...] = ("weight",)
    host: type[One] = One
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def capture(self) -> str:
        """How the plan reaches the tensors."""
        if self.host in (Packed, PackedUnsorted):
            return "module"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "called" if isinstance(self.make(), PASSED) else "inlined"

    def model(self) -> nn.Module:
        return self.host(self.make(), **self.kwargs)

    def arguments(self, dtype: torch.dtype) -> list[Tensor]:
        """Inputs: a tuple is a shape to draw, a list the integers themselves, a string a mask."""
        found = []
        for given in self.inputs:
            if isinstance(given, list):
                found.append(torch.tensor(given))
            elif isinstance(given, str):
                found.append(torch.tensor([[bit == "1" for bit in row] for row in given.split()]))
            else:
                found.append(torch.randn(given, dtype=dtype))
        return found


def _c(make: Callable[[], nn.Module], *inputs: Any, names: tuple[str, ...] = ("weight",), **options: Any) -> Any:
    host = options.pop("host", {1: One, 2: Two, 3: Three}[len(inputs)])
    return Configuration(make, inputs, names, host, options)


_CELL = ("weight_ih", "weight_hh")
_L0 = ("weight_ih_l0", "weight_hh_l0")
_IN = ("in_proj_weight",)
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_OUT = ("out_proj.weight",)

CONFIGURATIONS: dict[str, Configuration] = {
    "linear": _c(lambda: nn.Linear(4, 4), (3, 4)),
    "linear no bias": _c(lambda: nn.Linear(4, 3, bias=False), (4,)),
    "bilinear": _c(lambda: nn.Bilinear(4, 4, 3), (2, 4), (2, 4)),
    "prelu": _c(lambda: nn.PReLU(3), (2, 3)),
    "conv1d": _c(lambda: nn.Conv1d(2, 4, 2, padding="same"), (2, 2, 5)),
    "conv2d groups": _c(lambda: nn.Conv2d(4, 4, 2, stride=2, groups=2), (2, 4, 5, 5)),
    "conv2d circular": _c(lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (2, 2, 4, 4)),
    "conv1d reflect": _c(lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 4)),
    "conv3d": _c(lambda: nn.Conv3d(1, 2, 2, bias=False), (1, 1, 3, 3, 3)),
    "conv3d replicate": _c(lambda: nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate"), (1, 1, 3, 3, 3)),
    "conv transpose 1d": _c(lambda: nn.ConvTranspose1d(2, 3, 2), (2, 2, 4)),
    "conv transpose 1d sized": _c(lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 2, 4), output_size=[10]),
    "conv transpose 2d": _c(
        lambda: nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2, output_padding=1, dilation=2), (1, 4, 3, 3)
    ),
    "conv transpose 2d sized": _c(lambda: nn.ConvTranspose2d(2, 2, 3, 2), (1, 2, 3, 3), output_size=[1, 2, 8, 7]),
    "conv transpose 3d": _c(lambda: nn.ConvTranspose3d(2, 2, 2, bias=False), (1, 2, 2, 2, 2)),
    "batch norm 1d": _c(lambda: nn.BatchNorm1d(4), (5, 4)),
    "batch norm 1d sequence": _c(
        lambda: nn.BatchNorm1d(4, eps=1e-3, momentum=0.3), (5, 4, 3), names=("weight", "bias")
    ),
    "batch norm 2d cumulative": _c(lambda: nn.BatchNorm2d(3, momentum=None), (2, 3, 2, 2)),
    "batch norm 2d untracked": _c(lambda: nn.BatchNorm2d(3, track_running_stats=False), (2, 3, 2, 2)),
    "batch norm 3d": _c(lambda: nn.BatchNorm3d(2), (2, 2, 2, 2, 2)),
    "sync batch norm": _c(lambda: nn.SyncBatchNorm(3), (4, 3, 2), names=("weight", "bias")),
    "sync batch norm cumulative": _c(lambda: nn.SyncBatchNorm(3, momentum=None, eps=1e-3), (4, 3)),
    "sync batch norm untracked": _c(lambda: nn.SyncBatchNorm(3, track_running_stats=False), (2, 3, 2, 2)),
    "instance norm 1d": _c(lambda: nn.InstanceNorm1d(3, affine=True), (2, 3, 5)),
    "instance norm 1d unbatched": _c(lambda: nn.InstanceNorm1d(3, affine=True), (3, 5)),
    "instance norm 2d tracked": _c(
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (2, 3, 4, 4)
    ),
    "instance norm 3d": _c(lambda: nn.InstanceNorm3d(2, affine=True), (1, 2, 2, 2, 2)),
    "group norm": _c(lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "layer norm": _c(lambda: nn.LayerNorm([3, 3]), (2, 3, 3)),
    "rms norm": _c(lambda: nn.RMSNorm(4), (2, 4)),
    "embedding": _c(lambda: nn.Embedding(5, 4, padding_idx=1), [[0, 1, 4], [4, 4, 2]]),
    "embedding by frequency": _c(lambda: nn.Embedding(5, 4, scale_grad_by_freq=True), [[0, 1, 4], [4, 4, 2]]),
    "embedding bag": _c(lambda: nn.EmbeddingBag(5, 4, mode="mean"), [[0, 1, 4], [4, 4, 2]]),
    "embedding bag offsets": _c(lambda: nn.EmbeddingBag(5, 4, mode="max"), [0, 1, 4, 4, 2], [0, 2]),
    "embedding bag weighted": _c(
        lambda: nn.EmbeddingBag(5, 4, mode="sum", padding_idx=1, include_last_offset=True),
        [0, 1, 4, 4, 2], [0, 2, 5], (5,), host=Three,
    ),
    "rnn": _c(lambda: nn.RNN(3, 4), (4, 2, 3), names=_L0),
    "rnn relu deep": _c(
        lambda: nn.RNN(3, 4, 2, nonlinearity="relu", bidirectional=True, batch_first=True), (2, 4, 3),
        names=("weight_hh_l0", "weight_hh_l1_reverse"),
    ),
    "rnn unbatched": _c(lambda: nn.RNN(3, 4, bias=False), (4, 3), (1, 4), names=_L0),
    "gru": _c(lambda: nn.GRU(3, 4, 2, dropout=0.4), (4, 2, 3), names=("weight_hh_l0", "weight_hh_l1")),
    "gru state": _c(lambda: nn.GRU(3, 4, bidirectional=True, batch_first=True), (2, 4, 3), (2, 2, 4), names=_L0),
    "gru packed": _c(lambda: nn.GRU(3, 4), (4, 3, 3), names=_L0, host=Packed),
    "gru packed unsorted": _c(lambda: nn.GRU(3, 4), (4, 3, 3), (1, 3, 4), names=_L0, host=PackedUnsorted),
    "lstm": _c(lambda: nn.LSTM(3, 4), (4, 2, 3), names=_L0),
    "lstm deep": _c(
        lambda: nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True, dropout=0.3), (2, 4, 3),
        names=("weight_hh_l0", "weight_ih_l1", "bias_hh_l1_reverse"),
    ),
    "lstm projected": _c(
        lambda: nn.LSTM(3, 4, proj_size=2), (4, 2, 3), (1, 2, 2), (1, 2, 4),
        names=("weight_hh_l0", "weight_hr_l0"), host=WithState,
    ),
    "lstm unbatched": _c(
        lambda: nn.LSTM(3, 4, batch_first=True), (4, 3), (1, 4), (1, 4), names=_L0, host=WithState
    ),
    "lstm packed": _c(lambda: nn.LSTM(3, 4, 2, proj_size=2), (4, 3, 3), names=_L0, host=Packed),
    "rnn cell": _c(lambda: nn.RNNCell(3, 4), (2, 3), (2, 4), names=_CELL),
    "rnn cell relu": _c(lambda: nn.RNNCell(3, 4, nonlinearity="relu", bias=False), (3,), names=_CELL),
    "gru cell": _c(lambda: nn.GRUCell(3, 4), (2, 3), names=_CELL),
    "lstm cell": _c(lambda: nn.LSTMCell(3, 4), (2, 3), names=_CELL),
    "lstm cell unbatched": _c(lambda: nn.LSTMCell(3, 4), (3,), (4,), (4,), names=_CELL, host=WithState),
    "attention": _c(lambda: nn.MultiheadAttention(4, 2), (3, 2, 4), (5, 2, 4), (5, 2, 4), names=(*_IN, *_OUT)),
    "attention batch first": _c(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True, bias=False), (2, 3, 4), (2, 3, 4), (2, 3, 4),
        names=_IN, need_weights=False,
    ),
    "attention biases": _c(
        lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True, dropout=0.2),
        (3, 2, 4), (5, 2, 4), (5, 2, 4), names=(*_OUT, "bias_k"), average_attn_weights=False,
    ),
    "attention separate": _c(
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=6), (3, 2, 4), (5, 2, 3), (5, 2, 6), names=_SEPARATE
    ),
    "attention unbatched": _c(lambda: nn.MultiheadAttention(4, 2), (3, 4), (5, 4), (5, 4), names=_IN),
    "attention masked": _c(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True), (2, 3, 4), "001 000", names=_IN, host=Masked
    ),
    "encoder layer": _c(
        lambda: nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, dropout=0.0), (2, 3, 4),
        names=("self_attn.in_proj_weight", "linear1.weight"),
    ),
    "encoder layer norm first": _c(
        lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.2, norm_first=True, activation="gelu"), (3, 2, 4),
        names=("self_attn.out_proj.weight", "linear2.weight", "norm1.weight", "norm2.bias"),
    ),
    "encoder layer unbatched": _c(
        lambda: nn.TransformerEncoderLayer(4, 1, 5, activation=nn.PReLU()), (3, 4),
        names=("linear2.weight", "activation.weight"),
    ),
    "encoder layer masked": _c(
        lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True), (2, 3, 4), "001 000",
        names=("self_attn.in_proj_weight", "norm1.weight"), host=MaskedLayers,
    ),
    "encoder layer unbiased": _c(
        lambda: nn.TransformerEncoderLayer(4, 2, 5, bias=False, activation=F.silu), (3, 2, 4),
        names=("self_attn.in_proj_weight", "linear1.weight"),
    ),
    "encoder": _c(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True), 2), (2, 3, 4),
        names=("layers.0.linear2.weight", "layers.1.self_attn.out_proj.weight"),
    ),
    "encoder masked": _c(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), 2, nn.LayerNorm(4), enable_nested_tensor=False
        ),
        (2, 3, 4), "001 000", names=("layers.1.linear1.weight", "norm.weight"), host=MaskedLayers,
    ),
    "decoder layer": _c(
        lambda: nn.TransformerDecoderLayer(4, 2, 5, dropout=0.1), (3, 2, 4), (4, 2, 4),
        names=("multihead_attn.in_proj_weight", "linear1.weight", "norm1.weight"),
    ),
    "decoder layer norm first": _c(
        lambda: nn.TransformerDecoderLayer(4, 2, 5, norm_first=True, batch_first=True, bias=False, activation=F.silu),
        (2, 3, 4), (2, 5, 4), names=("self_attn.in_proj_weight", "norm3.weight", "linear2.weight"),
    ),
    "decoder": _c(
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 5), 2, nn.LayerNorm(4)), (3, 2, 4), (5, 2, 4),
        names=("layers.0.multihead_attn.out_proj.weight", "layers.1.norm2.weight", "norm.bias"),
    ),
    "transformer": _c(
        lambda: nn.Transformer(4, 2, 1, 1, 5, batch_first=True), (2, 3, 4), (2, 5, 4),
        names=("encoder.layers.0.linear1.weight", "decoder.layers.0.linear2.weight", "decoder.norm.weight"),
    ),
    "adaptive softmax": _c(
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 8, [2, 4]), (6, 4), [0, 1, 3, 5, 7, 2],
        names=("head.weight", "tail.0.1.weight"),
    ),
    "adaptive softmax biased": _c(
        lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 9, [2, 4, 7], div_value=2, head_bias=True), (4, 8), [0, 8, 5, 2],
        names=("head.bias", "tail.1.0.weight", "tail.0.1.weight"),
    ),
}  # fmt: skip
