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
    abs add addmm baddbmm bmm cat celu clamp clone cos div elu eq exp ge gelu gru_cell gt hardtanh le leaky_relu
    layer_norm linear log log_softmax lstm_cell lt matmul mean mish mm mul ne neg ones_like pow relu rnn_relu_cell
    rnn_tanh_cell rsqrt selu sigmoid silu sin softmax softplus sqrt square stack sub sum tanh truediv where zeros_like
""".split()
_VIEWS = """
    chunk contiguous detach dim expand flatten getitem permute reshape select size split squeeze t transpose type_as
    unbind unsqueeze view
""".split()


def _functions(names: list[str]) -> frozenset[Any]:
    places = (operator, torch, F)
    return frozenset(vars(place)[name] for place in places for name in names if callable(vars(place).get(name)))


_NEW_FUNCTIONS = _functions(_NEW) | {factors_of, plus_product, product_plus, times_transposed}
_NEW_METHODS, _VIEW_METHODS = frozenset(_NEW), frozenset(_VIEWS)
_VIEW_FUNCTIONS = _functions(_VIEWS) | {getattr}
_NEW_MODULES = frozenset(
    {
        nn.ELU, nn.GELU, nn.GRUCell, nn.LSTMCell, nn.LayerNorm, nn.Linear, nn.RNNCell, nn.ReLU, nn.Sigmoid, nn.SiLU,
        nn.Softplus, nn.Tanh,
    }
)  # fmt: skip
_VIEW_MODULES = frozenset({nn.Dropout, nn.Identity})
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
        known = plain_class(module) in modules and is_torch_leaf(module) and not has_hooks(module)
        return known and not getattr(module, "inplace", False)
    known = node.target in {"call_function": functions, "call_method": methods}.get(node.op, _NOWHERE)
    # `inplace` and `out` say where the result goes; so may a True among the arguments.
    return known and not node.kwargs.keys() & {"inplace", "out"} and all(argument is not True for argument in node.args)
