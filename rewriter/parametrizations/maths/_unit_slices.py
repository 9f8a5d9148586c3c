"""Slices of given norms, by the kernels that torch has for weight normalization."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rewriter._torch import weight_norm_backward, weight_norm_with_norm
from rewriter.parametrizations.maths._eager import DTYPES, KINDS, Together, applied, executed_now


def scaled_slices(g: Tensor, v: Tensor, dim: int | None) -> Tensor | None:
    """Return v with the norms g in its slices along `dim`, zero where v is, or None where the kernels lack the case.

    They exist for real tensors and have no forward-mode derivative. They are fast for the first dimension and for
    matrices; other dimensions are moved to the front.
    """
    # The common case comes first: between the kernels of a training step every test costs.
    if type(v) not in KINDS or type(g) not in KINDS or v.dtype is not g.dtype or v.dtype not in DTYPES:
        return None
    if not (v.is_cpu and v.is_contiguous() and g.is_contiguous() and executed_now()):
        return None
    norms, sizes = g.shape, v.shape
    if 0 in sizes:
        return None
    if dim is None:
        return _scaled(g.view(1, 1), v.view(1, -1), 0).view(sizes) if g.numel() == 1 else None
    ndim = len(sizes)
    dim %= ndim
    if ndim < 2 or len(norms) != ndim or not g.numel() == norms[dim] == sizes[dim]:
        return None
    if dim == 0 or (dim == 1 and ndim == 2):
        return _scaled(g, v, dim)
    moved = _scaled(g.transpose(0, dim).contiguous(), v.transpose(0, dim).contiguous(), 0)
    return moved.transpose(0, dim).contiguous()


def _scaled(g: Tensor, v: Tensor, dim: int) -> Tensor:
    value, norm = weight_norm_with_norm(v, g, dim)
    if norm.min().item() == 0:  # the kernel has divided by it
        zero = norm == 0
        norm = _norm(v.masked_fill(zero, 1.0), dim)
        return v * torch.where(zero, g, g / norm)
    node = value.grad_fn
    if node is not None:
        node.register_hook(partial(_corrected, g, v, dim))
    return value


def _corrected(
    g: Tensor, v: Tensor, dim: int, gradients: Sequence[Tensor | None], outputs: Sequence[Tensor | None]
) -> Sequence[Tensor | None] | None:
    """Return differentiable gradients, if they are to be: torch takes the norms in them for constants."""
    if not torch.is_grad_enabled() or outputs[0] is None:
        return None
    exact = _differentiable(outputs[0], v, g, _norm(v, dim), dim)
    return tuple(None if given is None else new for given, new in zip(gradients, exact, strict=True))


def _differentiable(gradient: Tensor, v: Tensor, g: Tensor, norm: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    along = (gradient * v).sum([index for index in range(v.dim()) if index != dim], keepdim=True) / norm
    return (g / norm) * (gradient - v * (along / norm)), along


def _norm(v: Tensor, dim: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(v, dim=[index for index in range(v.dim()) if index != dim], keepdim=True)
    return norm


def scaling_all(gs: Sequence[Tensor], vs: Sequence[Tensor], dims: Sequence[int | None]) -> Together | None:
    """Return a function that gives `scaled_slices` of several tensors, from one node of the graph.

    It gives None if a slice is zero. Where the kernels lack one of the tensors there is no function.

    Arguments:
        gs: the norms of each.
        vs: the tensors.
        dims: the dimension of the slices of each.
    """
    for g, v, dim in zip(gs, vs, dims, strict=True):
        if type(v) not in KINDS or type(g) not in KINDS or v.dtype is not g.dtype or v.dtype not in DTYPES:
            return None
        if dim != 0 or v.ndim < 2 or not (v.is_cpu and v.is_contiguous() and g.is_contiguous()):
            return None
        if 0 in v.shape or g.ndim != v.ndim or not g.numel() == g.size(0) == v.size(0):
            return None
    return partial(applied(_Scaled), len(vs), len({v.ndim for v in vs}) == 1, *gs, *vs)


class _Scaled(torch.autograd.Function):
    """Tensors with given norms in their slices along the first dimension; None if a slice is zero."""

    @staticmethod
    def forward(ctx: Any, count: int, one_rank: bool, *tensors: Tensor) -> Sequence[Tensor] | None:
        gs, vs = tensors[:count], tensors[count:]
        values, norms = zip(*map(weight_norm_with_norm, vs, gs), strict=True)
        if torch.cat(norms if one_rank else [norm.view(-1) for norm in norms]).min().item() == 0:
            return None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *norms)
        needed = ctx.needs_input_grad[2:]
        if not all(needed):
            pairs = zip(values, needed, needed[count:], strict=False)
            ctx.mark_non_differentiable(*(value for value, *either in pairs if not any(either)))
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        count, saved, again = len(gradients), ctx.saved_tensors, torch.is_grad_enabled()
        found: list[Tensor | None] = [None] * (2 + 2 * count)
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            g, v, norm = saved[index::count]
            pair = (
                _differentiable(gradient, v, g, _norm(v, 0), 0)
                if again
                else weight_norm_backward(gradient.contiguous(), v, g, norm, 0)
            )
            found[2 + count + index], found[2 + index] = pair
        return tuple(found)
