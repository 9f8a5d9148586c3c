"""A tensor over its largest singular value, with the power method that estimates it, as one node of the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rewriter.parametrizations.maths._eager import executed_now

_KINDS = frozenset({Tensor, nn.Parameter})
_DTYPES = frozenset({torch.float32, torch.float64})
_LEAST = 1e-10
"""The least square of a norm whose own square, and powers in a derivative, are exact enough in float32."""


def as_matrix(W: Tensor, outputs: int) -> Tensor:
    """Return a tensor as a matrix with the dimension `outputs` in front."""
    if outputs != 0:
        W = W.movedim(outputs, 0)
    return W if W.dim() == 2 else W.flatten(1)


def over_norm(W: Tensor, outputs: int, u: Tensor, v: Tensor, steps: int, eps: float) -> Tensor | None:
    """Return W over its norm after `steps` of the power method, which advance u and v.

    Differentiating it takes two passes over W; differentiating the operations one by one takes six. Where the case is
    another, a norm is at most `eps`, or its square is very small or large, nothing changes and the answer is None.

    Arguments:
        W: the tensor, seen as a matrix by `as_matrix`.
        outputs: its dimension in front.
        u: the left singular vector.
        v: the right one.
        steps: at least one.
        eps: the least norm that is divided by.
    """
    if type(W) not in _KINDS or W.dtype not in _DTYPES or not W.dtype is u.dtype is v.dtype:
        return None
    if not (W.is_cpu and u.is_cpu and v.is_cpu and executed_now()):
        return None
    value: Tensor | None = _OverNorm.apply(W, outputs, (u, v), steps, eps)  # type: ignore[no-untyped-call]
    return value


def _turn(M: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the vectors that a step of the power method leads to, and their lengths."""
    left = torch.mv(M, v)
    right = torch.mv(M.t(), left)
    return left, right, torch.linalg.vector_norm(left), torch.linalg.vector_norm(right)


class _OverNorm(torch.autograd.Function):
    """W / u'Mv for the matrix M of W, where u and v count as constants."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, outputs: int, vectors: tuple[Tensor, Tensor], steps: int, eps: float) -> Any:
        M = as_matrix(W, outputs)
        left, right, height, length = _turn(M, vectors[1])
        for _ in range(steps - 1):
            left, right, height, length = _turn(M, right / length)
        heights, lengths = height.item(), length.item()
        if not (heights > eps and lengths > eps * heights and _LEAST < lengths < 1 / _LEAST):
            return None
        torch.div(left, height, out=vectors[0])
        torch.div(right, length, out=vectors[1])
        # With v along M'u, u'Mv is the length of M'u; here u is `left` over its own.
        ctx.outputs, ctx.scale, ctx.lengths = outputs, heights / lengths, heights * lengths
        ctx.save_for_backward(W, left, right)
        return W * ctx.scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        W, left, right = ctx.saved_tensors
        outputs: int = ctx.outputs
        G, M = as_matrix(g, outputs), as_matrix(W, outputs)
        if torch.is_grad_enabled():  # the gradient is to be differentiated, and the scale is a number
            s = ctx.lengths / torch.dot(left, torch.mv(M, right))
            grad = s * (G - s * (G * M).sum() / ctx.lengths * torch.outer(left, right))
        else:
            s = ctx.scale
            along = torch.dot(G.reshape(-1), M.reshape(-1))
            grad = torch.addr(G, left * along, right, beta=s, alpha=-s * s / ctx.lengths)
        if W.dim() > 2 or outputs != 0:
            sizes = list(W.shape)
            sizes.insert(0, sizes.pop(outputs))
            grad = grad.view(sizes).movedim(0, outputs)
        return grad, None, None, None, None
