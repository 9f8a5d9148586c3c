"""Which nodes of a graph write to nothing that was there before, as far as their functions are known."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from rewriter.capture import has_hooks, is_torch_leaf
from rewriter.passes._infra import Rewriting, note
from rewriter.runtime import ParametrizedTensor, plain_class
from rewriter.runtime._batch import BatchedEvaluation
from rewriter.runtime._linear import factors_of, plus_product, product_plus, times_transposed

_NEW = """
    abs adaptive_avg_pool1d adaptive_avg_pool2d add addmm amax amin arange argmax argmin avg_pool1d avg_pool2d baddbmm
    bmm cat celu clamp clone conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d cos cross_entropy
    cumsum div elu empty eq exp full full_like gather ge gelu glu group_norm gru_cell gt hardtanh index_select le
    leaky_relu layer_norm linear log log_softmax lstm_cell lt masked_fill matmul max_pool1d max_pool2d maximum mean
    minimum mish mm mse_loss mul ne neg new_empty new_full new_ones new_zeros one_hot ones ones_like outer pow prod
    relu repeat rms_norm rnn_relu_cell rnn_tanh_cell roll rsqrt scaled_dot_product_attention selu sigmoid silu sin
    softmax softplus sqrt square stack std sub sum tanh tril triu truediv var where zeros zeros_like
""".split()
_VIEWS = """
    broadcast_to chunk contiguous detach dim double einsum expand expand_as flatten float getitem half movedim narrow
    permute reshape select size split squeeze swapaxes t to transpose type_as unbind unflatten unsqueeze view view_as
""".split()


def _functions(names: list[str]) -> frozenset[Any]:
    places = (operator, torch, F)
    return frozenset(vars(place)[name] for place in places for name in names if callable(vars(place).get(name)))


_NEW_FUNCTIONS = _functions(_NEW) | {factors_of, plus_product, product_plus, times_transposed}
_NEW_METHODS, _VIEW_METHODS = frozenset(_NEW), frozenset(_VIEWS)
_VIEW_FUNCTIONS = _functions(_VIEWS) | {getattr}
_NEW_MODULES = frozenset(
    {
        nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.Conv1d, nn.Conv2d, nn.Conv3d,
        nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.ELU, nn.Embedding, nn.GELU, nn.GRUCell,
        nn.GroupNorm, nn.LSTMCell, nn.LayerNorm, nn.LeakyReLU, nn.Linear, nn.LogSoftmax, nn.MaxPool1d, nn.MaxPool2d,
        nn.Mish, nn.PReLU, nn.RMSNorm, nn.RNNCell, nn.ReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softmax, nn.Softplus,
        nn.Tanh,
    }
)  # fmt: skip
_VIEW_MODULES = frozenset({nn.Dropout, nn.Flatten, nn.Identity, nn.Unflatten})
_NOWHERE: frozenset[Any] = frozenset()


def nothing_written_between(rewriting: Rewriting, first: fx.Node, last: fx.Node) -> bool:
    """Whether the nodes that follow the first, up to the last, leave every tensor as they found it."""
    node = first.next
    while node is not last and writes_nothing(rewriting, node):
        node = node.next
    return node is last


def writes_nothing(rewriting: Rewriting, node: fx.Node) -> bool:
    """Whether a node leaves every tensor as it found it; what is not known does not."""
    if node.op == "call_module" and isinstance(rewriting.module(node.target), (ParametrizedTensor, BatchedEvaluation)):
        return True
    return node.op == "get_attr" or _is_new(rewriting, node) or _is_view(rewriting, node)


def module_writes_nothing(module: nn.Module) -> bool:
    """Whether a call of a module leaves every tensor as it found it, its hooks aside."""
    return _is_known(module, _NEW_MODULES | _VIEW_MODULES)


def is_read_only(rewriting: Rewriting, node: fx.Node) -> bool:
    """Whether nothing that uses the node's value, or a view of it, can write to it or hand it to somebody."""
    return all(
        _is_new(rewriting, user) or (_is_view(rewriting, user) and is_read_only(rewriting, user)) for user in node.users
    )


def _is_new(rewriting: Rewriting, node: fx.Node) -> bool:
    """Whether the node's value is a new tensor, made from others that stay as they are."""
    return "opened" in note(node) or _calls(rewriting, node, _NEW_FUNCTIONS, _NEW_METHODS, _NEW_MODULES)


def _is_view(rewriting: Rewriting, node: fx.Node) -> bool:
    return _calls(rewriting, node, _VIEW_FUNCTIONS, _VIEW_METHODS, _VIEW_MODULES)


def _calls(
    rewriting: Rewriting,
    node: fx.Node,
    functions: frozenset[Any],
    methods: frozenset[str],
    modules: frozenset[type[nn.Module]],
) -> bool:
    if node.op == "call_module":
        module = rewriting.module(node.target)
        return _is_known(module, modules) and not has_hooks(module)
    known = node.target in {"call_function": functions, "call_method": methods}.get(node.op, _NOWHERE)
    # `inplace` and `out` say where the result goes; so may a True among the arguments.
    return known and not node.kwargs.keys() & {"inplace", "out"} and all(argument is not True for argument in node.args)


def _is_known(module: nn.Module, kinds: frozenset[type[nn.Module]]) -> bool:
    # An embedding with `max_norm` writes to its weight.
    writes = getattr(module, "inplace", False) or getattr(module, "max_norm", None) is not None
    return plain_class(module) in kinds and is_torch_leaf(module) and not writes
