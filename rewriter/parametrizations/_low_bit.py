"""Weights of one bit and of three values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._groups import Scheme, cut, grouping, straight_through
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._checks import require_real
from rewriter.parametrizations.maths._precision import widen


class _LowBit(nn.Module):
    def __init__(self, name: str, weight: Tensor, scheme: Scheme, axis: int | None, group_size: int | None) -> None:
        super().__init__()
        require_real(name, weight)
        self.scheme = scheme
        self.axis, self.group, self.dims = grouping(name, weight, scheme, axis, group_size)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return f"scheme={self.scheme}"


@register("binary")
class Binary(_LowBit):
    """Keep the sign of each entry and one magnitude per channel: mean |X| · sign X (XNOR-Net).

    >>> import torch
    >>> weight = torch.tensor([[1.0, -3.0], [0.5, 0.5]])
    >>> Binary(weight=weight)(weight)
    tensor([[ 2.0000, -2.0000],
            [ 0.5000,  0.5000]])

    The gradient of the sign passes straight through where |X| <= 1 and is zero elsewhere; that of the mean
    is exact. The sign of zero is one.

    Arguments:
        scheme: what has a magnitude of its own: the tensor, a channel, or a group of entries of a channel.
        axis: the channels (per_channel, default 0), or what is cut into groups (per_group, default -1).
        group_size: for ``per_group``, the entries of a group.
        weight: filled in by the site.

    Raises:
        RewriterError: arguments that do not go together, or do not fit the weight.
    """

    guarantee = "two values per group, opposite to each other"
    cost = "about four passes over the tensor"
    reference = "Rastegari et al. 2016 (XNOR-Net), arXiv:1603.05279"

    def __init__(
        self,
        scheme: Scheme = "per_channel",
        axis: int | None = None,
        group_size: int | None = None,
        *,
        weight: Tensor,
    ) -> None:
        super().__init__("binary", weight, scheme, axis, group_size)

    def forward(self, X: Tensor) -> Tensor:
        pieces = cut(widen(X), self.axis, self.group)
        signs = torch.where(pieces < 0, -1.0, 1.0).to(pieces.dtype)
        signs = straight_through(signs, torch.clamp(pieces, -1.0, 1.0))
        value = signs * pieces.abs().mean(self.dims, keepdim=True)
        return value.reshape(X.shape).to(X.dtype)


@register("ternary")
class Ternary(_LowBit):
    """Round to -a, 0 or a: zero below 0.7 · mean |X|, and `a` the mean magnitude of the others (TWN).

    >>> import torch
    >>> weight = torch.tensor([[0.1, -1.0, 3.0]])
    >>> Ternary(weight=weight)(weight)
    tensor([[ 0., -2.,  2.]])

    The gradient passes straight through.

    Arguments:
        threshold: which part of the mean magnitude an entry must exceed.
        scheme: what has a magnitude of its own: the tensor, a channel, or a group of entries of a channel.
        axis: the channels (per_channel, default 0), or what is cut into groups (per_group, default -1).
        group_size: for ``per_group``, the entries of a group.
        weight: filled in by the site.

    Raises:
        RewriterError: arguments that do not go together, or do not fit the weight.
    """

    guarantee = "three values per group: zero and two opposite ones"
    cost = "about six passes over the tensor"
    reference = "Li, Zhang, Liu 2016 (Ternary Weight Networks), arXiv:1605.04711"

    def __init__(
        self,
        threshold: float = 0.7,
        scheme: Scheme = "per_tensor",
        axis: int | None = None,
        group_size: int | None = None,
        *,
        weight: Tensor,
    ) -> None:
        super().__init__("ternary", weight, scheme, axis, group_size)
        if not 0 <= threshold < 1:
            raise RewriterError(f"ternary's threshold is in [0, 1), not {threshold}")
        self.threshold = float(threshold)

    def forward(self, X: Tensor) -> Tensor:
        pieces = cut(widen(X), self.axis, self.group)
        sizes = pieces.abs()
        large = (sizes > self.threshold * sizes.mean(self.dims, keepdim=True)).to(pieces.dtype)
        counts = large.sum(self.dims, keepdim=True).clamp_min(1.0)
        magnitude = (sizes * large).sum(self.dims, keepdim=True) / counts
        value = straight_through(torch.sign(pieces) * large * magnitude, pieces)
        return value.reshape(X.shape).to(X.dtype)
