"""Linear layers that a graph calls with one row of a tensor after the other: all rows at once.

An RNN that is unrolled over time multiplies each of its inputs by the same matrix. That is one product, with one
gradient, where a call for each row has as many of both, and adds the gradients up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional

from rewriter.runtime._hooks import has_hooks
from rewriter.runtime._signature import PLAIN
from rewriter.serialization._functions import graph_function


@graph_function
def linear_of_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: int, after: int, first: int, count: int
) -> Sequence[Tensor]:
    """Return what `torch.nn.functional.linear` gives for each of `count` rows of a tensor, which follow each other.

    Arguments:
        x: of shape ``(..., in)``.
        weight: of shape ``(out, in)``.
        bias: of shape ``(out,)``.
        before: how many dimensions come before the one along which the rows follow each other.
        after: how many the model names that come after it.
        first: the first row's index.
        count: how many rows.
    """
    known = type(x) in PLAIN and type(weight) in PLAIN  # a list of tensors is none, and others have their own rules
    if not known or x.dim() < before + max(after + 1, 2) or x.size(before) < first + count:
        indices = range(first, first + count)
        return [functional.linear(x[row_index(before, after, index)], weight, bias) for index in indices]
    rows = x if x.size(before) == count else x.narrow(before, first, count)
    # Each result lies in one piece, as that of a call for one row does.
    return functional.linear(rows.movedim(before, 0) if before else rows, weight, bias).contiguous().unbind()


@graph_function
def module_of_rows(x: Tensor, module: nn.Module, before: int, after: int, first: int, count: int) -> Sequence[Tensor]:
    """Return what a linear layer gives for each of `count` rows of a tensor, which follow each other.

    It is called for each of them where it has hooks by now, or another module is in its place.

    Arguments:
        x: of shape ``(..., in)``.
        module: the layer.
        before: how many dimensions come before the one along which the rows follow each other.
        after: how many the model names that come after it.
        first: the first row's index.
        count: how many rows.
    """
    if type(module) is not nn.Linear or is_compiling() or "forward" in module.__dict__ or has_hooks(module):
        return [module(x[row_index(before, after, index)]) for index in range(first, first + count)]
    return linear_of_rows(x, module.weight, module.bias, before, after, first, count)


def row_index(before: int, after: int, index: int) -> Any:
    """Return what a model writes in brackets for one row."""
    whole = slice(None)
    return (*[whole] * before, index, *[whole] * after) if before + after else index
