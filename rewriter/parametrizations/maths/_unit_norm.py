"""A tensor over its largest singular value, with the power method that estimates it, as one node of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rewriter._torch import foreach_copy, foreach_divide, foreach_norm, foreach_over, foreach_times
from rewriter.parametrizations.maths._eager import DTYPES, KINDS, Together, applied, executed_now

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
    if type(W) not in KINDS or W.dtype not in DTYPES or not W.dtype is u.dtype is v.dtype:
        return None
    if not (W.is_cpu and u.is_cpu and v.is_cpu and executed_now()):
        return None
    value: Tensor | None = applied(_OverNorm)(W, outputs, (u, v), steps, eps)
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
        ctx.outputs, ctx.norms = outputs, (heights, lengths)
        ctx.save_for_backward(W, left, right)
        return W * (heights / lengths)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        W, left, right = ctx.saved_tensors
        return _gradient(gradients[0], W, left, right, ctx.outputs, ctx.norms), None, None, None, None


def _gradient(
    g: Tensor | None, W: Tensor, left: Tensor, right: Tensor, outputs: int, norms: tuple[float, float]
) -> Tensor | None:
    if g is None:
        return None
    height, length = norms
    G, M = as_matrix(g, outputs), as_matrix(W, outputs)
    if torch.is_grad_enabled():  # the gradient is to be differentiated, and the norms are numbers
        s = height * length / torch.dot(left, torch.mv(M, right))
        grad = s * (G - s * (G * M).sum() / (height * length) * torch.outer(left, right))
    else:
        along = torch.dot(G.reshape(-1), M.reshape(-1))
        grad = torch.addr(G, left * along, right, beta=height / length, alpha=-height / length**3)
    if W.dim() > 2 or outputs != 0:
        sizes = list(W.shape)
        sizes.insert(0, sizes.pop(outputs))
        grad = grad.view(sizes).movedim(0, outputs)
    return grad


def dividing_all(
    Ws: Sequence[Tensor],
    outputs: Sequence[int],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    steps: int,
    eps: Sequence[float],
) -> Together | None:
    """Return a function that gives `over_norm` of several tensors, from one node of the graph.

    It gives None, and nothing changes, where `over_norm` would for one of them. There is no function where that is
    known now. The arguments are lists of those of `over_norm`, but for `steps`.
    """
    for W, u, v in zip(Ws, us, vs, strict=True):
        if type(W) not in KINDS or W.dtype not in DTYPES or not W.dtype is u.dtype is v.dtype:
            return None
        if not (W.is_cpu and u.is_cpu and v.is_cpu):
            return None
    return partial(applied(_OverNorms), outputs, (us, vs), steps, eps, *Ws)


def _turns(Ms: Sequence[Tensor], vs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[float], list[float]]:
    """Return what `_turn` does, for each matrix and vector; the lengths as numbers."""
    lefts = [*map(torch.mv, Ms, vs)]
    rights = [torch.mv(M.t(), left) for M, left in zip(Ms, lefts, strict=True)]
    norms: list[float] = torch.stack([*foreach_norm([*lefts, *rights])]).tolist()
    return lefts, rights, norms[: len(Ms)], norms[len(Ms) :]


class _OverNorms(torch.autograd.Function):
    """`_OverNorm` of several tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        outputs: Sequence[int],
        vectors: tuple[Sequence[Tensor], Sequence[Tensor]],
        steps: int,
        eps: Sequence[float],
        *Ws: Tensor,
    ) -> Sequence[Tensor] | None:
        Ms = [*map(as_matrix, Ws, outputs)]
        lefts, rights, heights, lengths = _turns(Ms, vectors[1])
        for _ in range(steps - 1):
            lefts, rights, heights, lengths = _turns(Ms, foreach_over(rights, lengths))
        for height, length, least in zip(heights, lengths, eps, strict=True):
            if not (height > least and length > least * height and _LEAST < length < 1 / _LEAST):
                return None
        for vector, turned, norm in zip(vectors, (lefts, rights), (heights, lengths), strict=True):
            foreach_copy(vector, turned)
            foreach_divide(vector, norm)
        ctx.outputs, ctx.norms = outputs, [*zip(heights, lengths, strict=True)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*Ws, *lefts, *rights)
        values = foreach_times(Ws, [height / length for height, length in ctx.norms])
        needed = ctx.needs_input_grad[4:]
        if not all(needed):
            ctx.mark_non_differentiable(*(value for value, need in zip(values, needed, strict=True) if not need))
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        count, saved = len(gradients), ctx.saved_tensors
        parts = (saved[:count], saved[count : 2 * count], saved[2 * count :])
        return (None, None, None, None, *map(_gradient, gradients, *parts, ctx.outputs, ctx.norms))
