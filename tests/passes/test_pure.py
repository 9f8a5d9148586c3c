"""What a pass may move other work past: each function and layer that is said to make a new tensor does."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.passes import _pure

X = torch.rand(2, 4, 6) + 0.5
SQUARE = torch.rand(6, 6)
IMAGE = torch.rand(1, 4, 6, 6)
LABELS = torch.tensor([1, 0])

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "adaptive_avg_pool1d": (X, 3),
    "adaptive_avg_pool2d": (IMAGE, 1),
    **dict.fromkeys(["avg_pool1d", "max_pool1d"], (X, 1)),
    **dict.fromkeys(["avg_pool2d", "max_pool2d"], (IMAGE, 1)),
    **dict.fromkeys(["add", "div", "maximum", "minimum", "mul", "pow", "sub", "truediv"], (X, X)),
    **dict.fromkeys(["eq", "ge", "gt", "le", "lt", "ne"], (X, X)),
    **dict.fromkeys(["matmul", "mm"], (SQUARE, SQUARE)),
    "bmm": (X, X.mT.contiguous()),
    "addmm": (SQUARE, SQUARE, SQUARE),
    "baddbmm": (torch.zeros(2, 4, 4), X, X.mT.contiguous()),
    "outer": (X[0, 0], X[0, 0]),
    "linear": (X, SQUARE),
    **dict.fromkeys(["cat", "stack"], ([X],)),
    "clamp": (X, 0.0),
    **dict.fromkeys(["cumsum", "log_softmax", "softmax", "glu", "amax", "amin", "argmax", "argmin"], (X, -1)),
    "gather": (X, -1, torch.zeros(2, 4, 6, dtype=torch.long)),
    "index_select": (X, -1, torch.arange(6)),
    "masked_fill": (X, X > 9, 0.0),
    "one_hot": (LABELS,),
    "repeat": (X, 1, 1, 1),
    "roll": (X, 0),
    "where": (X > 0, X, X),
    "conv1d": (X, torch.rand(4, 4, 1)),
    "conv2d": (IMAGE, torch.rand(4, 4, 1, 1)),
    "conv3d": (IMAGE[None], torch.rand(1, 1, 1, 1, 1)),
    "conv_transpose1d": (X, torch.rand(4, 4, 1)),
    "conv_transpose2d": (IMAGE, torch.rand(4, 4, 1, 1)),
    "conv_transpose3d": (IMAGE[None], torch.rand(1, 1, 1, 1, 1)),
    "cross_entropy": (X[:, 0], LABELS),
    "mse_loss": (X, X),
    "group_norm": (X, 2),
    **dict.fromkeys(["layer_norm", "rms_norm"], (X, (6,))),
    "scaled_dot_product_attention": (X, X, X),
    "arange": (3,),
    **dict.fromkeys(["zeros", "ones", "empty"], (2, 3)),
    **dict.fromkeys(["new_zeros", "new_ones", "new_empty"], (X, (2, 3))),
    "full": ((2, 3), 1.0),
    "new_full": (X, (2, 3), 1.0),
    "full_like": (X, 1.0),
    "gru_cell": (X[0], torch.rand(4, 6), torch.rand(18, 6), torch.rand(18, 6)),
    "lstm_cell": (X[0], [torch.rand(4, 6), torch.rand(4, 6)], torch.rand(24, 6), torch.rand(24, 6)),
    **dict.fromkeys(["rnn_relu_cell", "rnn_tanh_cell"], (X[0], torch.rand(4, 6), SQUARE, SQUARE)),
}


def _ways_to_call(name: str) -> list[Callable[..., Any]]:
    places = [vars(place)[name] for place in (operator, torch, F) if callable(vars(place).get(name))]
    return places + ([getattr(Tensor, name)] if hasattr(Tensor, name) else [])


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (tuple, list)) else []


def _expect_new(run: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    given = _tensors(arguments)
    versions = [tensor._version for tensor in given]
    taken = {tensor.untyped_storage().data_ptr() for tensor in given}
    made = _tensors(run(*arguments))
    assert made
    assert [tensor._version for tensor in given] == versions
    assert all(tensor.untyped_storage().data_ptr() not in taken for tensor in made)


@pytest.mark.parametrize("name", _pure._NEW)
def test_a_function_that_is_said_to_make_a_new_tensor_does(name: str) -> None:
    ways = _ways_to_call(name)
    assert ways
    arguments = ARGUMENTS.get(name, (X,))
    called = 0
    for run in ways:
        try:
            run(*arguments)
        except (TypeError, RuntimeError):  # a method by this name that takes other arguments
            continue
        _expect_new(run, arguments)
        called += 1
    assert called


LAYERS: dict[type[nn.Module], tuple[nn.Module, tuple[Any, ...]]] = {
    nn.AdaptiveAvgPool1d: (nn.AdaptiveAvgPool1d(3), (X,)),
    nn.AdaptiveAvgPool2d: (nn.AdaptiveAvgPool2d(1), (IMAGE,)),
    **{kind: (kind(1), (X,)) for kind in (nn.AvgPool1d, nn.MaxPool1d)},
    **{kind: (kind(1), (IMAGE,)) for kind in (nn.AvgPool2d, nn.MaxPool2d)},
    **{kind: (kind(4, 4, 1), (X,)) for kind in (nn.Conv1d, nn.ConvTranspose1d)},
    **{kind: (kind(4, 4, 1), (IMAGE,)) for kind in (nn.Conv2d, nn.ConvTranspose2d)},
    **{kind: (kind(1, 1, 1), (IMAGE[None],)) for kind in (nn.Conv3d, nn.ConvTranspose3d)},
    **{kind: (kind(6, 6), (X[0],)) for kind in (nn.GRUCell, nn.LSTMCell, nn.RNNCell, nn.Linear)},
    nn.Embedding: (nn.Embedding(2, 3), (LABELS,)),
    nn.GroupNorm: (nn.GroupNorm(2, 4), (X,)),
    **{kind: (kind(6), (X,)) for kind in (nn.LayerNorm, nn.RMSNorm)},
    **{kind: (kind(-1), (X,)) for kind in (nn.Softmax, nn.LogSoftmax)},
}


@pytest.mark.parametrize("kind", sorted(_pure._NEW_MODULES, key=lambda kind: kind.__name__))
def test_a_layer_that_is_said_to_make_a_new_tensor_does(kind: Any) -> None:
    layer, arguments = LAYERS[kind] if kind in LAYERS else (kind(), (X,))
    _expect_new(layer, arguments)
    assert _pure.module_writes_nothing(layer)


def test_what_writes_is_not_taken_for_what_does_not() -> None:
    assert not _pure.module_writes_nothing(nn.ReLU(inplace=True))
    assert not _pure.module_writes_nothing(nn.Embedding(2, 3, max_norm=1.0))
    assert not _pure.module_writes_nothing(nn.BatchNorm1d(3))
